"""The process's memory budget and its pool of re-used slots.

First-touch page faults cost several times the copy itself, so buffers that come and go with every message, or
with every round, are kept and handed out again while their pages are warm; big ones are asked for as huge pages.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
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
    """Bytes of a budget. ``granted`` is called when ``holder`` has them (from the thread of `request`, or later from
    the one that releases some); ``refused``, with the reason, when it has not by ``deadline``."""

    budget: MemoryBudget
    nbytes: int
    holder: str
    granted: Callable[[], None]
    refused: Callable[[str], None]
    deadline: float = float("inf")
    state: _State = _State.NEW

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
    """How many bytes all transfers of a process may hold at once; first come, first served.

    A request larger than the whole budget is admitted alone, as if it were the size of the budget: a message
    that has to be contiguous can't be received in less memory than it has, but there is never more than one.
    """

    def __init__(self, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"a memory budget needs a positive number of bytes, not {limit}")
        self.limit = limit
        self._lock = threading.Lock()
        self._waiting: deque[Reservation] = deque()
        self._holding: set[Reservation] = set()
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
            reservation.state = _State.WAITING
            self._waiting.append(reservation)
        self._serve()

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation.state is _State.HELD:
                self._holding.discard(reservation)
                self._in_use -= reservation.nbytes
            elif reservation.state is _State.WAITING:
                self._waiting.remove(reservation)
            reservation.state = _State.OVER
        self._serve()

    def expire(self, now: float) -> None:
        """Refuse the requests whose deadline has passed."""
        with self._lock:
            late = [reservation for reservation in self._waiting if now > reservation.deadline]
            for reservation in late:
                reservation.state = _State.OVER
                self._waiting.remove(reservation)
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
            held: Counter[str] = Counter()
            for reservation in self._holding:
                held[reservation.holder] += reservation.nbytes
        return ", ".join(f"{holder}: {nbytes / _MIB:.1f} MiB" for holder, nbytes in held.most_common(8)) or "nobody"

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._in_use + self._waiting[0].nbytes > self.limit:
                    return
                reservation = self._waiting.popleft()
                reservation.state = _State.HELD
                self._holding.add(reservation)
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
