"""Moves tensors and files between peers, over links of `nvflare_rdma.channel`. Knows nothing of FLARE."""
