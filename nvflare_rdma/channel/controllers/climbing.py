"""The search for the chunk size: climb towards more goodput, one factor of two at a time."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_TRIED_BYTES = 64 * 1024
LARGEST_TRIED_BYTES = 16 * 1024 * 1024

_CHUNKS = 32  # landed chunks that an epoch needs, so that one more lost or late does not decide
_ROUNDS = 2
_SETTLE_ROUNDS = 8
_RAMP_ROUNDS = 3  # at a new size, until those of its chunks that are sent again land as steadily as the others
_GAIN = 1.05  # by how much a size must be better to be taken
_CLEAR_GAIN = 1.25  # the same for chunks smaller than usual,
_RARE_PATIENCE = 16  # which are tried only when the waits have become as long as this
_STEADY = 1.25  # two epochs differ by less: the rate is no longer on its way somewhere
_MAX_PATIENCE = 64
_SUSPECT_PATIENCE = 4
_RISKY_PATIENCE = 4


@dataclass(frozen=True, slots=True)
class Search:
    """Where to look for a better size, and how boldly.

    Sizes are tried from `least` to `most` bytes. Those under `useful` can't do as well as the present one, as the
    number of chunks in flight is bounded. Those under `usual` cost more requests, and there is no sign that they are
    better. `risky` says that larger chunks may well fail.
    """

    least: int
    most: int
    useful: float
    usual: int
    risky: bool


class ChunkClimber:
    """Hill climbing on goodput.

    An epoch measures the goodput of one size. Now and then the next smaller or larger size gets an epoch; it is
    kept, and the next step in its direction tried at once, if goodput rose. When neither direction brings more, the
    waits between trials double, so that a steady link pays little for the search. What made large chunks slow
    (writes that start over after a lost packet) or small ones (cost of each request) does not matter here.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self.size = chunk_bytes
        self._in_flight_before = 0
        self._changed_at = float("-inf")
        self._step = -1
        self._trial_of: int | None = None
        self.baseline = 0.0
        self._failed = 0
        self._patience = self._wait = 1
        self._suspect_patience = _SUSPECT_PATIENCE
        self._suspect_wait = 0
        self._settling = 0
        self.interrupt()

    def interrupt(self) -> None:
        """What is being measured says nothing of the link (too little to send, or a probe): begin the epoch anew."""
        self._began: float | None = None
        self._bytes = self._chunks = self._rounds = 0

    def _change(self, size: int, in_flight: int, now: float) -> None:
        self.size = size
        self._in_flight_before = in_flight
        self._changed_at = now
        self._settling = _SETTLE_ROUNDS
        self.interrupt()

    def suspect(self, steps: int, at_once: bool, least: int, most: int, in_flight: int, now: float) -> None:
        """There is a sign that chunks `steps` times halved do better: try that soon, or take it `at_once`."""
        size = min(max(self.size >> steps, least), most)
        if size >= self.size or self._trial_of is not None:
            return
        if at_once:
            self._change(size, in_flight, now)
            self.baseline = 0.0
            self._step = 1
        elif self.baseline and self._suspect_wait <= 0:
            self._trial_of = self.size
            self._suspect_wait = self._suspect_patience = min(self._suspect_patience * 2, _MAX_PATIENCE)
            self._step = -1
            self._change(size, in_flight, now)

    def halve(self, in_flight: int, now: float) -> None:
        """Chunks do not arrive at all: end the trial that brought this, or take half the size without one."""
        if self._trial_of is not None and self._trial_of < self.size:
            size, self._trial_of = self._trial_of, None
            self._turn()
            self._change(size, in_flight, now)
        elif self.size > SMALLEST_TRIED_BYTES:
            self._trial_of = None
            self._step, self._wait = 1, 2
            self.baseline = 0.0
            self._change(max(self.size // 2, SMALLEST_TRIED_BYTES), in_flight, now)

    def try_larger(self) -> None:
        """More chunks than can be in flight would be needed: larger ones may do."""
        if self._trial_of is None and self._patience == 1:
            self._step, self._wait = 1, 1

    def keep_within(self, least: int, most: int, in_flight: int, now: float) -> bool:
        """Take the nearest size of those allowed; whether that is another than before."""
        if least <= self.size <= most:
            return False
        self._trial_of = None
        self.baseline = 0.0
        self._change(min(max(self.size, least), most), in_flight, now)
        return True

    def landed(
        self, length: int, granted_at: float, now: float, round_ended: bool, in_flight: int, search: Search
    ) -> None:
        """Count a chunk that has landed, and go on to another size when an epoch is over."""
        if self.keep_within(search.least, search.most, in_flight, now):
            return
        if granted_at < self._changed_at:
            self._in_flight_before -= length
            return
        if self._began is None:
            # Chunks of the size before, some still being sent again, would say little of this size.
            self._settling -= round_ended
            ramped = self._settling <= _SETTLE_ROUNDS - _RAMP_ROUNDS
            if (ramped and self._in_flight_before <= in_flight // 8) or self._settling <= 0:
                self._began = now
            return
        self._bytes += length
        self._chunks += 1
        self._rounds += round_ended
        if self._chunks >= _CHUNKS and self._rounds >= _ROUNDS and now > self._began:
            goodput = self._bytes / (now - self._began)
            self.interrupt()
            size = self._next_size(goodput, search)
            if size != self.size:
                self._change(size, in_flight, now)

    def _next_size(self, goodput: float, search: Search) -> int:
        """The size for the next epoch, after one that brought `goodput`."""
        self._suspect_wait -= 1
        if self._trial_of is not None:
            before, self._trial_of = self._trial_of, None
            if goodput <= (_CLEAR_GAIN if self.size < min(before, search.usual) else _GAIN) * self.baseline:
                self._turn()
                return before
            self._failed = 0
            self._patience = self._wait = 1
            self._suspect_patience = _SUSPECT_PATIENCE
            self.baseline = goodput
        else:
            steady = self.baseline / _STEADY < goodput < self.baseline * _STEADY
            self.baseline = goodput
            if not steady:
                return self.size
            self._wait -= 1
            if self._wait > 0:
                return self.size
            if search.risky and self._step > 0 and self._patience < _RISKY_PATIENCE:
                self._patience = self._wait = _RISKY_PATIENCE
                return self.size
        size = self.size * 2 if self._step > 0 else self.size // 2
        rare = size < min(self.size, search.usual) and self._patience < _RARE_PATIENCE
        if not rare and (search.least if self._step > 0 else max(search.least, search.useful)) <= size <= search.most:
            self._trial_of = self.size
            return size
        self._turn()
        return self.size

    def _turn(self) -> None:
        self._step = -self._step
        self._failed += 1
        if self._failed >= 2:
            self._failed = 0
            self._patience = min(self._patience * 2, _MAX_PATIENCE)
        self._wait = self._patience
