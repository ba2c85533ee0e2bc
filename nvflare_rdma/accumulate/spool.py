"""Files without a name, in which results wait that memory has no room for."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
import weakref
from collections import Counter
from typing import IO, Protocol

import numpy as np

from nvflare_rdma.disk import read_at, write_at


class Bytes(Protocol):
    """Bytes of one tensor, wherever they are. Any number of threads may read them at once."""

    def read(self, start: int, nbytes: int) -> memoryview:
        """Return `nbytes` from `start` on. They are the calling thread's until it reads again.

        Raises:
            OSError: the disk does not give them.
        """

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out` with what is from `start` on. Raises OSError."""


class InMemory:
    """Bytes in memory."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def read(self, start: int, nbytes: int) -> memoryview:
        """See `Bytes.read`."""
        return self._memory[start : start + nbytes]

    def read_into(self, start: int, out: memoryview) -> None:
        """See `Bytes.read_into`."""
        out[:] = self._memory[start : start + len(out)]


class DiskRoom:
    """Shares the disk among the results that wait there.

    All together take at most half of what would be free without them, as others write there, too; those of one site
    take at most half of that, so that no site leaves nothing for the others.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a spool may die in any allocation, also in one under the lock
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        with self._lock:
            return self._taken.total()

    def take(self, site: str, nbytes: int, free: int) -> None:
        """Take room for a site, where `free` bytes are free now.

        Raises:
            OSError: that is more than it may have.
        """
        with self._lock:
            taken = self._taken.total()
            most = (free + taken) // 2
            if taken + nbytes > most or self._taken[site] + nbytes > most // 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._taken[site] += nbytes

    def give_back(self, site: str, nbytes: int) -> None:
        """A site's results are gone."""
        with self._lock:
            self._taken[site] -= nbytes
            if not self._taken[site]:
                del self._taken[site]


class Spool:
    """A file for the tensors of one message. It has no name, so that it is gone when the last of its tensors is, or the
    process. It is made with the first tensor.

    Args:
        room: shares the disk.
        site: whose message it is.

    Attributes:
        folder: where it is: unless said otherwise where Python keeps temporary files (TMPDIR), as FLARE does.
    """

    def __init__(self, room: DiskRoom, site: str, folder: str | None = None) -> None:
        self._room = room
        self._site = site
        self.folder = tempfile.gettempdir() if folder is None else folder
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._end = 0

    def reserve(self, nbytes: int) -> InSpool:
        """Take room for a tensor.

        Raises:
            OSError: there is not that much, or the site may not have it.
        """
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - it lives as long as its tensors
                    prefix="nvflare_results_", dir=self.folder, buffering=0
                )
            fd = self._file.fileno()
            disk = os.fstatvfs(fd)
            self._room.take(self._site, nbytes, disk.f_bavail * disk.f_frsize)
            try:
                os.posix_fallocate(fd, self._end, nbytes)
            except OSError:
                os.ftruncate(fd, self._end)
                self._room.give_back(self._site, nbytes)
                raise
            weakref.finalize(self, self._room.give_back, self._site, nbytes).atexit = False
            start, self._end = self._end, self._end + nbytes
            return InSpool(self, fd, start)


class InSpool:
    """The bytes of one tensor in a `Spool`, which lives as long as they do."""

    def __init__(self, spool: Spool, fd: int, start: int) -> None:
        self._spool = spool
        self._fd = fd
        self._start = start

    def write(self, offset: int, data: memoryview) -> None:
        """Store bytes of the tensor. Raises OSError."""
        write_at(self._fd, data, self._start + offset)

    def map(self, nbytes: int) -> memoryview:
        """Map the first `nbytes` of what is at the beginning of its file: a view which takes memory where it is written
        to, which changes nothing on disk (mmap(2), MAP_PRIVATE). Raises OSError."""
        if self._start:
            raise OSError(errno.EINVAL, "only what is at the beginning of a file can be mapped")
        # The mapping has its own descriptor, and outlives this object's.
        mapped = mmap.mmap(self._fd, nbytes, access=mmap.ACCESS_COPY)
        weakref.finalize(mapped, _forget, self._spool).atexit = False
        return memoryview(mapped)

    def read(self, start: int, nbytes: int) -> memoryview:
        """See `Bytes.read`."""
        memory = _thread_memory.take(nbytes)
        self.read_into(start, memory)
        return memory

    def read_into(self, start: int, out: memoryview) -> None:
        """See `Bytes.read_into`."""
        if read_at(self._fd, out, self._start + start) < len(out):
            raise OSError(errno.EIO, "a result's file ends before the result does")


def _forget(spool: Spool) -> None:
    """The room of a spool is taken for as long as this is to be called with it."""


class _ThreadMemory(threading.local):
    """A thread's memory for what it reads, which it uses again and again: new pages take longer than the reading."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> memoryview:
        if self._memory.size < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].data


_thread_memory = _ThreadMemory()
