"""What a quantizer knows about the messages before: residuals, base models, and the encoding that sites share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nvflare.apis.fl_context import FLContext

from nvflare_rdma.codecs import Policy, is_plain, is_tensor
from nvflare_rdma.filters.correction import CorrectingEncoder
from nvflare_rdma.filters.delta_base import Base, bases_of, held_by_peer, server_holds
from nvflare_rdma.filters.encoding import EncodedParams, MarkingEncoder, TensorEncoder, encode_params
from nvflare_rdma.filters.points import FilterPoint
from nvflare_rdma.filters.residuals import Residuals


@dataclass(frozen=True)
class ModelMessage:
    """A message that is to be encoded.

    Attributes:
        values: tensors and whatever else is in it, by flat name.
        whole: whether it is a model (WEIGHTS) and not a difference of two.
        point: where it is sent.
        root_id: FLARE's id of a message that goes to several sites, "" if it goes to one.
        round: of this site and job, unlike all others; random rounding follows from it.
        folder: where residuals are saved, None if nowhere.
        direct: whether the transfer of both sides encodes and decodes what is marked.
        policy: the codec of each tensor, if it is another one than the quantizer's.
    """

    values: Mapping[str, Any]
    whole: bool
    point: FilterPoint
    root_id: str
    round: str
    folder: str | None
    direct: bool
    policy: Policy | None = None


@dataclass(frozen=True)
class EncodedMessage:
    """An encoded message.

    Attributes:
        params: codes and FLARE's metadata.
        base: digest of the model that some of the codes are the difference from, if they are.
        based: how many tensors' codes are.
        leaves: digest of the model that the receiver has after decoding, if the sender keeps it too.
    """

    params: EncodedParams
    base: str | None = None
    leaves: str | None = None
    based: int = 0


class Shared:
    """Holds what was made of one message for as long as the message's own tensors live.

    FLARE's server filters a message anew for each site that asks for it. The DXO is another one each time, but the
    tensors in it are the same objects: they are held by weak references, so nothing is kept alive and no address is
    taken for an object that is gone.
    """

    def __init__(self, root_id: str, values: Mapping[str, Any]) -> None:
        """Hold the message's tensors, by name, weakly. `root_id` is FLARE's id of the message, one for all sites."""
        self.root_id = root_id
        self.results: dict[str, Any] = {}
        self._values = [(name, self._reference(value)) for name, value in values.items()]

    def is_of(self, root_id: str, values: Mapping[str, Any]) -> bool:
        """Return whether this was made of the message that has these tensors."""
        return (
            root_id == self.root_id
            and len(values) == len(self._values)
            and all(
                name == known and reference() is value
                for (name, value), (known, reference) in zip(values.items(), self._values, strict=True)
            )
        )

    def _reference(self, value: Any) -> Callable[[], Any]:
        if not is_tensor(value):
            return lambda: value
        me = weakref.ref(self)

        def forget(_: Any) -> None:
            shared = me()
            if shared is not None:
                shared.results.clear()

        return weakref.ref(value, forget)


class MessageEncoder:
    """Encodes the messages of one quantizer. Any number of threads may use it at once.

    Args:
        policy: the codec of each tensor.
        error_feedback: add to each message what the last one of its stream lacked.
        delta: send WEIGHTS as differences from a model that the receiver holds.
        stochastic: round the codecs that can do so at random.
        limit: the largest relative error that a tensor may have; None for any.
    """

    def __init__(
        self, policy: Policy, error_feedback: bool, delta: bool, stochastic: bool, limit: float | None = None
    ) -> None:
        self.residuals = Residuals()
        self.codecs = policy.codecs
        self._policy = policy
        self._error_feedback = error_feedback
        self._delta = delta
        self._stochastic = stochastic
        self._limit = limit
        # Held while a message is encoded. Whoever comes meanwhile is mostly another site that wants the same one.
        self._lock = threading.Lock()
        self._shared: dict[str, Shared] = {}
        self._apart: set[str] = set()  # streams whose receivers don't all hold the same model

    def encode(self, message: ModelMessage, fl_ctx: FLContext) -> EncodedMessage:
        """Encode the message, or find it encoded already.

        Tensors are only marked if the transfer can encode all of them, and what arrives need not be known here.
        """
        with self._lock:
            results = self._shared_results(message) if message.point.on_server else {}
            policy = message.policy or self._policy
            if message.policy is not None:  # sites that get the same type share what was made of it
                results = results.setdefault(policy.default, {})
            forgetful = not (self._error_feedback or self._delta or self._stochastic)
            if message.direct and forgetful and all(is_plain(v) for v in message.values.values() if is_tensor(v)):
                return EncodedMessage(encode_params(message.values, policy, MarkingEncoder(results, self._limit)))
            if self._error_feedback and message.folder is not None:
                self.residuals.restore(message.point.stream, message.folder)
            if message.point.on_server:
                return self._for_site(results, message, fl_ctx)
            return self._encode(message, self._base_for_server(message, fl_ctx), True, fl_ctx)

    def _shared_results(self, message: ModelMessage) -> dict[str, Any]:
        """Return what was made of this message for other sites."""
        stream = message.point.stream
        shared = self._shared.get(stream)
        if not message.root_id or shared is None or not shared.is_of(message.root_id, message.values):
            shared = self._shared[stream] = Shared(message.root_id, message.values)
        return shared.results

    def _for_site(self, results: dict[str, Any], message: ModelMessage, fl_ctx: FLContext) -> EncodedMessage:
        """Return the message for the site that asks.

        All sites get the same, unless some hold its base and others don't.
        """
        stream = message.point.stream
        held = held_by_peer(stream, fl_ctx) if self._delta else None
        first: EncodedMessage | None = results.get("first")
        if first is None:
            base = bases_of(fl_ctx).current(stream) if held is not None else None
            if base is not None and (base.digest != held or not message.whole):
                base = None
            if stream in self._apart:  # let all of them hold the same again
                self._apart.discard(stream)
                base = None
            results["first"] = first = self._encode(message, base, True, fl_ctx)
        if first.base is None or first.base == held:
            return first
        self._apart.add(stream)
        if "whole" not in results:
            results["whole"] = self._encode(message, None, False, fl_ctx)
        whole: EncodedMessage = results["whole"]
        return whole

    def _base_for_server(self, message: ModelMessage, fl_ctx: FLContext) -> Base | None:
        """Return the model that this client got for its task, if the server still has it."""
        if not self._delta or not message.whole:
            return None
        base = bases_of(fl_ctx).current(message.point.stream)
        return base if base is not None and server_holds(message.point.stream, base, fl_ctx) else None

    def _encode(self, message: ModelMessage, base: Base | None, remember: bool, fl_ctx: FLContext) -> EncodedMessage:
        """Encode against `base`. If the message is to be remembered, the next one of its stream builds on it."""
        stream = message.point.stream
        leaves_base = remember and self._delta and message.point.on_server and message.whole
        # A stream of differences from its own last message makes up for errors by itself: they are in the difference.
        feedback = remember and self._error_feedback and not leaves_base
        if not (leaves_base or feedback or base or self._stochastic):
            policy = message.policy or self._policy
            return EncodedMessage(encode_params(message.values, policy, TensorEncoder(self._limit)))

        encoder = CorrectingEncoder(
            # Taken once: a result that comes meanwhile may commit what is staged.
            before=self.residuals.committed(stream) if feedback else {},
            whole=message.whole,
            base=base,
            noise=f"{message.round}\0{stream}" if self._stochastic else None,
            limit=self._limit,
        )
        params = encode_params(message.values, self._policy, encoder)
        based = encoder.based & params.codecs.keys()
        for name in based:
            params.quant_state[name]["delta"] = True
        if feedback:
            lacking = {k: v for k, v in encoder.lacking.items() if k in params.codecs}
            self.residuals.stage(stream, {**encoder.owed, **lacking})
        left = None
        if leaves_base:
            arrived = {k: v for k, v in encoder.arrived.items() if k in params.codecs}
            left = Base.of(arrived, {name: tuple(message.values[name].shape) for name in arrived})
            bases_of(fl_ctx).set(stream, left)
        return EncodedMessage(
            params,
            base=base.digest if base is not None else None,
            leaves=left.digest if left is not None else None,
            based=len(based),
        )
