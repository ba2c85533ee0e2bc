"""Encoded tensors for those who have not imported torch, and may never do so."""

from __future__ import annotations

import sys
from typing import Any

from nvflare_rdma.accumulate.encoded import Encoded
from nvflare_rdma.accumulate.holdings import Holdings

_MODULE = "nvflare_rdma.accumulate.torch_tensor"


def encoded_tensor(encoded: Encoded, shape: tuple[int, ...], holdings: Holdings) -> Any:
    """Return a torch tensor of `shape` that has these values, and stays encoded for as long as it can. `holdings`
    counts it."""
    from nvflare_rdma.accumulate.torch_tensor import EncodedTensor, State

    return EncodedTensor(State(encoded, shape, holdings))


def is_encoded_tensor(value: Any) -> bool:
    """Return whether `encoded_tensor` has made `value`, decoded meanwhile or not."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(value, module.EncodedTensor)


def plain(value: Any) -> Any:
    """Return the plain tensor that an encoded one stands for, always the same one; anything else as it is."""
    return value.decoded() if is_encoded_tensor(value) else value
