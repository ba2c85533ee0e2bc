"""ModelQuantizer: the sending half of eager message quantization."""

from nvflare.apis.dxo import DXO, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters.base import QUANT_STATE, QUANTIZED_FLAG, SOURCE_DATATYPE, QuantFilter
from nvflare_rdma.filters.encoding import encode_params
from nvflare_rdma.filters.points import FilterPoint, filters_at, is_dequantizer
from nvflare_rdma.filters.types import codec_of

_OURS = "nvflare_rdma.filters"


class ModelQuantizer(QuantFilter):
    """Sends model weights in few bits; drop-in for `nvflare.app_opt.pt.quantization.quantizer.ModelQuantizer`.

    Works on WEIGHTS and WEIGHT_DIFF DXOs, also inside COLLECTIONs, with numpy arrays and torch tensors, on a CPU.
    The metadata is FLARE's, so the receiver may have FLARE's own ModelDequantizer (for the types that it knows).
    What it was given is never changed. Tensors that the type can't carry travel exact: integers, booleans, float64,
    empty ones, those that would not get smaller, and, with a warning that names them, those with NaN or Inf
    (blockwise8, float4, normfloat4) or beyond the range (float16). Values that are not tensors pass through.

    Args:
        quantization_type: ``float16``, ``bfloat16``, ``blockwise8``, ``float4`` or ``normfloat4``, in any case.
        one_way: messages the other way intentionally travel unquantized. Without it a side that quantizes what it
            sends must also have a ModelDequantizer for what it receives of the same task.

    Raises:
        ConfigError: an unknown type; when used, a missing ModelDequantizer for the other direction.
    """

    def __init__(self, quantization_type: str = "float16", one_way: bool = False) -> None:
        codec = codec_of(quantization_type)
        super().__init__()
        # FLARE writes arguments into an exported job config from attributes of the same names.
        self.quantization_type = codec.name
        self.one_way = one_way
        self._codec = codec
        self._checked: set[FilterPoint] = set()

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
        encoded = encode_params(dxo.data, self._codec)
        self.log_info(fl_ctx, f"Quantized to {self.quantization_type}: {encoded.summary()}")
        if encoded.exact:
            listed = "; ".join(f"{name}: {reason}" for name, reason in encoded.exact.items())
            self.log_warning(fl_ctx, f"{len(encoded.exact)} tensor(s) sent exact: {listed}", fire_event=False)
        meta = self._meta_for_new_dxo(dxo)
        meta[MetaKey.PROCESSED_ALGORITHM] = self.quantization_type
        meta[QUANT_STATE] = encoded.quant_state
        meta[SOURCE_DATATYPE] = encoded.source_datatype
        meta[QUANTIZED_FLAG] = True
        return DXO(data_kind=dxo.data_kind, data=encoded.params, meta=meta)
