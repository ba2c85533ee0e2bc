"""What a quantizer knows about the messages before: residuals, base models, and the encoding that sites share."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext

from nvflare_rdma.codecs import Codec, FixedSizeCodec
from nvflare_rdma.codecs.base import Array
from nvflare_rdma.codecs.marks import marked
from nvflare_rdma.codecs.policy import Policy
from nvflare_rdma.codecs.tensors import is_plain, is_tensor, to_array
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.filters.correction import Corrected, encode_corrected
from nvflare_rdma.filters.delta_base import Base, bases_of, held_by_peer, server_holds
from nvflare_rdma.filters.dither import DITHERED, dither_of
from nvflare_rdma.filters.encoding import EncodedParams, encode_params, encode_whole
from nvflare_rdma.filters.flat_params import flatten
from nvflare_rdma.filters.points import FilterPoint
from nvflare_rdma.filters.residuals import Residuals, fitting
from nvflare_rdma.filters.sharing import Shared


@dataclass(frozen=True)
class Encoded:
    """An encoded message.

    Attributes:
        params: codes and FLARE's metadata.
        base: digest of the model that the codes are the difference from, if they are.
        leaves: digest of the model that the receiver has after decoding, if the sender keeps it too.
    """

    params: EncodedParams
    base: str | None = None
    leaves: str | None = None


class Sender:
    """Encodes the messages of one quantizer.

    Args:
        policy: the codec of each tensor.
        error_feedback: add to each message what the last one of its stream lacked.
        delta: send WEIGHTS as differences from a model that the receiver holds.
        stochastic: round the codecs that can do so at random.
    """

    def __init__(self, policy: Policy, error_feedback: bool, delta: bool, stochastic: bool) -> None:
        self.residuals = Residuals()
        self.codecs = policy.codecs
        self._policy = policy
        self._error_feedback = error_feedback
        self._delta = delta
        self._stochastic = stochastic
        # Held while a message is encoded. Whoever comes meanwhile is mostly another site that wants the same one.
        self._lock = threading.Lock()
        self._shared: dict[str, Shared] = {}
        self._apart: set[str] = set()  # streams whose receivers don't all hold the same model

    def encode(
        self,
        dxo: DXO,
        point: FilterPoint,
        message: str,
        seed: str,
        folder: str | None,
        fl_ctx: FLContext,
        mark: bool = False,
    ) -> Encoded:
        """Encode `dxo`, or find it encoded already.

        Args:
            message: FLARE's id of a message that goes to several sites, "" if it goes to one.
            seed: of this round's random rounding.
            folder: where residuals are saved, None if nowhere.
            mark: leave the encoding to the transfer, unless what arrives has to be known here.
        """
        with self._lock:
            forgetful = not (self._error_feedback or self._delta or self._stochastic)
            if mark and forgetful and all(is_plain(v) for v in flatten(dxo.data).values() if is_tensor(v)):
                return self._mark(dxo, point, message)
            if self._error_feedback and folder is not None:
                self.residuals.restore(point.stream, folder)
            if not point.on_server:
                return self._encode(dxo, point, self._base_for_server(dxo, point, fl_ctx), True, seed, fl_ctx)
            return self._for_site(self._shared_by(dxo, point, message).results, dxo, point, seed, fl_ctx)

    def _mark(self, dxo: DXO, point: FilterPoint, message: str) -> Encoded:
        """All sites get the same views while one of them has them, so that a chunk that is encoded for one is there for
        the others. None is kept here: a numpy view would keep the model alive."""
        views: dict[str, Any] = {}
        codes: dict[str, Array] = {}
        if point.on_server:
            results = self._shared_by(dxo, point, message).results
            views, codes = results.setdefault("views", views), results.setdefault("codes", codes)

        def mark(name: str, codec: FixedSizeCodec, value: Any) -> Any:
            known = views[name]() if name in views else None
            if known is None:
                known = marked(value, codec)
                views[name] = weakref.ref(known)
            return known

        def encode(name: str, codec: Codec, value: Any) -> Array:
            if name not in codes:
                codes[name] = encode_whole(name, codec, value)
            return codes[name]

        return Encoded(encode_params(dxo.data, self._policy, encode, mark))

    def _shared_by(self, dxo: DXO, point: FilterPoint, message: str) -> Shared:
        shared = self._shared.get(point.stream)
        if not message or shared is None or not shared.is_of(message, dxo.data):
            shared = self._shared[point.stream] = Shared(message, dxo.data)
        return shared

    def _for_site(
        self, results: dict[str, Encoded], dxo: DXO, point: FilterPoint, seed: str, fl_ctx: FLContext
    ) -> Encoded:
        """The message for the site that asks. All sites get the same, unless some hold its base and others don't."""
        held = held_by_peer(point.stream, fl_ctx) if self._delta else None
        first = results.get("first")
        if first is None:
            base = bases_of(fl_ctx).current(point.stream) if held is not None else None
            if base is not None and (base.digest != held or dxo.data_kind != DataKind.WEIGHTS):
                base = None
            if point.stream in self._apart:  # let all of them hold the same again
                self._apart.discard(point.stream)
                base = None
            results["first"] = first = self._encode(dxo, point, base, True, seed, fl_ctx)
        if first.base is None or first.base == held:
            return first
        self._apart.add(point.stream)
        if "whole" not in results:
            results["whole"] = self._encode(dxo, point, None, False, seed, fl_ctx)
        return results["whole"]

    def _base_for_server(self, dxo: DXO, point: FilterPoint, fl_ctx: FLContext) -> Base | None:
        """The model that this client got for its task, if the server still has it."""
        if not self._delta or dxo.data_kind != DataKind.WEIGHTS:
            return None
        base = bases_of(fl_ctx).current(point.stream)
        return base if base is not None and server_holds(point.stream, base, fl_ctx) else None

    def _encode(
        self, dxo: DXO, point: FilterPoint, base: Base | None, remember: bool, seed: str, fl_ctx: FLContext
    ) -> Encoded:
        """Encode `dxo` against `base`. If the message is to be remembered, the next one of its stream builds on it."""
        leaves_base = remember and self._delta and point.on_server and dxo.data_kind == DataKind.WEIGHTS
        # A stream of differences from its own last message makes up for errors by itself: they are in the difference.
        feedback = remember and self._error_feedback and not leaves_base
        if not (leaves_base or feedback or base or self._stochastic):
            return Encoded(encode_params(dxo.data, self._policy))

        # Taken once: a result that comes meanwhile may commit what is staged.
        before = self.residuals.committed(point.stream) if feedback else {}
        arrived: dict[str, Array] = {}
        lacking: dict[str, Any] = {}
        based: set[str] = set()

        def encode(name: str, codec: Codec, value: Any) -> Array:
            values = to_array(value)
            if codec.name == "lossless":
                arrived[name] = values.flatten()
                return encode_whole(name, codec, values)
            flat = np.ascontiguousarray(values).reshape(-1)
            residual = fitting(before, name, values.shape)
            known = base.tensor(name, flat) if base is not None else None
            at_random = self._stochastic and codec.name in DITHERED

            def attempt(residual: Array | None, known: Array | None) -> Corrected:
                dither = dither_of(codec, f"{seed}\0{point.stream}\0{name}") if at_random else None
                return encode_corrected(codec, flat, residual, known, dither)

            try:
                corrected = attempt(residual, known)
            except UnrepresentableError:
                if residual is None and known is None:
                    raise
                # The sum or difference can't be carried; the values themselves may be.
                known = None
                corrected = attempt(None, None)
            arrived[name], lacking[name] = corrected.arrived, corrected.residual.reshape(values.shape)
            if known is not None:
                based.add(name)
            return corrected.encoded

        params = encode_params(dxo.data, self._policy, encode)
        for name in based & params.codecs.keys():
            params.quant_state[name]["delta"] = True
        if feedback:
            self.residuals.stage(point.stream, {k: v for k, v in lacking.items() if k in params.codecs})
        left = Base.of({k: v for k, v in arrived.items() if k in params.codecs}) if leaves_base else None
        if left is not None:
            bases_of(fl_ctx).set(point.stream, left)
        return Encoded(params, base.digest if base is not None else None, left.digest if left is not None else None)
