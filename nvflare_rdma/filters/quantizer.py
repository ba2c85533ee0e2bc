"""ModelQuantizer: the sending half of eager message quantization."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from nvflare_rdma.accumulate import is_encoded_tensor, plain
from nvflare_rdma.codecs import Policy, is_plain, is_tensor, warm_up
from nvflare_rdma.filters import points
from nvflare_rdma.filters.autopilot import AUTO, NAMED, Autopilot, checked_limits
from nvflare_rdma.filters.delta_base import answer_clients
from nvflare_rdma.filters.encoding import MIB, Replacements, TensorEncoder, encode_params
from nvflare_rdma.filters.message_encoder import EncodedMessage, MessageEncoder, ModelMessage
from nvflare_rdma.filters.options import check_limit, check_options, check_whole
from nvflare_rdma.filters.points import FilterPoint, require_decoding_site, require_dequantizer, tell_what_is_decoded
from nvflare_rdma.filters.quant_filter import (
    OURS,
    QUANT_STATE,
    QUANTIZED_FLAG,
    SOURCE_DATATYPE,
    QuantFilter,
    flatten,
    rebuild,
)
from nvflare_rdma.flare_compat import RATES_PROP, TRANSFER_PROP, streams_tensors
from nvflare_rdma.logs import escaped

_HANDED_OVER = (EventType.AFTER_SEND_TASK_RESULT, EventType.AFTER_PROCESS_SUBMISSION)


class ModelQuantizer(QuantFilter):
    """Sends model weights in few bits.

    It can be put in place of `nvflare.app_opt.pt.quantization.quantizer.ModelQuantizer`, and works on WEIGHTS and
    WEIGHT_DIFF DXOs, also inside COLLECTIONs and with dicts in the data, with numpy arrays and torch tensors. Tensors
    on a CUDA device are encoded there, to the same codes, unless error feedback, delta or stochastic rounding is on.
    The metadata is FLARE's for FLARE's types, so the receiver may have FLARE's own ModelDequantizer, unless `delta` or
    a policy with several codecs is used. What the filter was given is never changed.

    Where this side and the peer have `nvflare_rdma.streaming.RdmaTransfer`, tensors are only marked here, and encoded
    piece by piece as they are sent: the encoded model never exists as a whole. They must not change until the message
    has been received, as with all that FLARE downloads. With error feedback, delta or stochastic rounding, and for
    `lossless`, `exact_delta` and `adaquant`, whose sizes show only when all is encoded, tensors are encoded here.

    Tensors that the type can't carry travel exact: integers, booleans, float64, empty ones, those that would not get
    smaller, and, with a warning that names them, those with NaN or Inf (unless the type carries them) or beyond the
    range (float16). Values that are not tensors pass through. Tied tensors (the same memory under two names) travel
    once.

    Args:
        quantization_type: a codec's name, in any case; or `auto`: of exact, `bfloat16`, `int8` and `normfloat4_e4m3`
            the best one that is within `round_seconds` and `round_bytes`.
        one_way: messages the other way intentionally travel unquantized. Without it a side that quantizes what it
            sends must also have a ModelDequantizer for what it receives of the same task.
        policy: which codec each tensor gets, a list of rules (`nvflare_rdma.codecs.policy`) followed by the default
            ones: norms, biases and tensors of less than 1024 elements travel exact. None: no rules at all, so that
            all that can be encoded is, as with FLARE's filter.
        error_feedback: add to each message what the last one of its task lacked. `topk2` needs it.
        delta: send WEIGHTS as differences from a model that the receiver holds, when both sides have the same one.
            `exact_delta` needs it. None: only with error_feedback, which makes whole WEIGHTS worse.
        stochastic_rounding: round `int8` up or down at random, so that the mean error is zero. The noise follows from
            job, site, task and round: a job that is run again makes the same.
        clients: on the server, the sites to which models go in few bits; None: all. Those to others pass unchanged.
        max_relative_error: how much of a tensor may be lost (`nvflare_rdma.codecs.fidelity` says what the relative
            error is), a number above 0 and up to 1; None for any. A tensor of which its type would lose more travels
            in the next better one, and exact if there is none; the log names it once. Estimates decide beforehand, and
            what is encoded is measured: a receiver of this package gets no tensor whose error is larger.
        round_seconds: with `auto`, how long a round's traffic at a site may take, down and up together, by how fast
            the last transfers went (`nvflare_rdma.streaming.RdmaTransfer` measures that).
        round_bytes: with `auto`, how many bytes a round's traffic at a site may have, down and up together.

    Raises:
        ConfigError: an unknown type or rule, a type without the option that it needs, random rounding where there
            is none, or a bad largest error; when used, a missing ModelDequantizer for the other direction.
    """

    def __init__(  # noqa: PLR0913 - a filter's arguments are its config
        self,
        quantization_type: str = "float16",
        one_way: bool = False,
        policy: Sequence[Any] | None = None,
        error_feedback: bool = False,
        delta: bool | None = None,
        stochastic_rounding: bool = False,
        clients: Sequence[str] | None = None,
        max_relative_error: float | None = None,
        round_seconds: float | None = None,
        round_bytes: int | None = None,
    ) -> None:
        of_one_type = {"error_feedback": error_feedback, "delta": delta, "stochastic_rounding": stochastic_rounding}
        limits = checked_limits(quantization_type, round_seconds, round_bytes, of_one_type)
        parsed = Policy(quantization_type if limits is None else NAMED, policy)
        with_base = error_feedback if delta is None else delta
        check_options(parsed, error_feedback, with_base, stochastic_rounding)
        limit = check_limit(parsed, max_relative_error)
        super().__init__(clients)
        # FLARE writes arguments into an exported job config from attributes of the same names.
        self.quantization_type = parsed.codec.name if limits is None else AUTO
        self.one_way = one_way
        self.policy = None if policy is None else list(policy)
        self.error_feedback = error_feedback
        self.delta = delta
        self.stochastic_rounding = stochastic_rounding
        self.max_relative_error = limit
        self.round_seconds = None if limits is None else limits.seconds
        self.round_bytes = None if limits is None else limits.nbytes
        self._autopilot = None if limits is None else Autopilot(parsed, limits, limit)
        self._with_base = with_base
        self._policy = parsed
        self._encoder = MessageEncoder(parsed, error_feedback, with_base, stochastic_rounding, limit)
        self._replacements = Replacements(limit)
        self._checked: set[tuple[str | None, str | None, str]] = set()
        self._doubted: set[tuple[str, str]] = set()
        self._warned = False
        self._told_of_meta = False
        self._idle: bool | None = None  # whether no model has come in this run

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Load compiled code as the run starts, and learn from FLARE's events whether messages were handed over."""
        if event_type == EventType.START_RUN:
            tell_what_is_decoded(fl_ctx)
            self._idle = True
            policies = [] if self._autopilot is None else self._autopilot.policies.values()
            warm_up([*self._encoder.codecs, *(codec for policy in policies for codec in policy.codecs)])
            if self._with_base and self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_DATA_CHAIN:
                answer_clients(fl_ctx)
        elif event_type == EventType.END_RUN and self._idle:
            self._idle = None
            where, tasks = points.place_of(self, fl_ctx)
            what = (
                f"ModelQuantizer in {where} has quantized nothing in this run: it is for {tasks}, and no message with "
                "weights came by; if there should have been one, compare that with the names of the workflow's tasks"
            )
            self.log_warning(fl_ctx, escaped(what), fire_event=False)
        elif event_type in _HANDED_OVER and self.error_feedback:
            task, aborted = fl_ctx.get_prop(FLContextKey.TASK_NAME), fl_ctx.get_run_abort_signal()
            if aborted is not None and aborted.triggered:
                self._encoder.residuals.drop_staged(task)
            else:
                self._encoder.residuals.commit(task, _state_folder(fl_ctx))

    def process_values(
        self, values: Mapping[str, Any], dxo: DXO, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[Mapping[str, Any], dict[str, Any]] | None:
        """Return codes in place of weights, or None (unchanged) if the DXO is quantized already.

        Raises:
            ConfigError: this side would not decode the codes that it gets, which is looked at once per task; or whole
                models for a type that is for differences.
        """
        self._idle = None
        values = _all_plain(values)
        point = FilterPoint.of(self, shareable, fl_ctx)
        place = point.chain, point.direction, point.task
        if not self.one_way and place not in self._checked:
            require_dequantizer(point, fl_ctx)
            self._checked.add(place)
        self._check_site(point, fl_ctx)
        if dxo.get_meta_prop(QUANTIZED_FLAG):
            self.log_info(fl_ctx, "The message is quantized already and stays as it is")
            return None
        if dxo.data_kind == DataKind.WEIGHTS:
            check_whole(self._policy, self._with_base)
        self._warn_of_feedback(dxo, fl_ctx)
        self._tell_of_meta(dxo, fl_ctx)
        chosen = self._choose(values, point, fl_ctx)
        root_id = shareable.get_header(ReservedHeaderKey.MSG_ROOT_ID) or ""
        message = self._encoder.encode(
            ModelMessage(
                values=values,
                whole=dxo.data_kind == DataKind.WEIGHTS,
                point=point,
                root_id=root_id,
                round=_round(root_id, shareable, fl_ctx),
                folder=_state_folder(fl_ctx),
                direct=_goes_directly(point.task, fl_ctx),
                policy=chosen,
            ),
            fl_ctx,
        )
        self._report(message, fl_ctx)
        return message.params.values, self._meta_for_new_dxo(dxo) | _metadata(message)

    def _choose(self, values: Mapping[str, Any], point: FilterPoint, fl_ctx: FLContext) -> Policy | None:
        """Return the policy with the type that the link allows; None where the type is given."""
        if self._autopilot is None:
            return None
        peer = point.peer if point.on_server else FQCN.ROOT_SERVER
        to = point.task, point.path, peer
        choice, news = self._autopilot.choose(values, to, fl_ctx.get_prop(RATES_PROP), point.count)
        if news:
            what = f"Messages of task '{point.task}' to {peer or 'the other side'} go in {choice.reason}"
            self.log_info(fl_ctx, escaped(what))
        return self._autopilot.policies[choice.quantization_type]

    def _check_site(self, point: FilterPoint, fl_ctx: FLContext) -> None:
        warning = require_decoding_site(point, fl_ctx)
        if warning and (point.peer, point.task) not in self._doubted:
            self._doubted.add((point.peer, point.task))
            self.log_warning(fl_ctx, escaped(warning), fire_event=False)

    def quantization(
        self, params: dict[str, Any], fl_ctx: FLContext
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, str]]:
        """Encode tensors apart from any message; the name and arguments are those of FLARE's filter.

        Residuals, bases and random rounding belong to messages, and have no part in this. `params` is not changed.

        Returns:
            Codes in place of the tensors, and FLARE's `quant_state` and `source_datatype`, by name.
        """
        values = _all_plain(flatten(params))
        encoded = encode_params(values, self._policy, TensorEncoder(self.max_relative_error))
        self._report(EncodedMessage(encoded), fl_ctx)
        return rebuild(params, encoded.values), encoded.quant_state, encoded.source_datatype

    def _warn_of_feedback(self, dxo: DXO, fl_ctx: FLContext) -> None:
        if self.error_feedback and not self._with_base and dxo.data_kind == DataKind.WEIGHTS and not self._warned:
            self._warned = True
            self.log_warning(
                fl_ctx,
                "error_feedback on whole WEIGHTS makes each round's model worse than without it: leave out "
                "delta=false, or error_feedback",
                fire_event=False,
            )

    def _tell_of_meta(self, dxo: DXO, fl_ctx: FLContext) -> None:
        """Say once what is not encoded: tensors in the metadata, such as SCAFFOLD's control variates."""
        sizes = {key: _tensor_bytes(value) for key, value in (dxo.meta or {}).items()}
        found = sorted(str(key) for key, size in sizes.items() if size)
        if found and not self._told_of_meta:
            self._told_of_meta = True
            size = sum(sizes.values()) / MIB
            what = f"{size:.2f} MB of tensors in the message's metadata ({', '.join(found)}) travel exact"
            self.log_warning(fl_ctx, escaped(f"{what}: only the model is quantized"), fire_event=False)

    def _report(self, message: EncodedMessage, fl_ctx: FLContext) -> None:
        encoded = message.params
        how = f", {message.based} params as the difference from {message.base}" if message.base else ""
        into = encoded.algorithm if encoded.codecs or encoded.marked else "nothing, as all of it travels exact"
        self.log_info(fl_ctx, escaped(f"Quantized to {into}{how}: {encoded.summary()}"))
        if what := encoded.exact_summary():
            self.log_warning(fl_ctx, escaped(what), fire_event=False)
        if what := self._replacements.news(encoded):
            self.log_info(fl_ctx, escaped(what))


def _all_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with plain tensors in place of those of a result that is sent on, as from site to site."""
    return {name: plain(value) for name, value in values.items()}


def _metadata(message: EncodedMessage) -> dict[str, Any]:
    """Return what the receiver needs to decode the message: FLARE's metadata, and what FLARE's filters don't know."""
    params = message.params
    meta: dict[str, Any] = {
        MetaKey.PROCESSED_ALGORITHM: params.algorithm,
        QUANT_STATE: dict(params.quant_state),
        SOURCE_DATATYPE: dict(params.source_datatype),
        QUANTIZED_FLAG: True,
    }
    ours = {
        "tied": dict(params.tied),
        "base": message.base,
        "leaves": message.leaves,
        "on_the_way": len(params.marked),
    }
    if any(ours.values()):
        meta[OURS] = {key: value for key, value in ours.items() if value}
    return meta


def _tensor_bytes(value: Any) -> int:
    """Return the bytes of all plain tensors in a value of the metadata, and of those that become plain when they are
    sent on."""
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    known = is_tensor(value) and (is_plain(value) or is_encoded_tensor(value))
    return int(value.nbytes) if known else 0


def _goes_directly(task: str, fl_ctx: FLContext) -> bool:
    """Return whether both sides have `nvflare_rdma.streaming.RdmaTransfer`, which takes care of what is marked, and
    FLARE doesn't take the tensors out of the message to stream them."""
    peer = fl_ctx.get_peer_context()
    both = fl_ctx.get_prop(TRANSFER_PROP) and peer is not None and peer.get_prop(TRANSFER_PROP)
    return bool(both) and not streams_tensors(fl_ctx, task)


def _round(root_id: str, shareable: Shareable, fl_ctx: FLContext) -> str:
    """Return what tells a round of this site and job from all others; outside of rounds, the message or task."""
    current = shareable.get_header(AppConstants.CURRENT_ROUND)
    if current is None:
        current = root_id or fl_ctx.get_prop(FLContextKey.TASK_ID, "")
    return f"{fl_ctx.get_job_id('')}\0{fl_ctx.get_identity_name()}\0{current}"


def _state_folder(fl_ctx: FLContext) -> str | None:
    """Return where residuals outlive the process: in the job's run folder. None outside a job."""
    job, engine = fl_ctx.get_job_id(), fl_ctx.get_engine()
    if not job or engine is None:
        return None
    return os.path.join(engine.get_workspace().get_run_dir(job), "nvflare_rdma")
