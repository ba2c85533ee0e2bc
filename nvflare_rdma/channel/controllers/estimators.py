"""What an adaptive controller knows of its link, from grants and completions alone. Seconds and bytes; no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_MAX_SNAPSHOTS = 16 * 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """What one chunk tells. `rate` is the bytes/s at which data landed while it was in flight, None if that can't be
    said.

    `app_limited` says that the sender had too little to send, so that the rate says little of the link.
    """

    rate: float | None
    app_limited: bool
    round_ended: bool


@dataclass(slots=True)
class _Snapshot:
    delivered: int
    delivered_at: float
    first_granted_at: float
    granted: int
    app_limited: bool
    chunks: int = 0


@dataclass(slots=True)
class _Rail:
    granted: int = 0
    in_flight: int = 0
    newest: float = 0.0  # when the newest was granted that has landed
    newest_landed: int = 0  # bytes granted then that have landed
    passed: int = 0  # bytes granted before


class DeliveryRate:
    """Delivery-rate samples and rounds (draft-cheng-iccrg-delivery-rate-estimation), with chunks as packets.

    The interval of a sample is the longer of the times that granting and landing took, so that completions
    reported late and all at once do not look like a fast link. A round ends when a chunk lands that was granted
    after the last round's end.

    `overtaken`: bytes in flight that were granted before something that has landed over the same rail. They wait to be
    sent again, and the link is free for others meanwhile; as in TCP's estimate of its pipe (RFC 6675), they don't fill
    it. `passed` and `on_time`: of all bytes granted before the newest that has landed over their rail, those that
    did not wait. Rails overtake one another without any loss: nothing follows from that.
    """

    def __init__(self) -> None:
        self.delivered = 0
        self.in_flight = 0
        self.passed = 0
        self.on_time = 0
        self._delivered_at = 0.0
        self._first_granted_at = 0.0
        self._app_limited_until = 0
        self._round_until = 0
        self._rails: dict[int, _Rail] = {}
        self._snapshots: dict[tuple[int, float], _Snapshot] = {}  # by rail and time of granting

    def granted(self, length: int, now: float, rail: int = 0) -> None:
        """A chunk was granted over a rail."""
        if not self.in_flight:
            self._snapshots.clear()  # what was lost leaves its snapshot behind
            self._delivered_at = self._first_granted_at = now
        order = self._rails.get(rail)
        if order is None:
            order = self._rails[rail] = _Rail()
        if not order.in_flight:
            self._pass(order, order.granted, now)
        self.in_flight += length
        snapshot = self._snapshots.get((rail, now))
        if snapshot is None:
            limited = self.delivered < self._app_limited_until
            snapshot = _Snapshot(self.delivered, self._delivered_at, self._first_granted_at, order.granted, limited)
            self._snapshots[rail, now] = snapshot
            if len(self._snapshots) > _MAX_SNAPSHOTS:
                del self._snapshots[next(iter(self._snapshots))]
        snapshot.chunks += 1
        order.granted += length
        order.in_flight += length

    def _pass(self, order: _Rail, until: int, now: float) -> None:
        """Something granted over the rail at `now`, after `until` bytes, is the newest."""
        self.on_time += order.newest_landed
        self.passed += until - order.passed
        order.newest, order.newest_landed, order.passed = now, 0, until

    def landed(self, length: int, granted_at: float, now: float, rail: int = 0) -> Sample:
        """A chunk has landed; the sample that it gives."""
        snapshot = self.forgotten(length, granted_at, rail)
        self.delivered += length
        self._delivered_at = now
        if snapshot is None:
            return Sample(None, True, False)
        self._first_granted_at = max(self._first_granted_at, granted_at)
        round_ended = snapshot.delivered >= self._round_until
        if round_ended:
            self._round_until = self.delivered
        interval = max(now - snapshot.delivered_at, granted_at - snapshot.first_granted_at)
        rate = (self.delivered - snapshot.delivered) / interval if interval > 0 else None
        return Sample(rate, snapshot.app_limited, round_ended)

    def forgotten(self, length: int, granted_at: float, rail: int = 0) -> _Snapshot | None:
        """The grant of a chunk is over, in its turn; it may have brought nothing. Returns what was known when it was
        granted."""
        self.lost(length, rail)
        snapshot, order = self._snapshots.get((rail, granted_at)), self._rails.get(rail)
        if snapshot is None or order is None:
            return None
        snapshot.chunks -= 1
        if not snapshot.chunks:
            del self._snapshots[rail, granted_at]
        if granted_at > order.newest:
            self._pass(order, snapshot.granted, granted_at)
        if granted_at == order.newest:
            order.newest_landed += length
        return snapshot

    def lost(self, length: int, rail: int = 0) -> None:
        """A granted chunk will not land."""
        self.in_flight = max(self.in_flight - length, 0)
        if order := self._rails.get(rail):
            order.in_flight = max(order.in_flight - length, 0)

    @property
    def overtaken(self) -> int:
        """Bytes in flight that wait to be sent again, see the class."""
        return sum(max(rail.in_flight - (rail.granted - rail.passed), 0) for rail in self._rails.values())

    @property
    def in_order(self) -> bool:
        """Nothing was ever lost, and nothing came later than what was granted after it over the same rail."""
        return self.on_time >= self.passed

    def idle(self) -> None:
        """All that is granted from here until what is in flight has landed may be too little for the link."""
        self._app_limited_until = self.delivered + max(self.in_flight, 1)


class MaxFilter:
    """The largest value of the current and the last `rounds` rounds."""

    def __init__(self, rounds: int) -> None:
        self._rounds: deque[float] = deque([0.0], maxlen=rounds)
        self.value = 0.0

    def add(self, value: float) -> None:
        """Take a value of the current round."""
        self._rounds[-1] = max(self._rounds[-1], value)
        self.value = max(self.value, value)

    def next_round(self) -> None:
        """Begin a round; the oldest one is forgotten."""
        self._rounds.append(0.0)
        self.value = max(self._rounds)

    def forget(self, recent: int) -> None:
        """Keep the last `recent` rounds only."""
        for _ in range(len(self._rounds) - recent):
            self._rounds.popleft()
        self.value = max(self._rounds)


class LatencyFloor:
    """The least time from grant to landing, by size of the chunk (to a power of two): a large one takes longer."""

    def __init__(self) -> None:
        self._least: dict[int, float] = {}

    def add(self, length: int, latency: float) -> None:
        """Take the time that a chunk of `length` bytes took."""
        size = 1 << (length - 1).bit_length()
        self._least[size] = min(self._least.get(size, latency), latency)

    def get(self, length: int, bandwidth: float) -> float:
        """The floor for `length`, 0 if nothing is known.

        What other sizes say tells when a size was seen with a queue only: sizes differ by their time on the wire, and
        a smaller chunk's latency is at least its part of a larger one's. But a large chunk that must always be
        sent again in part may really take another round trip.
        """
        size = 1 << (length - 1).bit_length()
        others = min(
            (
                max(latency + (size - seen) / max(bandwidth, 1.0), latency * min(size / seen, 1.0))
                for seen, latency in self._least.items()
                if seen != size
            ),
            default=None,
        )
        if size not in self._least:
            return others or 0.0
        return min(self._least[size], 2 * others) if others is not None else self._least[size]

    def clear(self) -> None:
        """Forget everything."""
        self._least.clear()
