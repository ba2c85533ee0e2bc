"""Memory that a device may read and write: what a process may lock, and the cache of registered source buffers.

Registering pins pages (ib_umem_get in the kernel), which costs a system call and some microseconds per huge page. A
source that is sent again, to the next peer or in the next round, need not be registered again.

A cached registration refers to pages and not to an object: if the memory were freed and its address used again, the
device would read the old pages. So only buffers that say when they die (weakref(3)) stay in the cache, and they leave
it before their memory is given back.
"""

from __future__ import annotations

import resource
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nvflare_rdma.errors import FabricError
from nvflare_rdma.fabric.process_memory import address_of

#: Large buffers are registered in pieces of this size, so that a tensor larger than the limit can be sent from where
#: it is, and what is pinned for it stays bounded.
EXTENT_BYTES = 16 * 1024 * 1024
_MIB = 1024 * 1024
_CAP_IPC_LOCK = 14
#: For queues, and what other parts of a process lock.
_MEMLOCK_RESERVE = 2 * _MIB


def memlock_limit() -> int | None:
    """Bytes that this process may lock (RLIMIT_MEMLOCK); None if there is no limit for it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return None
    try:
        status = Path("/proc/self/status").read_text()
        capabilities = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    except (OSError, StopIteration, ValueError):
        capabilities = 0
    return None if capabilities >> _CAP_IPC_LOCK & 1 else soft


def memlock_reason(budget: int) -> str:
    """Why ``budget`` bytes (incoming, and as many outgoing) can't be registered by this process; "" if they can."""
    limit, needed = memlock_limit(), 2 * budget + _MEMLOCK_RESERVE
    if limit is None or limit >= needed:
        return ""
    fits = (limit - _MEMLOCK_RESERVE) // 2 // _MIB
    lower = f", or set rdma_memory_budget_bytes={fits * _MIB}" if fits >= 1 else ""
    return (
        f"this process may lock {limit / 1024:.0f} KiB of memory, RDMA needs {needed // 1024} KiB (twice "
        f"rdma_memory_budget_bytes, and some): run `ulimit -l unlimited` before it starts (systemd: "
        f"LimitMEMLOCK=infinity; docker: --ulimit memlock=-1; for good: `* - memlock unlimited` in "
        f"/etc/security/limits.conf){lower}"
    )


class Registration(Protocol):
    """A memory region that the device may read, in one protection domain."""

    @property
    def lkey(self) -> int: ...

    def close(self) -> None: ...


#: Registers ``nbytes`` at an address for local reads. Raises FabricError.
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
    """Registered source memory of all peers of a process, at most ``limit`` bytes of it.

    What was used least recently goes first. A peer of which nothing is in use always gets its turn, so that one whose
    link is slow does not stop the others.
    """

    def __init__(self, limit: int, extent_bytes: int = EXTENT_BYTES) -> None:
        self.limit = limit
        self.pinned = 0
        """Bytes that are registered, in use or not."""
        self.hits = self.misses = 0
        self._extent_bytes = extent_bytes
        self._room = threading.Condition()
        self._extents: dict[_Key, _Extent] = {}  # in the order of use
        self._busy: Counter[Hashable] = Counter()  # bytes in use of each protection domain
        self._watched: dict[int, int] = {}  # address of a living array -> its length
        #: Arrays that are going away. Appending is atomic: a finaliser may run inside anything.
        self._dying: deque[tuple[int, int]] = deque()

    def acquire(self, domain: Hashable, register: Register, source: memoryview, abandoned: Callable[[], bool]) -> Lease:
        """Register what ``source`` (not empty) shows, or find it registered. Blocks while the limit is reached by what
        is in use, but no longer than until ``abandoned``; see `wake`.

        Raises:
            FabricError: the kernel refuses (locked memory, a bad address), or it was abandoned.
        """
        lease = Lease(source)
        with self._room:
            self._bury()
            pieces, kept = self._pieces(source)
            keys = [(domain, address, length) for address, length in pieces]
            while not self._make_room(domain, keys):
                if abandoned():
                    raise FabricError("the rail broke while it waited for memory that it could register")
                self._room.wait(1.0)
                self._bury()
            try:
                for key in keys:
                    self._take(lease, key, kept, register)
            except BaseException:
                self._put_back(lease)
                raise
        start, end = address_of(source), address_of(source) + len(source)
        for address, length in pieces:
            first, last = max(start, address), min(end, address + length)
            lkey = self._extents[domain, address, length].registration.lkey
            lease.segments.append(Segment(first, last - first, lkey))
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
        """Deregister everything in a protection domain: nothing of it is in use any more."""
        with self._room:
            for key in [key for key in self._extents if key[0] == domain]:
                self._deregister(key)
            self._busy.pop(domain, None)
            self._room.notify_all()

    # -- under the lock ------------------------------------------------------------------------------------

    def _pieces(self, source: memoryview) -> tuple[list[tuple[int, int]], bool]:
        """(address, length) of what has to be registered for ``source``, and whether it may stay so."""
        start, end = address_of(source), address_of(source) + len(source)
        array = owner_of(source)
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            return [(start, len(source))], False  # it can't say when it dies
        base, size = int(array.__array_interface__["data"][0]), array.nbytes
        if self._watched.get(base) != size:
            weakref.finalize(array, self._dying.append, (base, size)).atexit = False
            self._watched[base] = size
        step = self._extent_bytes
        first = base + (start - base) // step * step
        return [(cut, min(step, base + size - cut)) for cut in range(first, end, step)], True

    def _make_room(self, domain: Hashable, keys: list[_Key]) -> bool:
        need = sum(key[2] for key in keys if key not in self._extents)
        if self.pinned + need > self.limit:
            for key in [key for key, extent in self._extents.items() if not extent.users and key not in keys]:
                self._deregister(key)
                if self.pinned + need <= self.limit:
                    break
        return self.pinned + need <= self.limit or not self._busy[domain]

    def _take(self, lease: Lease, key: _Key, kept: bool, register: Register) -> None:
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

    def _put_back(self, lease: Lease) -> None:
        for key in lease.keys:
            extent = self._extents[key]
            extent.users -= 1
            self._busy[key[0]] -= key[2]
            if not extent.users and not extent.kept:
                self._deregister(key)
        lease.keys.clear()

    def _deregister(self, key: _Key) -> None:
        self._extents.pop(key).registration.close()
        self.pinned -= key[2]

    def _bury(self) -> None:
        """Deregister what belonged to arrays that are gone. Their addresses may be in use again: call it first."""
        while self._dying:
            base, size = self._dying.popleft()
            self._watched.pop(base, None)
            for key in [key for key in self._extents if base <= key[1] < base + size]:
                # Another array may show the same memory, and be on its way.
                if self._extents[key].users:
                    self._extents[key].kept = False
                else:
                    self._deregister(key)
