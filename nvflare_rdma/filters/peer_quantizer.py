"""PeerQuantizer: few bits between sites, in workflows that the sites control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.dxo import DXO
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.codecs import FixedSizeCodec, Policy, is_plain, is_tensor, warm_up
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters.autopilot import AUTO
from nvflare_rdma.filters.encoding import EncodedParams, MarkingEncoder, Replacements, encode_params
from nvflare_rdma.filters.options import check_limit
from nvflare_rdma.filters.quant_filter import QuantFilter
from nvflare_rdma.flare_compat import TRANSFER_PROP
from nvflare_rdma.logs import escaped


class PeerQuantizer(FLComponent):
    """Sends models from site to site in few bits: in swarm learning, and in cyclic workflows that the sites control.

    FLARE applies no filters to what one site sends another. This component marks the tensors of such messages, and the
    site's `nvflare_rdma.streaming.RdmaTransfer` encodes them piece by piece as they are sent, directly or on the
    fallback. They arrive decoded: the receiver needs `RdmaTransfer` and nothing else. Without it there, they travel
    exact, as does the final model. Put it among the components of the sites (`nvflare_rdma.recipe.add_quantization`
    does).

    Args:
        quantization_type: a codec's name, in any case. Not `lossless`, `exact_delta` or `adaquant`, whose sizes
            show only when all is encoded.
        policy, max_relative_error: see `ModelQuantizer`.

    Raises:
        ConfigError: an unknown type or rule, a codec that can't encode as it sends, or a bad largest error.
    """

    def __init__(
        self,
        quantization_type: str = "float16",
        policy: Sequence[Any] | None = None,
        max_relative_error: float | None = None,
    ) -> None:
        if isinstance(quantization_type, str) and quantization_type.lower() == AUTO:
            raise ConfigError(f"'{AUTO}' can't be used between sites; name a quantization_type")
        parsed = Policy(quantization_type, policy)
        if late := [codec.name for codec in parsed.codecs if not isinstance(codec, FixedSizeCodec)]:
            raise ConfigError(
                f"{', '.join(late)} can't be used between sites, where tensors are encoded as they are sent: their "
                "encoded size has to be known before; use another quantization_type"
            )
        if lossy := [codec.name for codec in parsed.codecs if codec.needs_feedback]:
            raise ConfigError(
                f"{', '.join(lossy)} can't be used between sites, where nothing is known of earlier messages that "
                "would make up for what it leaves out; use another quantization_type"
            )
        limit = check_limit(parsed, max_relative_error)
        super().__init__()
        # FLARE writes arguments into an exported job config from attributes of the same names.
        self.quantization_type = parsed.codec.name
        self.policy = None if policy is None else list(policy)
        self.max_relative_error = limit
        self._codecs = parsed.codecs
        self._marker = _Marker(parsed, limit)
        self._idle = False
        self._warned = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Load compiled code as the run starts, and mark what is about to be sent to another site."""
        if event_type == EventType.START_RUN:
            self._idle = True
            warm_up(self._codecs)
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER and not _has_come(fl_ctx):
            task = fl_ctx.get_prop(FLContextKey.TASK_DATA)
            if isinstance(task, Shareable):
                self._mark(task, fl_ctx)
        elif event_type == EventType.END_RUN and self._idle:
            self._idle = False
            self.log_warning(
                fl_ctx, "PeerQuantizer had no model in this run that went to another site", fire_event=False
            )

    def _mark(self, task: Shareable, fl_ctx: FLContext) -> None:
        if not fl_ctx.get_prop(TRANSFER_PROP):
            if not self._warned:
                self._warned = True
                self.log_warning(
                    fl_ctx,
                    "Models go to other sites in full, not quantized: PeerQuantizer needs RdmaTransfer in the same job "
                    "(nvflare_rdma.recipe.add_transfer)",
                    fire_event=False,
                )
            return
        marked = self._marker.process(task, fl_ctx)
        if marked is not task:
            self._idle = False
            # FLARE sends this very object, whatever its filters give. What is in it may be other people's: that is
            # replaced, and stays as it is.
            task.update(marked)


class _Marker(QuantFilter):
    """Marks the tensors of a message, and leaves all else as it is: what arrives is decoded."""

    def __init__(self, policy: Policy, limit: float | None) -> None:
        super().__init__()
        self._policy = policy
        self._limit = limit
        self._replacements = Replacements(limit)

    def process_values(
        self, values: Mapping[str, Any], dxo: DXO, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Return marked views in place of the tensors that the policy has a codec for."""
        plain = {name: value for name, value in values.items() if is_tensor(value) and is_plain(value)}
        params = encode_params(plain, self._policy, MarkingEncoder({}, self._limit))
        self._report(params, len(values) - len(plain), fl_ctx)
        return {**values, **params.values}, self._meta_for_new_dxo(dxo)

    def _report(self, params: EncodedParams, others: int, fl_ctx: FLContext) -> None:
        rest = f" {others} values are no plain tensors here and travel as they are." if others else ""
        what = f"Quantized to {params.algorithm} for another site: {params.summary()}{rest}"
        self.log_info(fl_ctx, escaped(what))
        if what := params.exact_summary():
            self.log_warning(fl_ctx, escaped(what), fire_event=False)
        if what := self._replacements.news(params):
            self.log_info(fl_ctx, escaped(what))


def _has_come(fl_ctx: FLContext) -> bool:
    """Whether the task of this event has come to the site. FLARE's runner says so, and a controller what goes out."""
    runner = fl_ctx.get_prop(FLContextKey.RUNNER)
    return runner is None or fl_ctx.get_prop(FLContextKey.EVENT_ORIGIN) == runner.name
