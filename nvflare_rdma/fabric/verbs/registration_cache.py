"""The cache of registered source buffers: memory that a device may read.

Registering pins pages (ib_umem_get in the kernel), which costs a system call and some microseconds per huge page. A
source that is sent again, to the next peer or in the next round, need not be registered again.

A cached registration refers to pages and not to an object: if the memory were freed and its address used again, the
device would read the old pages. So only buffers that say when they die (weakref(3)) stay in the cache, and they leave
it before their memory is given back.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nvflare_rdma.errors import FabricError
from nvflare_rdma.fabric.shm import address_of

#: Large buffers are registered in pieces of at most this size, so that a tensor larger than the limit can be sent from
#: where it is, and what is pinned for it stays bounded.
EXTENT_BYTES = 16 * 1024 * 1024
_PAGE = 4096


class Registration(Protocol):
    """A memory region that the device may read, in one protection domain."""

    @property
    def lkey(self) -> int:
        """Its key, for local reads."""

    def close(self) -> None:
        """Deregister it."""


#: Registers `nbytes` at an address for local reads. Raises FabricError.
Register = Callable[[int, int], Registration]
_Key = tuple[Hashable, int, int]  # protection domain, address, length


@dataclass(frozen=True, slots=True)
class Segment:
    """Registered bytes of a source, as a work request names them."""

    address: int
    length: int
    lkey: int


@dataclass(eq=False, slots=True)
class _Extent:
    registration: Registration
    kept: bool
    """Whether it stays registered when nothing uses it."""
    users: int = 0


@dataclass(eq=False, slots=True)
class Lease:
    """Registered memory of one write. It keeps the source alive until `RegistrationCache.release`."""

    source: memoryview
    segments: list[Segment] = field(default_factory=list)
    keys: list[_Key] = field(default_factory=list)


def owner_of(source: memoryview) -> Any:
    """The object whose memory a view shows; of arrays the one at the bottom."""
    exporter: Any = source.obj
    while isinstance(exporter, np.ndarray) and isinstance(exporter.base, np.ndarray):
        exporter = exporter.base
    return exporter


class RegistrationCache:
    """Registered source memory of all peers of a process, about `limit` bytes of it.

    What was used least recently goes first. A peer of which nothing is in use always gets its turn, so that one whose
    link is slow does not stop the others: beyond the limit there may be what one write needs, for each peer.
    """

    def __init__(self, limit: int, extent_bytes: int = EXTENT_BYTES) -> None:
        self.limit = limit
        self.pinned = 0
        """Bytes that are registered, in use or not."""
        self.hits = self.misses = 0
        # A small limit is there because the process may lock no more: a piece must not be larger.
        self._extent_bytes = max(min(extent_bytes, limit // 4), _PAGE)
        self._room = threading.Condition()
        self._extents: dict[_Key, _Extent] = {}  # in the order of use
        self._busy: Counter[Hashable] = Counter()  # bytes in use of each protection domain
        self._watched: set[tuple[int, int]] = set()  # address and length of living arrays
        #: Arrays that are going away. Appending is atomic: a finaliser may run inside anything.
        self._dying: deque[tuple[int, int]] = deque()

    def acquire(self, domain: Hashable, register: Register, source: memoryview, abandoned: Callable[[], bool]) -> Lease:
        """Register what `source` (not empty) shows, or find it registered. Blocks while the limit is reached by what
        is in use, but no longer than until `abandoned`; see `wake`. Once it is abandoned nothing is registered, so
        nothing in a domain that was dropped after that.

        Raises:
            FabricError: the kernel refuses (locked memory, a bad address), or it was abandoned.
        """
        lease = Lease(source)
        start, end = address_of(source), address_of(source) + len(source)
        with self._room:
            while True:
                self._bury()
                if abandoned():
                    raise FabricError("the rail broke before it had registered what it was to send")
                pieces, kept = self._pieces(source, start, end)
                keys = [(domain, address, length) for address, length in pieces]
                if self._make_room(keys):
                    break
                if not self._busy[domain]:
                    # Its turn all the same. Many peers may come to that: no more than what is sent now.
                    keys, kept = [(domain, start, end - start)], False
                    self._make_room(keys)  # the pieces of before were left alone
                    break
                self._room.wait(1.0)
            try:
                for key in keys:
                    lkey = self._take(lease, key, kept, register)
                    first, last = max(start, key[1]), min(end, key[1] + key[2])
                    lease.segments.append(Segment(first, last - first, lkey))
            except BaseException:
                self._put_back(lease)
                raise
        return lease

    def release(self, lease: Lease) -> None:
        """The device does not read the lease's memory any more. Once per lease."""
        with self._room:
            self._put_back(lease)
            self._bury()
            self._room.notify_all()

    def wake(self) -> None:
        """Have those that wait in `acquire` look whether they are abandoned."""
        with self._room:
            self._room.notify_all()

    def drop(self, domain: Hashable) -> None:
        """Deregister everything in a protection domain: its device reads none of it any more. Leases may be left."""
        with self._room:
            for key in [key for key in self._extents if key[0] == domain]:
                self._deregister(key)
            self._busy.pop(domain, None)
            self._room.notify_all()

    # -- under the lock ------------------------------------------------------------------------------------

    def _pieces(self, source: memoryview, start: int, end: int) -> tuple[list[tuple[int, int]], bool]:
        """(address, length) of what has to be registered for `source`, and whether it may stay so."""
        array = owner_of(source)
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            return [(start, end - start)], False  # it can't say when it dies
        base, size = int(array.__array_interface__["data"][0]), array.nbytes
        if (base, size) not in self._watched:
            weakref.finalize(array, self._dying.append, (base, size)).atexit = False
            self._watched.add((base, size))
        step = self._extent_bytes
        first = base + (start - base) // step * step
        return [(cut, min(step, base + size - cut)) for cut in range(first, end, step)], True

    def _make_room(self, keys: list[_Key]) -> bool:
        return self._fits(sum(key[2] for key in keys if key not in self._extents), keys)

    def _fits(self, need: int, keys: Sequence[_Key] = ()) -> bool:
        """Whether `need` more bytes are within the limit, when enough of what is idle is gone (but not `keys`)."""
        if self.pinned + need > self.limit:
            for key in [key for key, extent in self._extents.items() if not extent.users and key not in keys]:
                self._deregister(key)
                if self.pinned + need <= self.limit:
                    break
        return self.pinned + need <= self.limit

    def _take(self, lease: Lease, key: _Key, kept: bool, register: Register) -> int:
        domain, address, length = key
        extent = self._extents.pop(key, None)
        if extent is None:
            self.misses += 1
            extent = _Extent(register(address, length), kept)
            self.pinned += length
        else:
            self.hits += 1
        self._extents[key] = extent  # the most recently used is the last
        extent.users += 1
        self._busy[domain] += length
        lease.keys.append(key)
        return extent.registration.lkey

    def _put_back(self, lease: Lease) -> None:
        for key in lease.keys:
            extent = self._extents.get(key)
            if extent is None:
                continue  # its domain was dropped
            extent.users -= 1
            self._busy[key[0]] -= key[2]
            if not extent.users and not extent.kept:
                self._deregister(key)
        lease.keys.clear()
        self._fits(0)  # it may have been registered beyond the limit

    def _deregister(self, key: _Key) -> None:
        self._extents.pop(key).registration.close()
        self.pinned -= key[2]

    def _bury(self) -> None:
        """Deregister what belonged to arrays that are gone. Their addresses may be in use again: call it first."""
        while self._dying:
            base, size = self._dying.popleft()
            self._watched.discard((base, size))
            for key in [key for key in self._extents if base <= key[1] < base + size]:
                # Another array may show the same memory, and be on its way.
                if self._extents[key].users:
                    self._extents[key].kept = False
                else:
                    self._deregister(key)
