"""How many bytes all transfers of a process may hold at once, and who is next when they are short."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

_MIB = 1024 * 1024


class _State(Enum):
    NEW = auto()
    WAITING = auto()
    HELD = auto()
    OVER = auto()


@dataclass(eq=False, slots=True)
class Reservation:
    """Bytes of a budget that `holder` (a connection, by name) asks for.

    `granted` is called when it has them, from the thread of `request` or later from the one that releases some.
    `refused` is called with the reason when it has not got them by `deadline`.
    """

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
        """Bytes that are held now."""
        return self._in_use

    @property
    def peak(self) -> int:
        """The most bytes that were held at once."""
        return self._peak

    def watch(self) -> Peak:
        """Watch what is held from now on, until nobody refers to the result."""
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
        """Say who holds what, the largest first."""
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
