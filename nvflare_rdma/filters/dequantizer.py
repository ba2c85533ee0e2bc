"""ModelDequantizer: the receiving half of eager message quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.apis.dxo import DXO, MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.accumulate import is_encoded_tensor
from nvflare_rdma.codecs import is_tensor, was_decoded
from nvflare_rdma.errors import CodecError, ConfigError
from nvflare_rdma.filters.decoding import DecodedParams, Metadata, decode_params
from nvflare_rdma.filters.delta_base import Base, bases_of, tell_held
from nvflare_rdma.filters.expected import expected_of, sizes_of
from nvflare_rdma.filters.points import FilterPoint, tell_what_is_decoded
from nvflare_rdma.filters.quant_filter import (
    OURS,
    QUANT_META,
    QUANT_STATE,
    SOURCE_DATATYPE,
    QuantFilter,
    flatten,
    rebuild,
)
from nvflare_rdma.flare_compat import ACCUMULATE_PROP
from nvflare_rdma.logs import escaped


class ModelDequantizer(QuantFilter):
    """Restores weights that a ModelQuantizer, this package's or FLARE's, turned into codes.

    It can be put in place of `nvflare.app_opt.pt.quantization.dequantizer.ModelDequantizer`. dtype, shape
    and framework (numpy or torch) are those of the sender's tensors; torch tensors come back on the CPU. Tensors that
    were tied at the sender's share their memory here too.

    Args:
        clients: on the server, the sites whose results come in few bits; None: all. Those of others pass unchanged.

    Raises:
        ConfigError: the message carries no quantization metadata, so the sender has no quantizer.
        CodecError: the metadata or the codes are damaged, or the difference from a model that isn't here; the message
            names the tensor. Nothing larger than what the codes hold is allocated before they have been checked.
            Compressed codes, and constants at the server, may stand for as many values as are expected: those of the
            model that was sent to the site, of the base, or of the task's message before. A tensor of which that is not
            known may have 4096 values for each byte of its codes (at the server 64, or 4 if it knows of others), and
            all of them together 16 Mi. At a site larger constants are views of one value, which can only be read.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Tell the server that this site decodes, and learn at the server which model goes to a site."""
        if event_type == EventType.START_RUN:
            tell_what_is_decoded(fl_ctx)
        of_results = self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_RESULT_CHAIN
        if event_type == EventType.BEFORE_TASK_DATA_FILTER and of_results:
            peer = fl_ctx.get_peer_context()
            task, site = fl_ctx.get_prop(FLContextKey.TASK_NAME), peer.get_identity_name() if peer is not None else ""
            expected_of(fl_ctx).note_sent(task, site, fl_ctx.get_prop(FLContextKey.TASK_DATA))

    def process_values(
        self, values: Mapping[str, Any], dxo: DXO, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Return the decoded weights, and metadata that says nothing of quantization."""
        meta = self._meta_for_new_dxo(dxo)
        point = FilterPoint.of(self, shareable, fl_ctx)
        if QUANT_STATE not in meta:
            raise ConfigError(self._unquantized(point))
        ours = {} if meta.get(OURS) is None else meta[OURS]
        if not isinstance(ours, dict):
            raise CodecError(f"the message's {OURS} must be a dict but is a {type(ours).__name__}")
        decoded = decode_params(
            values,
            Metadata(
                algorithm=meta.get(MetaKey.PROCESSED_ALGORITHM),
                quant_state=meta[QUANT_STATE],
                source_datatype=meta.get(SOURCE_DATATYPE),
                tied=ours.get("tied"),
            ),
            self._base(ours.get("base"), point, fl_ctx),
            expected_of(fl_ctx).of(point.task, point.peer, point.path, point.count),
            strict=point.on_server,
            count=point.count,
            holdings=fl_ctx.get_prop(ACCUMULATE_PROP) if point.on_server else None,
        )
        on_the_way = _of_those_on_the_way(ours.get("on_the_way"), values)
        here = (
            decoded.summary()
            if decoded.arrays or decoded.views or decoded.kept or not on_the_way
            else "None were decoded here."
        )
        what = f"Dequantized from {meta.get(MetaKey.PROCESSED_ALGORITHM)}: {on_the_way}{here}"
        self.log_info(fl_ctx, escaped(what))
        if point.on_server:
            bases_of(fl_ctx).fulfil(point.stream, point.peer)
        else:
            sizes = sizes_of({name: value for name, value in decoded.values.items() if name not in decoded.views})
            expected_of(fl_ctx).note(point.task, point.peer, point.path, sizes)
            self._keep(decoded, ours.get("leaves"), point, fl_ctx)
        for key in QUANT_META:
            meta.pop(key, None)
        return decoded.values, meta

    def dequantization(
        self,
        params: dict[str, Any],
        quant_state: dict[str, Any],
        quantization_type: str,
        source_datatype: dict[str, Any],
        fl_ctx: FLContext,
    ) -> dict[str, Any]:
        """Decode what `ModelQuantizer.quantization` gave; the name and arguments are those of FLARE's filter.

        Raises:
            CodecError: see `process_values`. `params` is not changed.
        """
        decoded = decode_params(flatten(params), Metadata(quantization_type, quant_state, source_datatype))
        self.log_info(fl_ctx, escaped(f"Dequantized from {quantization_type}: {decoded.summary()}"))
        return rebuild(params, decoded.values)

    @staticmethod
    def _base(digest: Any, point: FilterPoint, fl_ctx: FLContext) -> Base | None:
        if digest is None:
            return None
        base = bases_of(fl_ctx).find(point.stream, digest, point.peer if point.on_server else "")
        if base is None:
            raise CodecError(
                f"{point.message} is the difference from a model with digest {digest!r} that isn't here; "
                "leave delta out of the sender's ModelQuantizer if this happens again"
            )
        return base

    def _keep(self, decoded: DecodedParams, leaves: Any, point: FilterPoint, fl_ctx: FLContext) -> None:
        """Keep what was received as the base of what is sent and received next, if the server does so too."""
        bases = bases_of(fl_ctx)
        if leaves is None and bases.current(point.stream) is None:
            return
        base = None
        if leaves is not None:
            shapes = {name: tuple(decoded.values[name].shape) for name in decoded.arrays}
            own = {name: array.copy() for name, array in decoded.arrays.items()}  # training changes its own
            base = Base.of(own, shapes)
            if not isinstance(leaves, str) or base.digest != leaves:
                what = f"{point.message} decoded to other bits than at the server; the next message will be whole"
                self.log_warning(fl_ctx, escaped(what))
                base = None
        bases.set(point.stream, base)
        tell_held(point.stream, base, fl_ctx)

    @staticmethod
    def _unquantized(point: FilterPoint) -> str:
        return (
            f"{point.message} came without quantization metadata, but {point.config} has ModelDequantizer in "
            f"{point.section}: add nvflare_rdma.filters.ModelQuantizer to {point.section} of {point.other_config}, "
            f"or remove ModelDequantizer from {point.section} of {point.config}"
        )


def _of_those_on_the_way(marked: Any, values: Mapping[str, Any]) -> str:
    """Return what the log says of tensors that the sender has left to the transfer: what came of them, as far as this
    side has seen it."""
    if type(marked) is not int:
        return ""
    came = sum(map(was_decoded, values.values()))
    if came:
        encoded = any(map(is_encoded_tensor, values.values()))
        what = "and stay encoded until they are added" if encoded else "and are decoded already"
        return f"{came} of {marked} params that were to be encoded on their way came so, {what}. "
    seen = any(map(is_tensor, values.values()))  # and not in files, where the transfer has decoded them
    known = ", but nothing here has decoded any of them" if seen else ""
    return f"{marked} params were to be encoded on their way{known}. "
