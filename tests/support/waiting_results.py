"""Tensors as they are at a server that has no memory left for results: on disk, until somebody adds them."""

from __future__ import annotations

from typing import Any

from nvflare_rdma.accumulate import Holdings, Plain, Spool, encoded_tensor
from nvflare_rdma.codecs import FLOAT_NAMES, dtype_name, is_torch, to_flat


def on_disk(value: Any, holdings: Holdings | None = None) -> Any:
    """What a transfer makes of a torch tensor of floating-point numbers that came beyond the budget; all other values
    are as they were, as are those in a dict."""
    holdings = holdings or Holdings()
    if isinstance(value, dict):
        return {key: on_disk(each, holdings) for key, each in value.items()}
    if not is_torch(value) or dtype_name(value) not in FLOAT_NAMES:
        return value
    flat = to_flat(value)
    place = Spool(holdings.disk, "site-1").reserve(flat.nbytes)
    place.write(0, flat.view("u1").data)
    return encoded_tensor(Plain(flat.size, dtype_name(value), place), tuple(value.shape), holdings)
