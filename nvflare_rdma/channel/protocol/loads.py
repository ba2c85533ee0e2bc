"""Which rail a chunk is granted over: the one that will have delivered it soonest.

Rails of one link are not alike. A TCP connection that has lost packets is slow for a while, or says nothing until its
timer ends; what was granted over it then lands long after everything else. So each rail's pace is measured, and a chunk
goes where it is expected to land first (list scheduling by the earliest completion time).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: How much the newest chunk counts in a rail's pace, and in how often something lands over it.
_NEWEST = 0.25
#: An idle rail counts as no slower than this many times the mean, or one that was slow once would never be tried again.
_IDLE_PACE = 2.0
#: Seconds of idleness after which nothing is known of a rail any more: TCP begins anew, too (RFC 2861).
_FORGOTTEN = 1.0
#: A rail over which nothing has landed for so many times as long as usual is taken to be stuck.
_STUCK = 3.0


@dataclass(slots=True)
class _Load:
    nbytes: int = 0
    """Granted and not landed."""
    pace: float = 0.0
    """Seconds that a byte takes while the rail is busy; 0 as long as it is not known."""
    gap: float = 0.0
    """Seconds from one landing to the next, or from a grant to its landing on a rail that was idle."""
    since: float = 0.0
    """When something last landed, or when the rail was given something to do."""


class RailLoads:
    """The rails over which chunks are granted, with what is on its way over each."""

    def __init__(self) -> None:
        self._rails: dict[int, _Load] = {}

    def __len__(self) -> int:
        return len(self._rails)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rails)

    def open(self, rails: Iterable[int]) -> None:
        """Grant over these rails, of which nothing is known, and no others."""
        self._rails = {rail: _Load() for rail in rails}

    def add(self, rail: int) -> None:
        """Grant over one more rail."""
        self._rails[rail] = _Load()

    def remove(self, rail: int) -> None:
        """Grant nothing more over a rail."""
        self._rails.pop(rail, None)

    def granted(self, rail: int, nbytes: int, now: float) -> None:
        """A chunk was granted over a rail."""
        load = self._rails[rail]
        if not load.nbytes:
            if now - load.since > _FORGOTTEN:
                load.pace = load.gap = 0.0
            load.since = now
        load.nbytes += nbytes

    def ended(self, rail: int, nbytes: int) -> None:
        """A chunk is not on its way any more: it has landed, or will not."""
        if (load := self._rails.get(rail)) is not None:
            load.nbytes -= nbytes

    def landed(self, rail: int, nbytes: int, now: float) -> None:
        """A chunk has landed; `ended` was called for it."""
        if (load := self._rails.get(rail)) is not None:
            gap, load.since = max(now - load.since, 0.0), now
            load.pace = gap / nbytes if not load.pace else load.pace + _NEWEST * (gap / nbytes - load.pace)
            load.gap = gap if not load.gap else load.gap + _NEWEST * (gap - load.gap)

    def soonest(self, nbytes: int, now: float) -> int:
        """The rail over which a chunk is expected to land first. Where nothing is known, it is the one with the least
        on its way."""
        paces = [load.pace for load in self._rails.values() if load.pace]
        mean = sum(paces) / len(paces) if paces else 0.0
        # For a rail over which nothing has landed yet: one that has just joined is given the time of the slowest.
        usual = max(load.gap for load in self._rails.values())

        def order(rail: int) -> tuple[float, int, int]:
            load = self._rails[rail]
            if not load.nbytes:
                known = load.pace and now - load.since <= _FORGOTTEN
                pace = min(load.pace, _IDLE_PACE * mean) if known else mean
                return nbytes * pace, 0, rail
            silent = now - load.since
            gap = load.gap or usual
            stuck = silent if gap and silent > _STUCK * gap else 0.0
            return (load.nbytes + nbytes) * (load.pace or mean) + stuck, load.nbytes, rail

        return min(self._rails, key=order)
