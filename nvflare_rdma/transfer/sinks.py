"""Where received tensors land: in memory of their own, or in files."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from nvflare_rdma.channel import Sink
from nvflare_rdma.codecs.safetensors_header import SAFETENSORS_DTYPES
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES
from nvflare_rdma.transfer.arrays import from_bytes
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.pieces import Cut, decode

Land: TypeAlias = "Callable[[Item], Place]"


class Place(ABC):
    """Of one tensor. ``memory``: of all its bytes, for them to land in; None if they are to be given to `write`."""

    memory: memoryview | None = None

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Put those bytes there. By several threads at once, and perhaps the same bytes twice. Raises OSError."""

    @abstractmethod
    def finish(self) -> Any:
        """Everything is there: what the receiver is given. Raises ProtocolError, OSError."""


class InMemory(Place):
    """Gives the tensor. ``memory``: as large as the tensor, nobody else's."""

    def __init__(self, item: Item, memory: memoryview) -> None:
        self.memory: memoryview = memory
        self._item = item

    def write(self, offset: int, data: memoryview) -> None:
        self.memory[offset : offset + len(data)] = data

    def finish(self) -> Any:
        return from_bytes(self._item, self.memory)


def in_memory(allocate: Callable[[int], memoryview]) -> Land:
    """Places in memory that ``allocate`` gives."""
    return lambda item: InMemory(item, allocate(item.nbytes))


class OnDisk(Place):
    """Gives (path, name in it) of a safetensors file with this one tensor.

    Raises:
        OSError: it can't be written; a full disk is seen before anything is, where the file system can tell.
    """

    def __init__(self, item: Item, path: str) -> None:
        self.path = path
        self._name = item.name
        header = {
            item.name: {
                "dtype": SAFETENSORS_DTYPES[item.dtype],
                "shape": list(item.shape),
                "data_offsets": [0, item.nbytes],
            }
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._abandon = weakref.finalize(self, _abandon, self._fd, path)
        os.pwrite(self._fd, struct.pack("<Q", len(text)) + text, 0)
        self._nbytes = item.nbytes
        self._allocating = threading.Lock()
        self._allocated = not item.nbytes

    @staticmethod
    def takes(item: Item) -> bool:
        """Whether such files have tensors of its dtype."""
        return item.torch and item.dtype in SAFETENSORS_DTYPES and item.name != "__metadata__"

    def write(self, offset: int, data: memoryview) -> None:
        with self._allocating:  # when something comes, and not because somebody has said so
            if not self._allocated:
                os.posix_fallocate(self._fd, self._start, self._nbytes)
                self._allocated = True
        while data:
            done = os.pwrite(self._fd, data, self._start + offset)
            offset, data = offset + done, data[done:]

    def finish(self) -> Any:
        if self._abandon.detach():
            os.close(self._fd)
        return self.path, self._name


def _abandon(fd: int, path: str) -> None:
    os.close(fd)
    with contextlib.suppress(OSError):
        os.unlink(path)


class Landings:
    """What is still to come in one attempt, and what has come."""

    def __init__(self, numbers: set[int]) -> None:
        self.changed = threading.Condition()
        self.landed: dict[int, Place] = {}
        self.nbytes = 0
        self.open = numbers
        self.failure = ""
        """Why no more will come."""
        self.lost = ""
        """Why one of them did not come."""

    def fail(self, reason: str) -> None:
        """The first reason counts."""
        with self.changed:
            self.failure = self.failure or reason
            self.changed.notify_all()

    def came(self, number: int, place: Place, nbytes: int) -> None:
        """One is whole, of which ``nbytes`` were sent."""
        with self.changed:
            self.open.discard(number)
            self.landed[number] = place
            self.nbytes += nbytes
            self._tell_if_over()

    def lose(self, number: int, reason: str) -> None:
        """One will not come in this attempt."""
        with self.changed:
            self.open.discard(number)
            self.lost = self.lost or reason
            self._tell_if_over()

    def _tell_if_over(self) -> None:
        """And not of each: who waits takes this interpreter's time from those who receive."""
        if not self.open:
            self.changed.notify_all()


class TensorSink(Sink):
    """Lands one tensor: ``number`` in the manifest."""

    def __init__(self, number: int, item: Item, place: Place, landings: Landings) -> None:
        self._number = number
        self._item = item
        self._place = place
        self._landings = landings
        self._cut: Cut | None = item.cut
        self.nbytes = item.sent_nbytes
        self.unit = self._cut.unit if self._cut is not None else 1

    @property
    def buffer(self) -> memoryview | None:
        return self._place.memory if self._cut is None else None

    def put(self, offset: int, chunk: memoryview) -> None:
        cut, place = self._cut, self._place
        if cut is None:
            place.write(offset, chunk)
            return
        width = NUMPY_DTYPES[self._item.dtype].itemsize
        for first, last, part in cut.pieces(offset, len(chunk)):
            if place.memory is not None:
                out = place.memory[first * width : last * width]
                decode(cut, self._item.dtype, first, last, chunk[part], out)
            else:
                out = memoryview(own_memory(cut.values * width))[: (last - first) * width]
                decode(cut, self._item.dtype, first, last, chunk[part], out)
                place.write(first * width, out)

    def done(self) -> None:
        self._landings.came(self._number, self._place, self.nbytes)

    def failed(self, reason: str) -> None:
        self._landings.lose(self._number, reason)


class _Scratch(threading.local):
    memory = np.empty(0, np.uint8)


_scratch = _Scratch()


def own_memory(nbytes: int) -> Any:
    """The thread's memory for a piece before it is encoded, or when it is decoded. It has what was left there."""
    if _scratch.memory.size < nbytes:
        _scratch.memory = np.empty(nbytes, np.uint8)
    return _scratch.memory
