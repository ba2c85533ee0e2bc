"""The adaptive controller: a window from measured bandwidth and latency, a chunk size from bandwidth."""

from __future__ import annotations

from typing import ClassVar

from nvflare_rdma.channel.controllers.base import Controller
from nvflare_rdma.channel.controllers.estimators import DeliveryRate, LatencyFloor, MaxFilter

SMALLEST_BYTES = 64 * 1024
LARGEST_BYTES = 16 * 1024 * 1024
# Grants open at once that a sender and its NIC can be expected to hold; beyond, chunks get larger instead.
MAX_GRANTS = 256


class AdaptiveController(Controller):
    """Measures the link and fills it.

    The window follows BBR (Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016): a
    gain times the largest recent delivery rate times the least latency from grant to landing. A high gain at the
    start ends when the rate no longer grows, and rests while the sender has too little to send; now and then the
    window is made small for a moment to see the latency without queue (a probe). What differs, because chunks are
    paced and not packets: the latency is that of a whole chunk, by size; chunks that others have overtaken on their
    rail are waiting to be sent again, so they come on top of the window; and rounds both late and slow bring the
    probe forward, which tells a slower link from a longer one. If more than 2 % of a round (BBRv2's threshold) never
    lands, the gain is taken off the window.

    The chunk size stays what it was at the start as long as all arrives in order. What is overtaken on its rail, or
    never lands, was probably lost in part, and small chunks lose less: from then on the size follows from bandwidth
    alone, just large enough that the cost of each grant does not matter. That there is a best size on lossy links, that
    it grows with bandwidth, and that fast links want several in flight, is FedRDMA's finding (arXiv 2403.00881). More
    than `MAX_GRANTS` would be needed on a long fat link: chunks get larger instead.

    Over more than `FEW_RAILS` each has a small part of the link. Chunks are then small enough that each rail has
    `RAIL_CHUNKS` in the window, so that none idles for the round trip that its next grant takes, and the window is
    never so small that they have not. Nor is it much larger at the start: what is granted over a rail that turns out to
    be slow can't be had over another, and a message would end with few rails at work.
    """

    name: ClassVar[str] = "adaptive"

    #: BBR's 2/ln 2 takes five round trips from 8 MiB to the BDP of 100 Gbit/s and 200 ms; this takes three
    START_GAIN = 8.0
    GAIN = 1.5
    GROWTH = 1.25  # a round that brings less than this over the best before did not find more bandwidth
    FLAT_ROUNDS = 2  # of those end the start,
    LIMITED_ROUNDS = 2  # or, if the sender had too little to send, make it rest
    HEADROOM = 2  # times what was ever in flight: no sender with too little to send needs a larger window
    RATE_ROUNDS = 10  # that the bandwidth is the largest of, as in BBR
    OVERTAKEN = 2.0  # windows of overtaken chunks that are let come on top
    SCOUTS = 2  # smallest chunks at the start
    LOSSES = 4  # in a row: the chunks are too large to arrive; so many if ever one has,
    FIRST_LOSSES = 2  # or so many
    MAX_LOSS = 0.02
    BACKOFF = 0.7
    PROBE_SECONDS = 10.0  # between probes, as in BBR,
    PROBE_ROUNDS = 50  # and at least so many rounds; fewer when late and slow
    PROBE_CHUNKS = 4
    MAX_PROBE_PATIENCE = 640
    CHUNK_SECONDS = 0.025  # a chunk twice as long on the wire leaves too few completions to learn from
    SMALL_CHUNK_SECONDS = 50e-6  # what a grant may cost a sender
    FEW_RAILS, RAIL_CHUNKS = 2, 2
    MANY_START_GAIN = 3.0  # TCP itself finds no more than twice the rate in a round trip
    #: of the link, that a chunk takes at least where there are many rails: what a grant costs both sides in Python
    MANY_CHUNK_SECONDS = 0.002

    def __init__(self, chunk_bytes: int, depth: int, max_window_bytes: int) -> None:
        self._max_window = max_window_bytes
        # A few chunks in flight even in little memory: one at a time would leave the link idle between them.
        self._largest = min(LARGEST_BYTES, max(max_window_bytes // 4, min(SMALLEST_BYTES, max_window_bytes)))
        self._smallest = min(SMALLEST_BYTES, self._largest)
        chunk_bytes = min(max(chunk_bytes, self._smallest), self._largest)
        self._chunk = self._start_chunk = chunk_bytes
        self._window = self._start_window = min(max(chunk_bytes * depth, chunk_bytes), max_window_bytes)
        self._rate = DeliveryRate()
        self._bandwidth = MaxFilter(self.RATE_ROUNDS)
        self._floor = LatencyFloor()
        self._starting = True
        self._best_rate = 0.0
        self._flat_rounds = self._limited_rounds = 0
        self._most_in_flight = 0
        self._app_limited = True
        self._loss_cap: float | None = None
        self._probe: list[tuple[int, float]] | None = None
        self._probe_from: float | None = None
        self._probed_at: float | None = None
        self._rounds_since_probe = 0
        self._slow_rounds = 0
        self._probe_patience = self.RATE_ROUNDS
        self._losses_in_a_row = 0
        self._rails = 1
        # Should nothing of the start size get through, these tell after two round trips; the sender's NIC may take
        # eight to give up.
        self._scouting = depth > self.SCOUTS and chunk_bytes > self._smallest
        self._scouts = self.SCOUTS if self._scouting else 0
        self._new_round()

    def _new_round(self) -> None:
        self._round_landed = self._round_lost = 0
        self._round_least = float("inf")
        self._round_rate = 0.0

    @property
    def chunk_bytes(self) -> int:
        """See `Controller.chunk_bytes`."""
        return self._smallest if self._scouts else self._chunk

    @property
    def window_bytes(self) -> int:
        """See `Controller.window_bytes`."""
        return self._window

    def set_rails(self, count: int) -> None:
        """See `Controller.set_rails`."""
        self._rails = count
        self._resize()

    def granted(self, length: int, now: float, rail: int = 0) -> None:
        """See `Controller.granted`."""
        self._rate.granted(length, now, rail)
        self._most_in_flight = max(self._most_in_flight, self._rate.in_flight)
        self._scouts = max(self._scouts - 1, 0)

    def idle(self, now: float) -> None:
        """See `Controller.idle`."""
        self._rate.idle()

    def landed(self, length: int, granted_at: float, now: float, rail: int = 0) -> None:
        """See `Controller.landed`."""
        sample = self._rate.landed(length, granted_at, now, rail)
        self._app_limited = sample.app_limited
        latency = max(now - granted_at, 0.0)
        self._losses_in_a_row = 0
        if self._scouting:
            # Until one of the start size is in, or has been overtaken, each that lands is followed by another.
            self._scouting = length <= self._smallest and self._rate.in_order
            self._scouts += self._scouting
        if self._probed_at is None:
            self._probed_at = now
        if sample.rate is not None and (not sample.app_limited or sample.rate > self._bandwidth.value):
            self._bandwidth.add(sample.rate)
            self._round_rate = max(self._round_rate, sample.rate)
        self._floor.add(length, latency)
        if length >= self.chunk_bytes // 2:
            self._round_least = min(self._round_least, latency)
        self._round_landed += length
        if sample.round_ended:
            self._end_round(sample.app_limited, now)
        if self._probe is not None:
            self._probing(length, granted_at, latency, now)
        self._resize()

    def lost(self, length: int, now: float, rail: int = 0) -> None:
        """See `Controller.lost`."""
        self._rate.lost(length, rail)
        self._round_lost += length
        # What is lost at another size than the present one says nothing new, unless nothing has ever arrived.
        counts = length == self.chunk_bytes or not self._rate.delivered
        self._losses_in_a_row += counts
        self._resize()

    def forgotten(self, length: int, granted_at: float, now: float, rail: int = 0) -> None:
        """See `Controller.forgotten`."""
        self._rate.forgotten(length, granted_at, rail)
        self._resize()

    # -- rounds --------------------------------------------------------------------------------------------

    def _end_round(self, app_limited: bool, now: float) -> None:
        lost = self._round_lost / max(self._round_lost + self._round_landed, 1)
        if lost > self.MAX_LOSS:
            self._loss_cap = self.BACKOFF * self._window
        elif self._loss_cap is not None:
            self._loss_cap = self._loss_cap * self.GROWTH if self._loss_cap < self._max_window else None
        if self._probe is None:
            if self._starting:
                self._look_for_the_end_of_growth(app_limited)
            elif not app_limited:
                self._look_for_a_change(now)
            if not app_limited:
                self._bandwidth.next_round()
        self._new_round()

    def _look_for_the_end_of_growth(self, app_limited: bool) -> None:
        if self._bandwidth.value > self.GROWTH * self._best_rate:
            self._best_rate = self._bandwidth.value
            self._flat_rounds = self._limited_rounds = 0
        elif app_limited:
            self._limited_rounds += 1
        else:
            self._flat_rounds += 1
            self._starting = self._flat_rounds < self.FLAT_ROUNDS
            if not self._starting:
                self._probe, self._probe_from = [], None  # as BBR drains the queue that its start has built

    def _look_for_a_change(self, now: float) -> None:
        self._rounds_since_probe += 1
        floor = self._least_latency()
        # A queue makes chunks late, but it keeps the link full. Late and slow: the link has changed, or the floor is
        # not what it was.
        slow = self._round_least > 1.25 * floor and self._round_rate < 0.85 * self._bandwidth.value
        self._slow_rounds = self._slow_rounds + 1 if slow and self._round_least < float("inf") else 0
        assert self._probed_at is not None
        due = now - self._probed_at > self.PROBE_SECONDS and self._rounds_since_probe > self.PROBE_ROUNDS
        if due or (self._slow_rounds >= 2 and self._rounds_since_probe > self._probe_patience):
            self._probe, self._probe_from = [], None

    def _probing(self, length: int, granted_at: float, latency: float, now: float) -> None:
        """Wait until the window is drained to half a BDP, then take the latencies of what is granted from there on."""
        assert self._probe is not None
        if self._probe_from is None:
            if self._rate.in_flight - self._rate.overtaken <= self._probe_window():
                self._probe_from = now
        elif granted_at >= self._probe_from:
            self._probe.append((length, latency))
            if len(self._probe) >= self.PROBE_CHUNKS:
                before = self._floor.get(length, self._bandwidth.value)
                self._floor.clear()
                for sample in self._probe:
                    self._floor.add(*sample)
                floor = self._floor.get(length, self._bandwidth.value)
                if self._slow_rounds >= 2 and floor < 1.25 * before:
                    # The latency was a queue: the link is slower than the filter remembers. Or it was chance.
                    self._bandwidth.forget(2)
                    self._probe_patience = min(2 * self._probe_patience, self.MAX_PROBE_PATIENCE)
                else:
                    self._probe_patience = self.RATE_ROUNDS
                self._slow_rounds = self._rounds_since_probe = 0
                self._probed_at = now
                # Much less than before: half a BDP was meant, but it may still have been a queue. Look again.
                self._probe, self._probe_from = ([], None) if floor < 0.7 * before else (None, None)

    # -- sizes ---------------------------------------------------------------------------------------------

    def _least_latency(self) -> float:
        return self._floor.get(self.chunk_bytes, self._bandwidth.value)

    def _probe_window(self) -> float:
        # Some rails at work tell little of many.
        least = self.chunk_bytes * (self._rails if self._rails > self.FEW_RAILS else 1)
        return max(least, 0.5 * self._bandwidth.value * self._least_latency())

    def _chunk_size(self) -> int:
        """A power of two, once the bandwidth is known."""
        if self._rails <= self.FEW_RAILS:
            return self._link_chunk_size()
        bandwidth = self._bandwidth.value
        most = self.GAIN * bandwidth * self._floor.get(self._smallest, bandwidth)
        most = max(most / (self.RAIL_CHUNKS * self._rails), self.MANY_CHUNK_SECONDS * bandwidth)
        size = self._smallest
        while 2 * size <= min(most, self._largest):
            size *= 2
        return min(size, self._link_chunk_size())

    def _link_chunk_size(self) -> int:
        """That of a link whose rails are few."""
        bandwidth = self._bandwidth.value
        losses = self.LOSSES if self._rate.delivered else self.FIRST_LOSSES
        usual = self._rate.in_order and self._losses_in_a_row < losses
        if usual and not bandwidth:
            return self._chunk
        least = self.SMALL_CHUNK_SECONDS * bandwidth
        if usual:
            most = float("inf") if self._starting else self.CHUNK_SECONDS * bandwidth
            least = max(least, min(self._start_chunk, most))
        least = max(least, self.GAIN * bandwidth * self._floor.get(self._chunk, bandwidth) / MAX_GRANTS)
        size = self._smallest
        while size < least and 2 * size <= self._largest:
            size *= 2
        return size

    def _resize(self) -> None:
        self._chunk = self._chunk_size()
        chunk = self.chunk_bytes
        floor = self._least_latency()
        many = self._rails > self.FEW_RAILS
        if self._probe is not None:
            window = self._probe_window() + self._rate.overtaken
        else:
            growing = self._starting and self._limited_rounds < self.LIMITED_ROUNDS
            start_gain = self.MANY_START_GAIN if many else self.START_GAIN
            window = (start_gain if growing else self.GAIN) * self._bandwidth.value * floor
            if self._app_limited:
                window = min(window, self.HEADROOM * self._most_in_flight)
            if self._loss_cap is not None:
                window = min(window, max(self._loss_cap, self._bandwidth.value * floor))
            # Two more: one that waits for the wire while another is on it, and one whose grant is on its way.
            window += 2 * chunk
            window += min(self._rate.overtaken, self.OVERTAKEN * window)
            if many:
                window = max(window, self.RAIL_CHUNKS * chunk * self._rails)
            elif self._starting:
                window = max(window, self._start_window)
        self._window = int(min(max(window, chunk), self._max_window, MAX_GRANTS * chunk))
