"""The process's memory budget and its pool of re-used slots.

First-touch page faults cost several times the copy itself, so buffers that come and go with every message, or
with every round, are kept and handed out again while their pages are warm; big ones are asked for as huge pages.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import queue
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

_GRAIN = 64 * 1024
#: From here on memory is taken in whole huge pages (2 MiB where the kernel's pages have 4 KiB).
HUGE_PAGE_BYTES = 2 * 1024 * 1024
_MIB = 1024 * 1024


class _State(Enum):
    NEW = auto()
    WAITING = auto()
    HELD = auto()
    OVER = auto()


@dataclass(eq=False, slots=True)
class Reservation:
    """Bytes of a budget. ``granted`` is called when ``holder`` (a connection, by name) has them (from the thread of
    `request`, or later from the one that releases some); ``refused``, with the reason, when it has not by
    ``deadline``."""

    budget: MemoryBudget
    nbytes: int
    holder: str
    granted: Callable[[], None]
    refused: Callable[[str], None]
    deadline: float = float("inf")
    state: _State = _State.NEW
    number: int = 0

    def request(self) -> None:
        """Ask for the bytes. Does nothing if they were released already."""
        self.budget._request(self)

    def release(self) -> None:
        """Give the bytes back, or stop waiting for them. Idempotent."""
        self.budget._release(self)


class Peak:
    """The most bytes of a budget that were held at once since `MemoryBudget.watch`."""

    __slots__ = ("__weakref__", "peak")

    def __init__(self, peak: int) -> None:
        self.peak = peak


class MemoryBudget:
    """How many bytes all transfers of a process may hold at once.

    Next is who holds the least (of equals, who came first), so that one connection with many messages leaves the
    others their share. Nobody is passed over because his request is large. A request larger than the whole budget is
    admitted alone, as if it were the size of the budget: a message that has to be contiguous can't be received in less
    memory than it has, but there is never more than one.
    """

    def __init__(self, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"a memory budget needs a positive number of bytes, not {limit}")
        self.limit = limit
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        #: By holder, as they came; no holder without any.
        self._waiting: dict[str, deque[Reservation]] = {}
        self._held: Counter[str] = Counter()
        self._in_use = 0
        self._peak = 0
        self._watching: weakref.WeakSet[Peak] = weakref.WeakSet()

    @property
    def in_use(self) -> int:
        return self._in_use

    @property
    def peak(self) -> int:
        return self._peak

    def watch(self) -> Peak:
        """What is held from now on, until nobody refers to the result."""
        with self._lock:
            watch = Peak(self._in_use)
            self._watching.add(watch)
        return watch

    def _request(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation.state is not _State.NEW:
                return
            reservation.nbytes = min(reservation.nbytes, self.limit)
            reservation.number = next(self._numbers)
            reservation.state = _State.WAITING
            self._waiting.setdefault(reservation.holder, deque()).append(reservation)
        self._serve()

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation.state is _State.HELD:
                self._in_use -= reservation.nbytes
                self._held[reservation.holder] -= reservation.nbytes
                if not self._held[reservation.holder]:
                    del self._held[reservation.holder]
            elif reservation.state is _State.WAITING:
                self._no_longer_waits(reservation)
            reservation.state = _State.OVER
        self._serve()

    def _no_longer_waits(self, reservation: Reservation) -> None:
        line = self._waiting[reservation.holder]
        line.remove(reservation)
        if not line:
            del self._waiting[reservation.holder]

    def expire(self, now: float) -> None:
        """Refuse the requests whose deadline has passed."""
        with self._lock:
            late = [r for line in self._waiting.values() for r in line if now > r.deadline]
            for reservation in late:
                reservation.state = _State.OVER
                self._no_longer_waits(reservation)
        for reservation in late:
            reservation.refused(
                f"no {reservation.nbytes / _MIB:.1f} MiB came free in time of the memory budget of "
                f"{self.limit / _MIB:.1f} MiB (rdma_memory_budget_bytes); held by {self.describe()}"
            )
        if late:
            self._serve()

    def describe(self) -> str:
        """Who holds what, the largest first."""
        with self._lock:
            held = self._held.most_common(8)
        return ", ".join(f"{holder}: {nbytes / _MIB:.1f} MiB" for holder, nbytes in held) or "nobody"

    def _serve(self) -> None:
        while True:
            with self._lock:
                firsts = [line[0] for line in self._waiting.values()]
                if not firsts:
                    return
                reservation = min(firsts, key=lambda r: (self._held.get(r.holder, 0), r.number))
                if self._in_use + reservation.nbytes > self.limit:
                    return
                self._no_longer_waits(reservation)
                reservation.state = _State.HELD
                self._held[reservation.holder] += reservation.nbytes
                self._in_use += reservation.nbytes
                self._peak = max(self._peak, self._in_use)
                for watch in self._watching:
                    watch.peak = max(watch.peak, self._in_use)
            reservation.granted()


def anonymous_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Private memory of ``nbytes``, in huge pages where the kernel has some (madvise(2), MADV_HUGEPAGE).

    Raises:
        MemoryError: the kernel has not that much.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    except OSError as error:
        raise MemoryError(f"can't map {nbytes} bytes: {error}") from error
    if nbytes >= HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError, AttributeError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


def slot_bytes(nbytes: int) -> int:
    """What a slot for ``nbytes`` really holds: nearly equal sizes share slots, and large ones are whole huge pages."""
    grain = _GRAIN if nbytes <= HUGE_PAGE_BYTES else HUGE_PAGE_BYTES
    return max(-(-nbytes // grain), 1) * grain


class SlotPool:
    """Buffers that are recycled when the last view of them is gone.

    Sizes are rounded up to a grain, so that messages of nearly the same length share slots. What is idle stays within
    ``keep_bytes``; without that, idle and used together stay within what was in use at the busiest moment. What was
    of use least recently goes first. ``allocate`` makes new slots.
    """

    def __init__(
        self,
        keep_bytes: int | None = 64 * _MIB,
        allocate: Callable[[int], npt.NDArray[np.uint8]] = anonymous_pages,
    ) -> None:
        self._keep_bytes = keep_bytes
        self._allocate = allocate
        # Appending to a deque is atomic: `_release` may run inside any allocation of any thread.
        self._free: dict[int, deque[npt.NDArray[np.uint8]]] = {}
        self._last_use: dict[int, int] = {}
        self._takes = itertools.count()
        self._used: Counter[int] = Counter()  # slots of a size that are out; approximate, as no lock guards it
        self._busiest = 0

    def take(self, nbytes: int) -> memoryview:
        """A writable buffer of ``nbytes``. Its slot comes back when no view or slice of it is referenced.

        Raises:
            MemoryError: there is not that much.
        """
        size = self.cost(nbytes)
        self._last_use[size] = next(self._takes)
        free = self._free.setdefault(size, deque())
        try:
            slot = free.pop()
        except IndexError:
            if self._keep_bytes is None:
                self._drop_idle(max(self._busiest - self.used_bytes - size, 0))
            slot = self._allocate(size)
        self._used[size] += 1
        self._busiest = max(self._busiest, self.used_bytes)
        # The memoryview and every slice of it keep `lease` alive; `lease` keeps `slot` alive through `.base`.
        lease = slot[:nbytes]
        weakref.finalize(lease, self._release, slot).atexit = False
        return lease.data

    def cost(self, nbytes: int) -> int:
        """What `take` of ``nbytes`` really holds."""
        return slot_bytes(nbytes)

    @property
    def idle_bytes(self) -> int:
        return sum(size * len(free) for size, free in list(self._free.items()))

    @property
    def used_bytes(self) -> int:
        return sum(size * count for size, count in list(self._used.items()))

    def _release(self, slot: npt.NDArray[np.uint8]) -> None:
        self._used[slot.size] -= 1
        keep = self._busiest - self.used_bytes if self._keep_bytes is None else self._keep_bytes
        if slot.size > keep:
            return
        self._drop_idle(keep - slot.size, spare=slot.size)
        if self.idle_bytes + slot.size <= keep:
            self._free[slot.size].append(slot)

    def _drop_idle(self, keep: int, spare: int = 0) -> None:
        """Give idle slots back until ``keep`` bytes are left, but none of ``spare`` bytes."""
        while self.idle_bytes > keep:
            sizes = [size for size, free in list(self._free.items()) if free and size != spare]
            if not sizes:
                return
            with contextlib.suppress(IndexError):
                self._free[min(sizes, key=self._last_use.__getitem__)].popleft()

    def clear(self) -> None:
        """Give all idle slots back."""
        self._drop_idle(0)


class Allowance:
    """Bytes that may be out at once; who wants more waits, in the order of coming.

    What comes back may do so from anywhere, also from within a garbage collection: hence the queue, whose `put` needs
    no lock of this class.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._turn = threading.Lock()
        self._out = 0
        self._back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def take(self, nbytes: int) -> None:
        """Wait for ``nbytes``. More than the limit is admitted alone."""
        with self._turn:
            while self._out and (self._out + nbytes > self._limit or not self._back.empty()):
                self._out -= self._back.get()
            self._out += nbytes

    def give(self, nbytes: int) -> None:
        """They are not needed any more."""
        self._back.put(nbytes)


class SendMemory:
    """Slots of a pool for what has to be made before it is written (encoded, sealed, read from a file): as many as all
    connections together may have, and each of them at most a quarter of that. A slot counts until no view of it is
    left. It is apart from the `MemoryBudget` of what arrives, since two processes that send to each other would
    otherwise wait for each other's memory.
    """

    def __init__(self, pool: SlotPool, limit: int) -> None:
        self._pool = pool
        self._limit = limit
        self._allowance = Allowance(limit)

    def share(self) -> Callable[[int], memoryview]:
        """For one connection: gives writable slots of so many bytes. It may wait for others to be written."""
        own = Allowance(self._limit // 4)

        def take(nbytes: int) -> memoryview:
            cost = self._pool.cost(nbytes)
            own.take(cost)
            self._allowance.take(cost)
            try:
                slot = np.frombuffer(self._pool.take(nbytes), np.uint8)
            except MemoryError:
                self._allowance.give(cost)
                own.give(cost)
                raise
            weakref.finalize(slot, self._give, own, cost).atexit = False
            return slot.data

        return take

    def _give(self, own: Allowance, cost: int) -> None:
        self._allowance.give(cost)
        own.give(cost)
