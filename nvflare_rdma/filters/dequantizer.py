"""ModelDequantizer: the receiving half of eager message quantization."""

from nvflare.apis.dxo import DXO, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters.base import QUANT_META, QUANT_STATE, SOURCE_DATATYPE, QuantFilter
from nvflare_rdma.filters.decoding import decode_params
from nvflare_rdma.filters.points import FilterPoint


class ModelDequantizer(QuantFilter):
    """Restores weights that a ModelQuantizer (this package's or FLARE's) turned into codes; drop-in for
    `nvflare.app_opt.pt.quantization.dequantizer.ModelDequantizer`.

    dtype, shape and framework (numpy or torch) are those of the sender's tensors; torch tensors come back on the CPU.

    Raises:
        ConfigError: the message carries no quantization metadata, so the sender has no quantizer.
        CodecError: the metadata or the codes are damaged; the message names the tensor. Nothing larger than what
            the codes hold is allocated before they have been checked.
    """

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """A new DXO with the decoded weights and without the quantization metadata."""
        meta = self._meta_for_new_dxo(dxo)
        if QUANT_STATE not in meta:
            raise ConfigError(self._unquantized(FilterPoint.of(self, shareable, fl_ctx)))
        decoded = decode_params(
            dxo.data, meta.get(MetaKey.PROCESSED_ALGORITHM), meta[QUANT_STATE], meta.get(SOURCE_DATATYPE)
        )
        self.log_info(fl_ctx, f"Dequantized from {meta.get(MetaKey.PROCESSED_ALGORITHM)}: {decoded.summary()}")
        for key in QUANT_META:
            meta.pop(key, None)
        return DXO(data_kind=dxo.data_kind, data=decoded.params, meta=meta)

    @staticmethod
    def _unquantized(point: FilterPoint) -> str:
        return (
            f"{point.message} came without quantization metadata, but {point.config} has ModelDequantizer in "
            f"{point.section}: add nvflare_rdma.filters.ModelQuantizer to {point.section} of {point.other_config}, "
            f"or remove ModelDequantizer from {point.section} of {point.config}"
        )
