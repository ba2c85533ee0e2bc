"""How fast messages go to each site, as the transfers of a run tell.

All figures are this side's own: its clock, and the bytes that it has sent or asked for. Nothing that a peer says about
itself counts.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nvflare_rdma.transfer import Ledger, TransferRecord, site_of

#: Smaller transfers tell of round trips more than of a rate: the link is as fast as they were, or faster.
_LEAST_BYTES = 256 * 1024
#: So many transfers of each direction count: the link of an hour ago may have been another one.
_KEPT = 3
_MOST_SITES = 4096
_MOST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Busy:
    """A time in which one or more transfers shared a link, from `begin` to `end`, and their bytes."""

    begin: float
    end: float
    nbytes: int

    @property
    def rate(self) -> float:
        return self.nbytes / self._seconds

    def joins(self, other: _Busy) -> bool:
        """Whether they count as one: they overlap, and the time that both take is no longer than `_MOST_SECONDS`, or
        not much more than either took. A chain of transfers would have no end else, and one rate for all of it."""
        both = self + other
        longest = max(_MOST_SECONDS, 1.5 * self._seconds, other._seconds)
        return self.begin < other.end and other.begin < self.end and both._seconds <= longest

    @property
    def _seconds(self) -> float:
        return self.end - self.begin

    def __add__(self, other: _Busy) -> _Busy:
        return _Busy(min(self.begin, other.begin), max(self.end, other.end), self.nbytes + other.nbytes)


class LinkRates:
    """Bytes a second to each site, as the transfers of the run tell whose cell is `cell`: the median of the last
    transfers to it or, while there is none, from it. Transfers of one direction that shared the link count as one. The
    very first one has opened the link, and began slowly: it counts only while there is no other in either direction.
    Where all of them were small, the link is said to be as fast as the fastest of the last ones."""

    def __init__(self, ledger: Ledger, cell: str) -> None:
        self._cell = cell
        self._lock = threading.Lock()
        self._opened: dict[str, tuple[str, _Busy]] = {}
        self._found: dict[tuple[str, str], deque[_Busy]] = {}
        self._small: dict[tuple[str, str], deque[_Busy]] = {}
        self.stop: Callable[[], None] = ledger.subscribe(self._ended)

    def to(self, site: str) -> float | None:
        """Bytes a second on the way to `site` ("" or "server" at a site: the server). None if that is not known."""
        directions = ("sent", site), ("received", site)
        with self._lock:
            for key in directions:
                if found := self._found.get(key):
                    return statistics.median(each.rate for each in found)
            if site in self._opened:
                return self._opened[site][1].rate
            for key in directions:
                if found := self._small.get(key):
                    return max(each.rate for each in found)
            return None

    def _ended(self, record: TransferRecord) -> None:
        if not record.is_of(self._cell) or record.failed or record.wire_bytes <= 0 or record.seconds <= 0:
            return
        site = site_of(record.peer)
        key = record.direction, site
        busy = _Busy(record.time - record.seconds, record.time, record.wire_bytes)
        with self._lock:
            if record.wire_bytes < _LEAST_BYTES:
                if key in self._small or len(self._small) < _MOST_SITES:
                    _add(self._small.setdefault(key, deque(maxlen=_KEPT)), busy)
                return
            if site not in self._opened:
                if len(self._opened) < _MOST_SITES:
                    self._opened[site] = record.direction, busy
                return
            found = self._found.setdefault(key, deque(maxlen=_KEPT))
            direction, first = self._opened[site]
            if not found and direction == record.direction and busy.joins(first):
                self._opened[site] = direction, first + busy
                return
            _add(found, busy)


def _add(found: deque[_Busy], busy: _Busy) -> None:
    """Add a time to the last ones; where it overlaps with some of them, as one."""
    while (shared := next((each for each in found if busy.joins(each)), None)) is not None:
        found.remove(shared)
        busy = shared + busy
    found.append(busy)
