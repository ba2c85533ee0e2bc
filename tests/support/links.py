"""A deterministic simulation of receiver-driven chunk transfers over long, lossy or fast links.

Discrete events, one or two per chunk, in simulated seconds: a grant reaches the sender after half an RTT, costs
``overhead`` of one CPU there, and the chunk then goes through the link, first come, first served, at ``bandwidth``
bytes/s; it lands half an RTT later. What a lost packet costs is the model's matter:

`TCP` (``rails`` in-order connections): slow start from 10 segments (RFC 6928), doubling each RTT while there is
    something to send, up to the smaller of its share of BDP + queue (1 BDP, at least 64 KiB), where a drop cuts it to
    0.7, and the mean window under random loss p: the larger of Reno's sqrt(3/2)/sqrt(p) segments (Mathis et al.
    1997) and CUBIC's 1.054 (RTT/p)^0.75 (RFC 9438). A chunk that loses a packet waits one RTT more, and whatever
    follows on its rail behind it.
`RESUME`: a NIC that sends only lost packets again, each round of which delays its chunk by one RTT; others go on.
`RESTART`: a NIC that goes back to the start of the message (FedRDMA, arXiv 2403.00881). It learns of the loss one
    RTT after it, and what it has sent of the chunk until then was in vain. After ``RETRIES`` the write fails.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nvflare_rdma.channel.controllers import Controller

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TCP, RESUME, RESTART = "tcp", "resume", "restart"
MODELS = (TCP, RESUME, RESTART)
MSS = 1460  # TCP over Ethernet
MTU = 1024  # the largest of InfiniBand's that fits into an Ethernet frame of 1500 bytes
RETRIES = 7  # what three bits can say, and NCCL's default
CUBIC_BETA, CUBIC_C = 0.7, 0.4
_SEND, _REPORT, _OFFER = range(3)


@dataclass(frozen=True)
class Link:
    """``bandwidth`` in bytes/s, ``rtt`` and ``overhead`` (CPU per grant) in seconds, ``loss`` per packet; ``mtu``: the
    payload of a NIC's packet."""

    bandwidth: float
    rtt: float
    loss: float = 0.0
    model: str = RESUME
    rails: int = 2
    overhead: float = 50e-6
    mtu: int = MTU

    @property
    def bdp(self) -> float:
        return self.bandwidth * self.rtt

    @property
    def queue(self) -> float:
        return max(self.bdp, 64 * KIB)

    @property
    def tcp_window(self) -> float:
        """Mean window of one TCP connection under random loss, in bytes."""
        if not self.loss:
            return math.inf
        return MSS * max(math.sqrt(1.5 / self.loss), 1.054 * (self.rtt / self.loss) ** 0.75)

    @property
    def capacity(self) -> float:
        """The most that any setting could bring: the link, or what TCP makes of it."""
        return min(self.bandwidth, self.rails * self.tcp_window / self.rtt) if self.model == TCP else self.bandwidth

    @property
    def long(self) -> float:
        """Seconds of a transfer whose start hardly counts: 2 s, 200 RTT and the time of 1 GiB, whichever is most."""
        return max(2.0, 200 * self.rtt, GIB / self.capacity)


@dataclass
class Result:
    """``landed`` bytes in ``seconds``; ``trace``: (time, chunk, window, bytes landed so far) at each landing."""

    landed: int
    seconds: float
    trace: list[tuple[float, int, int, int]]
    lost: int = 0

    @property
    def goodput(self) -> float:
        return self.landed / self.seconds

    def between(self, start: float, end: float) -> float:
        """Goodput of a part of the time."""
        bytes_at = [0, 0]
        for time, _, _, landed in self.trace:
            for i, limit in enumerate((start, end)):
                if time <= limit:
                    bytes_at[i] = landed
        return (bytes_at[1] - bytes_at[0]) / (end - start)


class _Rail:
    def __init__(self) -> None:
        self.window = 10.0 * MSS
        self.slow_start = True
        self.free_at = 0.0
        self.delivered_at = 0.0


class _Wire:
    """Takes chunks in the order of their sending and says when they land, if they do."""

    def __init__(self, link: Link, rng: random.Random) -> None:
        self.link = link
        self._rng = rng
        self._free_at = 0.0
        self._rails = [_Rail() for _ in range(link.rails)]

    def _lost_packets(self, packets: float) -> int:
        mean = packets * self.link.loss
        if mean > 50:
            return max(0, round(self._rng.gauss(mean, math.sqrt(mean))))
        count, level = 0, self._rng.random()  # Poisson, the limit of the binomial at small loss
        none = math.exp(-mean)
        while level > none:
            level *= self._rng.random()
            count += 1
        return count

    def _serve(self, nbytes: float, now: float) -> float:
        start = self._free_at if self._free_at > now else now
        self._free_at = start + nbytes / self.link.bandwidth
        return self._free_at

    def send(self, length: int, now: float, rail: int) -> tuple[str, float]:
        """("land", when), ("again", when the sender starts over). ``rail`` is TCP's."""
        link = self.link
        if link.model == TCP:
            return "land", self._send_tcp(length, now, self._rails[rail])
        if link.model == RESUME:
            lost = self._lost_packets(length / link.mtu) if link.loss else 0
            at = self._serve(length + lost * link.mtu, now) + link.rtt / 2
            while lost:
                at += link.rtt
                lost = self._lost_packets(lost)
            return "land", at
        if link.loss:
            # Packets until the first loss: geometric.
            until = math.log(1 - self._rng.random()) / math.log1p(-link.loss) * link.mtu
            if until < length:
                at = self._serve(min(length, until + link.bdp), now)
                return "again", max(at, at - max(0.0, length - until) / link.bandwidth + link.rtt)
        return "land", self._serve(length, now) + link.rtt / 2

    def _send_tcp(self, length: int, now: float, rail: _Rail) -> float:
        link = self.link
        limited = rail.free_at >= now
        start = rail.free_at if limited else now
        full = (link.bdp + link.queue) / link.rails
        ceiling = min(full, link.tcp_window)
        rail.window = min(rail.window, ceiling)
        if rail.slow_start:
            # Bytes sent while the window doubles each RTT: w/ln2 (2^(t/RTT) - 1); then at the ceiling's pace.
            growing = min(length, (ceiling - rail.window) / math.log(2))
            seconds = link.rtt * math.log2(1 + growing * math.log(2) / rail.window)
            seconds += (length - growing) * link.rtt / ceiling
            rail.window += growing * math.log(2)
            rail.slow_start = rail.window < ceiling * 0.999
        else:
            seconds = length * link.rtt / rail.window
            if limited and ceiling == full:
                period = (ceiling / MSS * (1 - CUBIC_BETA) / CUBIC_C) ** (1 / 3)
                rail.window = min(ceiling, rail.window + (1 - CUBIC_BETA) * ceiling * seconds / period)
            elif limited:
                rail.window = ceiling
        rail.free_at = max(start + seconds, self._serve(length, start))
        at = rail.free_at + link.rtt / 2
        dropped = limited and not rail.slow_start and ceiling == full and rail.window >= full * 0.999
        if dropped:
            rail.window *= CUBIC_BETA
        if dropped or (link.loss and self._lost_packets(length / MSS)):
            at += link.rtt
        rail.delivered_at = max(rail.delivered_at, at)
        return rail.delivered_at


def simulate(
    controller: Controller,
    link: Link,
    *,
    seconds: float = math.inf,
    nbytes: float = math.inf,
    messages: Sequence[tuple[float, int]] | None = None,
    changes: Sequence[tuple[float, dict[str, float]]] = (),
    late: Callable[[float, int], float] = lambda at, rail: at,
    seed: int = 1,
    trace: bool = False,
) -> Result:
    """Run until ``seconds`` have passed or ``nbytes`` have landed.

    ``messages``: (time offered, length) of each, else one message without end (or of ``nbytes``). ``changes``: (time,
    new values of the link). ``late``: when the receiver hears of what landed at a time, on a rail.
    """
    wire = _Wire(link, random.Random(seed))
    # time, order, kind, length, granted at, rail, attempt
    events: list[tuple[float, int, int, int, float, int, int]] = []
    load = [0] * (link.rails if link.model == TCP else 1)  # bytes granted and not landed, by rail
    queue: list[float] = [] if messages is not None else [nbytes]
    order = 0
    for at, length in messages or ():
        order += 1
        events.append((at, order, _OFFER, length, at, 0, 0))
    heapq.heapify(events)
    total = sum(length for _, length in messages) if messages is not None else nbytes
    pending = sorted(changes, key=lambda change: change[0], reverse=True)
    now = cpu_free = 0.0
    in_flight = landed = lost = 0
    lines: list[tuple[float, int, int, int]] = []

    while True:
        while queue:
            length = controller.chunk_bytes
            if length > queue[0]:
                length = int(queue[0])
            if in_flight and in_flight + length > controller.window_bytes:
                break
            rail = load.index(min(load)) if len(load) > 1 else 0
            controller.granted(length, now, rail)
            load[rail] += length
            in_flight += length
            queue[0] -= length
            if not queue[0]:
                del queue[0]
            cpu_free = max(cpu_free, now + wire.link.rtt / 2) + wire.link.overhead
            order += 1
            heapq.heappush(events, (cpu_free, order, _SEND, length, now, rail, 0))
        else:
            controller.idle(now)
        if not events or landed >= total:
            break
        now, _, kind, length, granted_at, rail, attempt = heapq.heappop(events)
        if now > seconds:
            now = seconds
            break
        while pending and pending[-1][0] <= now:
            wire.link = replace(wire.link, **pending.pop()[1])
        if kind == _OFFER:
            queue.append(length)
        elif kind == _SEND:
            what, at = wire.send(length, now, rail)
            order += 1
            if what == "land":
                heapq.heappush(events, (late(at, rail), order, _REPORT, length, granted_at, rail, 0))
            elif attempt < RETRIES:
                heapq.heappush(events, (at, order, _SEND, length, granted_at, rail, attempt + 1))
            else:
                at = late(at + wire.link.rtt / 2, rail)
                heapq.heappush(events, (at, order, _REPORT, length, granted_at, rail, -1))
        elif attempt < 0:
            in_flight -= length
            load[rail] -= length
            lost += 1
            queue.insert(0, length)
            controller.lost(length, now, rail)
        else:
            in_flight -= length
            landed += length
            load[rail] -= length
            controller.landed(length, granted_at, now, rail)
            if trace:
                lines.append((now, controller.chunk_bytes, controller.window_bytes, landed))
    return Result(landed, now, lines, lost)
