"""How many bytes all transfers of a process may hold at once, and who is next when they are short.

Whoever asks does so for a site: all links of one site together have one share, however many there are.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

_MIB = 1024 * 1024
#: A site keeps to half of the budget while another one has asked for some within so many seconds.
_NEIGHBOUR_SECONDS = 30.0
#: What a site holds beyond half of the budget is taken back when another one has waited for so many seconds.
HURRY_SECONDS = 5.0
#: So many requests of one site wait at once: each takes memory outside of the budget.
MAX_WAITING_OF_SITE = 4096


class _State(Enum):
    NEW = auto()
    WAITING = auto()
    HELD = auto()
    OVER = auto()


@dataclass(eq=False, slots=True)
class Reservation:
    """Bytes of a budget that `site` asks for.

    `granted` is called when it has them, from the thread of `request` or later from the one that releases some.
    `refused` is called with the reason when it has not got them by `deadline`. `revoked` is called with the reason when
    others need them: the holder is to release them, at once and by force.
    """

    budget: MemoryBudget
    nbytes: int
    site: str
    granted: Callable[[], None]
    refused: Callable[[str], None]
    revoked: Callable[[str], None]
    deadline: float = float("inf")
    state: _State = _State.NEW
    number: int = 0
    asked_at: float = 0.0
    taken: bool = False
    """Whether `revoked` was called."""

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

    Next is the site that holds the least (of equals, whose turn was longest ago, then who came first), so that one with
    many messages leaves the others their share. While others need memory, too, none has more than half, but for one
    request that is larger by itself: nobody is passed over because his request is large. What a site holds beyond half
    is taken back when another one waits for it. A request larger than the whole budget is admitted alone, as if it were
    the size of the budget: a message that has to be contiguous can't be received in less memory than it has, but there
    is never more than one.
    """

    def __init__(self, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"a memory budget needs a positive number of bytes, not {limit}")
        self.limit = limit
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        #: By site, as they came; no site without any. Any of them may go at any time.
        self._waiting: dict[str, OrderedDict[Reservation, None]] = {}
        self._holding: dict[str, list[Reservation]] = {}
        self._held: Counter[str] = Counter()
        #: Site -> the number of its last turn: it was served, or what it held was taken back.
        self._turns: dict[str, int] = {}
        #: Site -> when it asked last.
        self._asked: dict[str, float] = {}
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
            line = self._waiting.setdefault(reservation.site, OrderedDict())
            if full := len(line) >= MAX_WAITING_OF_SITE:
                reservation.state = _State.OVER
            else:
                self._line_up(reservation, line)
        if full:
            reservation.refused(
                f"{MAX_WAITING_OF_SITE} messages of {reservation.site} wait for memory already, which is the most for "
                "one site"
            )
        else:
            self._serve()

    def _line_up(self, reservation: Reservation, line: OrderedDict[Reservation, None]) -> None:
        reservation.nbytes = min(reservation.nbytes, self.limit)
        reservation.number = next(self._numbers)
        reservation.state = _State.WAITING
        reservation.asked_at = self._asked[reservation.site] = time.monotonic()
        line[reservation] = None

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation.state is _State.HELD:
                self._in_use -= reservation.nbytes
                self._held[reservation.site] -= reservation.nbytes
                self._holding[reservation.site].remove(reservation)
                if not self._holding[reservation.site]:
                    del self._held[reservation.site], self._holding[reservation.site]
            elif reservation.state is _State.WAITING:
                self._no_longer_waits(reservation)
            reservation.state = _State.OVER
        self._serve()

    def _no_longer_waits(self, reservation: Reservation) -> None:
        line = self._waiting[reservation.site]
        del line[reservation]
        if not line:
            del self._waiting[reservation.site]

    def expire(self, now: float) -> None:
        """Refuse the requests whose deadline has passed, and take back what others have waited for long enough."""
        with self._lock:
            self._asked = {site: at for site, at in self._asked.items() if now - at < _NEIGHBOUR_SECONDS}
            known = {*self._asked, *self._waiting, *self._held}
            self._turns = {site: turn for site, turn in self._turns.items() if site in known}
            taken, why = self._to_take_back(now)
            late = [r for line in self._waiting.values() for r in line if now > r.deadline]
            for reservation in late:
                reservation.state = _State.OVER
                self._no_longer_waits(reservation)
        for reservation in taken:
            reservation.revoked(why)
        for reservation in late:
            reservation.refused(
                f"no {reservation.nbytes / _MIB:.1f} MiB came free in time of the memory budget of "
                f"{self.limit / _MIB:.1f} MiB (rdma_memory_budget_bytes); held by {self.describe()}"
            )
        self._serve()  # also a site whose neighbours do not ask any more

    def _to_take_back(self, now: float) -> tuple[list[Reservation], str]:
        """The newest reservations of a site that holds more than half, if another one waits too long; and why."""
        for site in self._held:
            # What was taken back already is about to be released.
            mine = sorted((r for r in self._holding[site] if not r.taken), key=lambda r: r.number)
            held = sum(r.nbytes for r in mine)
            waiting = [next(iter(line)) for other, line in self._waiting.items() if other != site]
            if held <= self.limit // 2 or not any(now - first.asked_at > HURRY_SECONDS for first in waiting):
                continue
            taken: list[Reservation] = []
            while held > self.limit // 2:
                taken.append(mine.pop())
                taken[-1].taken = True
                self._turns[site] = next(self._numbers)
                held -= taken[-1].nbytes
            return taken, (
                f"{site} holds {self._held[site] / _MIB:.1f} MiB, more than half of the memory budget of "
                f"{self.limit / _MIB:.1f} MiB (rdma_memory_budget_bytes), for which another site has waited for more "
                f"than {HURRY_SECONDS:g} s"
            )
        return [], ""

    def describe(self) -> str:
        """Say who holds what, the largest first."""
        with self._lock:
            held = self._held.most_common(8)
        return ", ".join(f"{site}: {nbytes / _MIB:.1f} MiB" for site, nbytes in held) or "nobody"

    def _serve(self) -> None:
        while True:
            with self._lock:
                reservation = self._next()
                if reservation is None or self._in_use + reservation.nbytes > self.limit:
                    return
                self._no_longer_waits(reservation)
                reservation.state = _State.HELD
                self._held[reservation.site] += reservation.nbytes
                self._holding.setdefault(reservation.site, []).append(reservation)
                self._turns[reservation.site] = next(self._numbers)
                self._in_use += reservation.nbytes
                self._peak = max(self._peak, self._in_use)
                for watch in self._watching:
                    watch.peak = max(watch.peak, self._in_use)
            reservation.granted()

    def _next(self) -> Reservation | None:
        now = time.monotonic()
        near = {site for site, at in self._asked.items() if now - at < _NEIGHBOUR_SECONDS}
        firsts = [
            first
            for site, line in self._waiting.items()
            for first in itertools.islice(line, 1)
            if not (held := self._held.get(site, 0)) or held + first.nbytes <= self.limit // 2 or not near - {site}
        ]
        turns = self._turns
        return min(firsts, key=lambda r: (self._held.get(r.site, 0), turns.get(r.site, 0), r.number), default=None)
