"""Turns tensors into bytes, and bytes into tensors. torch is imported only when it is used."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nvflare_rdma.codecs import Array, is_torch
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import SlotPool
from nvflare_rdma.transfer.manifest import Item

_GRAIN = 64 * 1024


class TensorMemory(SlotPool):
    """Gives memory for received tensors, and takes it back when nobody holds the tensor any more.

    So the tensors of the next round are received where those of this one were, on warm pages. As much idle memory is
    kept as the largest message needed that has come, and no more: who receives from many does not keep memory for all
    of them.
    """

    def __init__(self) -> None:
        super().__init__(keep_bytes=0)
        self._lock = threading.Lock()

    def keep_for(self, sizes: Iterable[int]) -> None:
        """Keep enough idle memory for a message with tensors of these sizes."""
        self._keep_bytes = max(self._keep_bytes or 0, sum(map(self.cost, sizes)))

    def take(self, nbytes: int) -> memoryview:
        """Give memory for a tensor; small ones get memory that is not taken back. See `SlotPool.take`."""
        return super().take(nbytes) if nbytes >= _GRAIN else np.empty(nbytes, np.uint8).data

    def take_within(self, nbytes: int, limit: int) -> memoryview | None:
        """Give memory for a tensor if no more than `limit` bytes are out then, small tensors not counted; else None."""
        with self._lock:
            return None if self.used_bytes + self.cost(nbytes) > limit else self.take(nbytes)

    def cost(self, nbytes: int) -> int:
        """Bytes that a tensor takes. They are not rounded to huge pages, as slots are: a model has many tensors."""
        return -(-nbytes // _GRAIN) * _GRAIN


def raw_bytes(tensors: Mapping[str, Any]) -> int:
    """Count the bytes of tensors and arrays in memory. A sparse tensor counts as if it were dense."""
    sizes = (t.numel() * t.element_size() if is_torch(t) else getattr(t, "nbytes", 0) for t in tensors.values())
    return int(sum(sizes))


def to_bytes(tensor: Any) -> memoryview:
    """The tensor's values in C order: a view of its own memory if it is contiguous and on the CPU, otherwise a copy."""
    if is_torch(tensor):
        import torch

        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # Via a flat view: a tensor without dimensions has no other view of another width.
        array = plain.reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return memoryview(array)


def strided(tensor: Any) -> Array:
    """A numpy view of a tensor on the CPU, with its strides; where numpy lacks the dtype, of integers of its width."""
    if not is_torch(tensor):
        return np.asarray(tensor)
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg()
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(plain.element_size())
    view: Array = (plain if wide is None else plain.view(wide)).numpy()
    return view


def from_bytes(item: Item, memory: memoryview) -> Any:
    """Make the tensor whose values are in `memory`, which it shares.

    Raises:
        ProtocolError: this side's numpy or torch has no such tensors.
    """
    try:
        return _from_bytes(item, memory)
    except Exception as error:  # what they raise is of all sorts
        raise ProtocolError(f"{item.name} can't be made of {item.dtype} and {item.shape}: {error}") from error


def _from_bytes(item: Item, memory: memoryview) -> Any:
    if not item.torch:
        return np.frombuffer(memory, np.dtype(item.dtype)).reshape(item.shape)
    import torch

    dtype = getattr(torch, item.dtype)
    if not item.nbytes:
        return torch.empty(item.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).reshape(item.shape)
