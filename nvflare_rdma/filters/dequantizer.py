"""ModelDequantizer: the receiving half of eager message quantization."""

from __future__ import annotations

from typing import Any

from nvflare.apis.dxo import DXO, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.codecs import Array
from nvflare_rdma.errors import CodecError, ConfigError
from nvflare_rdma.filters.decoding import Metadata, decode_params
from nvflare_rdma.filters.delta_base import Base, bases_of, tell_held
from nvflare_rdma.filters.flat_params import flatten, rebuild
from nvflare_rdma.filters.points import FilterPoint
from nvflare_rdma.filters.quant_filter import OURS, QUANT_META, QUANT_STATE, SOURCE_DATATYPE, QuantFilter


class ModelDequantizer(QuantFilter):
    """Restores weights that a ModelQuantizer, this package's or FLARE's, turned into codes.

    It can be put in place of `nvflare.app_opt.pt.quantization.dequantizer.ModelDequantizer`. dtype, shape
    and framework (numpy or torch) are those of the sender's tensors; torch tensors come back on the CPU. Tensors that
    were tied at the sender's share their memory here too.

    Raises:
        ConfigError: the message carries no quantization metadata, so the sender has no quantizer.
        CodecError: the metadata or the codes are damaged, or the difference from a model that isn't here; the message
            names the tensor. Nothing larger than what the codes hold is allocated before they have been checked;
            constants and compressed codes may stand for 4096 values per byte of the message, and 16 Mi more.
    """

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Return a new DXO with the decoded weights and without the quantization metadata."""
        meta = self._meta_for_new_dxo(dxo)
        point = FilterPoint.of(self, shareable, fl_ctx)
        if QUANT_STATE not in meta:
            raise ConfigError(self._unquantized(point))
        ours = {} if meta.get(OURS) is None else meta[OURS]
        if not isinstance(ours, dict):
            raise CodecError(f"the message's {OURS} must be a dict but is a {type(ours).__name__}")
        decoded = decode_params(
            flatten(dxo.data),
            Metadata(
                algorithm=meta.get(MetaKey.PROCESSED_ALGORITHM),
                quant_state=meta[QUANT_STATE],
                source_datatype=meta.get(SOURCE_DATATYPE),
                tied=ours.get("tied"),
            ),
            self._base(ours.get("base"), point, fl_ctx),
        )
        on_the_way = ours.get("on_the_way")
        done = f"{on_the_way} params were sent encoded and are decoded already. " if type(on_the_way) is int else ""
        here = decoded.summary() if decoded.arrays or not done else "None were left to decode here."
        self.log_info(fl_ctx, f"Dequantized from {meta.get(MetaKey.PROCESSED_ALGORITHM)}: {done}{here}")
        if point.on_server:
            bases_of(fl_ctx).fulfil(point.stream, point.peer)
        else:
            self._keep(decoded.arrays, ours.get("leaves"), point, fl_ctx)
        for key in QUANT_META:
            meta.pop(key, None)
        return DXO(data_kind=dxo.data_kind, data=rebuild(dxo.data, decoded.values), meta=meta)

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

    def _keep(self, arrays: dict[str, Array], leaves: Any, point: FilterPoint, fl_ctx: FLContext) -> None:
        """Keep what was received as the base of what is sent and received next, if the server does so too."""
        bases = bases_of(fl_ctx)
        if leaves is None and bases.current(point.stream) is None:
            return
        base = None
        if leaves is not None:
            base = Base.of({name: array.copy() for name, array in arrays.items()})  # training changes its own
            if not isinstance(leaves, str) or base.digest != leaves:
                self.log_warning(
                    fl_ctx, f"{point.message} decoded to other bits than at the server; the next message will be whole"
                )
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
