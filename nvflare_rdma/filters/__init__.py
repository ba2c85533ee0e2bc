"""FLARE task filters that send models in few bits, and a component that does so between sites."""

from __future__ import annotations

from nvflare_rdma.filters.autopilot import Autopilot, choose_type
from nvflare_rdma.filters.dequantizer import ModelDequantizer
from nvflare_rdma.filters.options import autopilot_of, with_needed
from nvflare_rdma.filters.peer_quantizer import PeerQuantizer
from nvflare_rdma.filters.points import tell_what_is_decoded
from nvflare_rdma.filters.quantizer import ModelQuantizer

__all__ = [
    "Autopilot",
    "ModelDequantizer",
    "ModelQuantizer",
    "PeerQuantizer",
    "autopilot_of",
    "choose_type",
    "tell_what_is_decoded",
    "with_needed",
]

# FLARE writes a class's path into exported job configs: make that the public one.
for _public in (ModelDequantizer, ModelQuantizer, PeerQuantizer):
    _public.__module__ = __name__
