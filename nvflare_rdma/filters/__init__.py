"""FLARE task filters that send models in few bits."""

from nvflare_rdma.filters.dequantizer import ModelDequantizer
from nvflare_rdma.filters.quantizer import ModelQuantizer

__all__ = ["ModelDequantizer", "ModelQuantizer"]
