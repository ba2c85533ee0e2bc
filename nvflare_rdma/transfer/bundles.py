"""The bytes of tensors that travel as they are, and of small tensors that travel together as one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nvflare_rdma.channel import Source, Take
from nvflare_rdma.codecs import is_torch, read_run
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.transfer.arrays import strided, to_bytes
from nvflare_rdma.transfer.encoding import EncodedChunkCache, PieceEncoder, SharedChunks
from nvflare_rdma.transfer.manifest import Item


class TensorSource(Source):
    """The bytes of a tensor. Each chunk is a copy if the tensor is on a GPU, or not contiguous."""

    def __init__(self, tensor: Any, nbytes: int) -> None:
        self.nbytes = nbytes
        self._tensor = tensor
        plain = tensor.is_contiguous() and tensor.is_cpu if is_torch(tensor) else tensor.flags.c_contiguous
        self.ready = bool(plain)
        self._bytes = to_bytes(tensor) if plain else None

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        if self._bytes is not None:
            return self._bytes[offset : offset + length]
        tensor = self._tensor
        if is_torch(tensor) and not tensor.is_cpu and not tensor.is_contiguous():
            tensor = self._tensor = tensor.detach().contiguous()  # on its device, once
        width = tensor.element_size() if is_torch(tensor) else tensor.itemsize
        first, last = offset // width, -(-(offset + length) // width)
        copy = take((last - first) * width)
        if is_torch(tensor) and not tensor.is_cpu:
            copy[:] = to_bytes(tensor.detach().reshape(-1)[first:last])
        else:
            array = strided(tensor)
            read_run(array, first, np.frombuffer(copy, array.dtype))
        return copy[offset - first * width :][:length]


class Bundle(SharedChunks):
    """Makes one chunk of several tensors for all their receivers. They must not change while they are sent.

    Args:
        tensors: those that the members of ``item`` describe.
        note_exact: called with the name of a member that its codec can't carry, and why.
    """

    def __init__(
        self,
        item: Item,
        tensors: Sequence[Any],
        cache: EncodedChunkCache,
        note_exact: Callable[[str, str], None],
    ) -> None:
        super().__init__(item.nbytes, cache)
        self.item = item
        self._tensors = list(tensors)
        self._note_exact = note_exact

    def _fill(self, offset: int, chunk: memoryview) -> None:
        assert offset == 0
        assert len(chunk) == self.nbytes, "a bundle is one unit"
        end, failure = 0, None
        for member, tensor in zip(self.item.members, self._tensors, strict=True):
            start, end = end, end + member.sent_nbytes
            if member.cut is None:
                source = TensorSource(tensor, member.nbytes)
                chunk[start:end] = source.read(0, member.nbytes, lambda nbytes: memoryview(bytearray(nbytes)))
                continue
            try:
                encoder = PieceEncoder(tensor, member.cut)
                encoder.fill(0, chunk[start:end])
                encoder.check()
            except UnrepresentableError as error:
                # The others are tried, too: a receiver asks again, but not for ever.
                self._note_exact(member.name, str(error))
                failure = failure or UnrepresentableError(f"{member.name}: {error}")
        if failure is not None:
            raise failure
