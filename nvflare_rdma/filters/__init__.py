"""FLARE task filters that send models in few bits, and a component that does so between sites."""

from __future__ import annotations

from nvflare_rdma.filters.dequantizer import ModelDequantizer
from nvflare_rdma.filters.options import with_needed
from nvflare_rdma.filters.peer_quantizer import PeerQuantizer
from nvflare_rdma.filters.points import tell_what_is_decoded
from nvflare_rdma.filters.quantizer import ModelQuantizer

__all__ = ["ModelDequantizer", "ModelQuantizer", "PeerQuantizer", "tell_what_is_decoded", "with_needed"]

# FLARE writes a class's path into exported job configs: make that the public one.
for _public in (ModelDequantizer, ModelQuantizer, PeerQuantizer):
    _public.__module__ = __name__
