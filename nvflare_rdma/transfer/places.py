"""Where received tensors are stored: in memory of their own, encoded as they came, or in files."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from nvflare_rdma.codecs import is_storable, is_tensor, make_header, note_decoded
from nvflare_rdma.disk import write_at
from nvflare_rdma.transfer.arrays import from_bytes
from nvflare_rdma.transfer.encoding import decode_pieces
from nvflare_rdma.transfer.manifest import Item

Land: TypeAlias = "Callable[[Item], Place]"


class Place(ABC):
    """Where one tensor is stored. If `memory` is set, its bytes are received straight into it; otherwise they are
    passed to `write`."""

    memory: memoryview | None = None
    encoded = False
    """Whether the bytes of an encoded tensor are stored as they come, and `memory` is for those."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Store bytes of the tensor. Several threads call this at once, and perhaps with the same bytes twice.

        Raises:
            OSError: they can't be stored.
        """

    @abstractmethod
    def finish(self) -> Any:
        """Give what the receiver gets, when every byte is stored.

        Raises:
            ProtocolError: no tensor can be made of them. OSError: they can't be stored.
        """


class InMemory(Place):
    """Gives the tensor. `memory` is as large as the tensor, and used by nobody else."""

    def __init__(self, item: Item, memory: memoryview) -> None:
        self.memory: memoryview = memory
        self._item = item

    def write(self, offset: int, data: memoryview) -> None:
        """See `Place.write`."""
        self.memory[offset : offset + len(data)] = data

    def finish(self) -> Any:
        """See `Place.finish`."""
        return from_bytes(self._item, self.memory)


class EncodedInMemory(InMemory):
    """Keeps an encoded tensor as it comes, and gives what `make` makes of it. What has come is whole: its size follows
    from the tensor's, and all bytes of that size decode to something."""

    encoded = True

    def __init__(self, item: Item, memory: memoryview, make: Callable[[Item, memoryview], Any]) -> None:
        super().__init__(item, memory)
        self._make = make

    def finish(self) -> Any:
        """See `Place.finish`."""
        return self._make(self._item, self.memory)


def in_memory(allocate: Callable[[int], memoryview]) -> Land:
    """Store tensors in memory that `allocate` gives."""
    return lambda item: InMemory(item, allocate(item.nbytes))


class OnDisk(Place):
    """Gives the path of a safetensors file that has only this tensor, and the tensor's name in it.

    Raises:
        OSError: it can't be written; a full disk is seen before anything is, where the file system can tell.
    """

    def __init__(self, item: Item, path: str) -> None:
        self.path = path
        self._name = item.name
        header = make_header(item.name, item.dtype, item.shape, item.nbytes)
        self._start = len(header)
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._abandon = weakref.finalize(self, _abandon, os.getpid(), self._fd, path)
        os.pwrite(self._fd, header, 0)
        self._nbytes = item.nbytes
        self._allocating = threading.Lock()
        self._allocated = not item.nbytes

    @staticmethod
    def takes(item: Item) -> bool:
        """Whether a safetensors file can have the tensor."""
        return item.torch and is_storable(item.name, item.dtype, item.shape)

    def write(self, offset: int, data: memoryview) -> None:
        """See `Place.write`."""
        with self._allocating:  # when something comes, and not because a peer has announced it
            if not self._allocated:
                os.posix_fallocate(self._fd, self._start, self._nbytes)
                self._allocated = True
        write_at(self._fd, data, self._start + offset)

    def finish(self) -> Any:
        """See `Place.finish`."""
        if self._abandon.detach():
            os.close(self._fd)
        return self.path, self._name


def _abandon(process: int, fd: int, path: str) -> None:
    if process != os.getpid():
        return  # a forked process ends, and the file is its parent's
    os.close(fd)
    with contextlib.suppress(OSError):
        os.unlink(path)


def store_chunk(item: Item, place: Place, offset: int, chunk: memoryview) -> None:
    """Put bytes of an item's message where its tensor is stored, decoded if they are encoded and it is not.

    Raises:
        CodecError: damaged bytes, as far as the codec can see that. OSError: the place can't be written.
    """
    cut = item.cut
    if cut is None or place.encoded:
        place.write(offset, chunk)
        return
    for start, values in decode_pieces(cut, item.dtype, offset, chunk, place.memory):
        if place.memory is None:
            place.write(start, values)


def give(item: Item, place: Place) -> Any:
    """What the receiver gets of an item: what its place gives, noted as decoded if it came encoded.

    Raises:
        ProtocolError, OSError: see `Place.finish`.
    """
    given = place.finish()
    if item.cut is not None and is_tensor(given):
        note_decoded(given)
    return given
