"""ModelQuantizer: the sending half of eager message quantization."""

import os
from collections.abc import Sequence
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants

from nvflare_rdma.codecs.policy import Policy
from nvflare_rdma.codecs.warming import warm_up
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters.delta_base import answer_clients
from nvflare_rdma.filters.dither import DITHERED
from nvflare_rdma.filters.flat_params import flatten, rebuild
from nvflare_rdma.filters.message_encoder import Encoded, Sender
from nvflare_rdma.filters.points import FilterPoint, filters_at, is_dequantizer
from nvflare_rdma.filters.quant_filter import OURS, QUANT_STATE, QUANTIZED_FLAG, SOURCE_DATATYPE, QuantFilter
from nvflare_rdma.flare_compat import TRANSFER_PROP

_OURS = "nvflare_rdma.filters"
_HANDED_OVER = (EventType.AFTER_SEND_TASK_RESULT, EventType.AFTER_PROCESS_SUBMISSION)


class ModelQuantizer(QuantFilter):
    """Sends model weights in few bits; drop-in for `nvflare.app_opt.pt.quantization.quantizer.ModelQuantizer`.

    Works on WEIGHTS and WEIGHT_DIFF DXOs, also inside COLLECTIONs and with dicts in the data, with numpy arrays and
    torch tensors, on a CPU. Tensors on a CUDA device are encoded there, to the same codes, unless error feedback,
    delta or stochastic rounding is on. The metadata is FLARE's for FLARE's types, so the receiver may have FLARE's own
    ModelDequantizer, unless `delta` or a policy with several codecs is used. What it was given is never changed.

    Where this side and the peer have `nvflare_rdma.streaming.RdmaTransfer`, tensors are only marked here, and encoded
    piece by piece as they are sent: the encoded model never exists as a whole. They must not change until the message
    has been received, as with all that FLARE downloads. (Not with error feedback, delta or
    stochastic rounding, and not for ``lossless`` and ``adaquant``, whose sizes show only when all is encoded.)

    Tensors that the type can't carry travel exact: integers, booleans, float64, empty ones, those that would not get
    smaller, and, with a warning that names them, those with NaN or Inf (unless the type carries them) or beyond the
    range (float16). Values that are not tensors pass through. Tied tensors (the same memory under two names) travel
    once.

    Args:
        quantization_type: a codec's name, in any case.
        one_way: messages the other way intentionally travel unquantized. Without it a side that quantizes what it
            sends must also have a ModelDequantizer for what it receives of the same task.
        policy: which codec each tensor gets, a list of rules (`nvflare_rdma.codecs.policy`) followed by the default
            ones: norms, biases and tensors of less than 1024 elements travel exact. None: no rules at all, so that
            all that can be encoded is, as with FLARE's filter.
        error_feedback: add to each message what the last one of its task lacked.
        delta: send WEIGHTS as differences from a model that the receiver holds, when both sides have the same one.
        stochastic_rounding: round ``int8`` up or down at random, so that the mean error is zero. The noise follows from
            job, site, task and round: a job that is run again makes the same.

    Raises:
        ConfigError: an unknown type or rule, or random rounding where there is none; when used, a missing
            ModelDequantizer for the other direction.
    """

    def __init__(
        self,
        quantization_type: str = "float16",
        one_way: bool = False,
        policy: Sequence[Any] | None = None,
        error_feedback: bool = False,
        delta: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        parsed = Policy(quantization_type, policy)
        if stochastic_rounding:
            _check_stochastic(parsed, error_feedback)
        super().__init__()
        # FLARE writes arguments into an exported job config from attributes of the same names.
        self.quantization_type = parsed.codec.name
        self.one_way = one_way
        self.policy = None if policy is None else list(policy)
        self.error_feedback = error_feedback
        self.delta = delta
        self.stochastic_rounding = stochastic_rounding
        self._sender = Sender(parsed, error_feedback, delta, stochastic_rounding)
        self._checked: set[FilterPoint] = set()
        self._warned = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Learn from FLARE's events what became of the messages."""
        if event_type == EventType.START_RUN:
            warm_up(self._sender.codecs)
            if self.delta and self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_DATA_CHAIN:
                answer_clients(fl_ctx)
        elif event_type in _HANDED_OVER and self.error_feedback:
            task, aborted = fl_ctx.get_prop(FLContextKey.TASK_NAME), fl_ctx.get_run_abort_signal()
            if aborted is not None and aborted.triggered:
                self._sender.residuals.drop_staged(task)
            else:
                self._sender.residuals.commit(task, _state_folder(fl_ctx))

    def check_config(self, point: FilterPoint, fl_ctx: FLContext) -> None:
        """Refuse a side that sends codes but would not decode those that it gets. Looked at once per task."""
        key = FilterPoint(point.chain, point.direction, point.task, "")
        if self.one_way or key in self._checked:
            return
        back = key.opposite() if key.known else key
        incoming = filters_at(back, fl_ctx)
        if incoming is not None and not any(is_dequantizer(f) for f in incoming):
            raise ConfigError(
                f"{point.config} has ModelQuantizer in {point.section} for task '{point.task}' but no "
                f"ModelDequantizer in {back.section}: add {_OURS}.ModelDequantizer to {back.section} of "
                f"{point.config} (and {_OURS}.ModelQuantizer to {back.section} of {point.other_config}), or pass "
                "one_way=true to ModelQuantizer if the other direction is meant to travel unquantized"
            )
        self._checked.add(key)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """A new DXO with codes for weights, or None (unchanged) if it is quantized already."""
        if dxo.get_meta_prop(QUANTIZED_FLAG):
            self.log_info(fl_ctx, "Already quantized, nothing to do")
            return None
        if self.error_feedback and not self.delta and dxo.data_kind == DataKind.WEIGHTS and not self._warned:
            self._warned = True
            self.log_warning(
                fl_ctx,
                "error_feedback on whole WEIGHTS makes each round's model worse than without it: set delta=true as "
                "well, or leave out error_feedback",
                fire_event=False,
            )
        point = FilterPoint.of(self, shareable, fl_ctx)
        root = shareable.get_header(ReservedHeaderKey.MSG_ROOT_ID) or ""
        seed = _seed(root, shareable, fl_ctx)
        message = self._sender.encode(dxo, point, root, seed, _state_folder(fl_ctx), fl_ctx, _goes_directly(fl_ctx))
        self._report(message, fl_ctx)
        encoded = message.params
        meta = self._meta_for_new_dxo(dxo)
        meta[MetaKey.PROCESSED_ALGORITHM] = encoded.algorithm
        meta[QUANT_STATE] = dict(encoded.quant_state)
        meta[SOURCE_DATATYPE] = dict(encoded.source_datatype)
        meta[QUANTIZED_FLAG] = True
        ours = {
            "tied": dict(encoded.tied),
            "base": message.base,
            "leaves": message.leaves,
            "on_the_way": len(encoded.marked),
        }
        if any(ours.values()):
            meta[OURS] = {key: value for key, value in ours.items() if value}
        # Dicts of its own: other sites get the same codes, and a later filter may change dicts in place.
        return DXO(data_kind=dxo.data_kind, data=rebuild(encoded.params, flatten(encoded.params)), meta=meta)

    def _report(self, message: Encoded, fl_ctx: FLContext) -> None:
        encoded = message.params
        how = f" as the difference from {message.base}" if message.base else ""
        self.log_info(fl_ctx, f"Quantized to {encoded.algorithm}{how}: {encoded.summary()}")
        if encoded.exact:
            listed = "; ".join(f"{name}: {reason}" for name, reason in encoded.exact.items())
            self.log_warning(fl_ctx, f"{len(encoded.exact)} tensor(s) sent exact: {listed}", fire_event=False)


def _goes_directly(fl_ctx: FLContext) -> bool:
    """Whether both sides have `nvflare_rdma.streaming.RdmaTransfer`, which encodes and decodes what is marked."""
    peer = fl_ctx.get_peer_context()
    return bool(fl_ctx.get_prop(TRANSFER_PROP) and peer is not None and peer.get_prop(TRANSFER_PROP))


def _check_stochastic(policy: Policy, error_feedback: bool) -> None:
    if error_feedback:
        raise ConfigError(
            "stochastic_rounding and error_feedback can't be used together: each makes the mean error zero by "
            "itself, and the residual would carry the noise from round to round; leave out one of them"
        )
    if not any(rule.quantization_type in DITHERED for rule in policy.rules):
        raise ConfigError(
            f"stochastic_rounding has an effect on {', '.join(DITHERED)} only, which the policy doesn't use; set "
            "quantization_type to it or leave out stochastic_rounding"
        )


def _seed(root: str, shareable: Shareable, fl_ctx: FLContext) -> str:
    """What tells a round of this site and job from all others; outside of rounds, the message or task."""
    current = shareable.get_header(AppConstants.CURRENT_ROUND)
    if current is None:
        current = root or fl_ctx.get_prop(FLContextKey.TASK_ID, "")
    return f"{fl_ctx.get_job_id('')}\0{fl_ctx.get_identity_name()}\0{current}"


def _state_folder(fl_ctx: FLContext) -> str | None:
    """Where residuals outlive the process: in the job's run folder. None outside a job."""
    job, engine = fl_ctx.get_job_id(), fl_ctx.get_engine()
    if not job or engine is None:
        return None
    return os.path.join(engine.get_workspace().get_run_dir(job), "nvflare_rdma")
