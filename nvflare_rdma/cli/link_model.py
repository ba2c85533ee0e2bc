"""How long it takes to move a message's tensors between a server and a site over TCP: a model, without any I/O.

One way, of all sites at once, takes

    bytes / rate  +  ramp  +  recovery  +  round trips x RTT  +  processing

- **bytes**: those of the tensors as they travel, and `HEADERS` of them: packets of 1500 bytes carry 1448, and grants,
  notifications and FLARE's messages are the rest. Measured: 4 to 16 %, the most for the least bytes.
- **rate**: that of the site's line; or of what `MOST_RAILS` connections reach where packets are lost, if that is less.
  A link opens as many while packets are lost (`nvflare_rdma.fabric.rail_count`). What one connection reaches
  (`rail_rate`) is the larger of two:
  Padhye, Firoiu, Towsley and Kurose, "Modeling TCP Throughput: A Simple Model and its Empirical Validation", SIGCOMM
  1998, eq. 30, which has the time-outs that Mathis' formula leaves out (with b = 1: Linux counts bytes, not
  acknowledgements, RFC 3465); and CUBIC's response function, RFC 9438, 5.1.
- **ramp**: what TCP's slow start takes beyond that. A connection that was idle begins with ten packets in flight (RFC
  6928, RFC 2861) and doubles them each round trip. A link has 2 rails on a short path and up to 16 from 37 ms on. Here
  their number is a fraction, so that a longer path is never faster.
- **recovery**: a packet that is lost near the end is missed after two round trips, and is there after three (RFC 8985);
  where that fails, after a time-out, as often as in Padhye's formula. Each counts as often as a message of that size
  meets one.
- **round trips**: one of the application's message, and those that a transfer over an open link waits (docs/design.md):
  three, or two for a message so small that it comes with its description. Where the link has to be opened first, the
  first round takes `opening_seconds` more.
- **processing**: what Python does for each tensor at the site and, for one site after the other, at the server; and
  what codecs, copies and the kernel take for each MiB, most of it while other bytes travel: with these it counts as
  the root of the sum of both squares. Fitted to measurements on 2 slow cores, which had the emulated lines to
  carry besides; on other machines it is less.

The constants were fitted to `benchmarks/wan_rounds.py`, and `benchmarks/plan_check.py` says how far off the model is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvflare_rdma.transfer import SMALL_TOTAL  # tensors of so many bytes together come with their description

HEADERS = 0.06
_SEGMENT = 1448  # bytes of a full packet
_FIRST_WINDOW = 10 * _SEGMENT
#: Of TCP's estimate, beyond the round trip, before it sends again (Linux; RFC 6298 has more).
_TIMEOUT = 0.2
FEW_RAILS, MOST_RAILS = 2.0, 16.0
#: See `nvflare_rdma.fabric.rail_count.rails_for_round_trip`, which rounds it up.
RAILS_PER_SECOND = 100e6 / 8 / (20 * 1460)
_MESSAGE_TRIPS, _TRANSFER_TRIPS, _SMALL_TRIPS = 1.0, 3.0, 2.0
_RECOVERY_TRIPS = 3.0
_OPENING_TRIPS, _OPENING_SECONDS = 10.0, 0.1
_TENSOR_SECONDS = 0.00018
_MIB_SECONDS, _MIB_SECONDS_OF_A_SITE = 0.0032, 0.0004
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Line:
    """What joins a site to its server: bits/s, seconds of a round trip, share of the packets that are lost."""

    rate: float
    round_trip: float
    loss: float = 0.0


@dataclass(frozen=True)
class Message:
    """What moves: tensors, their bytes in memory, and as they travel."""

    tensors: int
    raw_bytes: int
    sent_bytes: int

    @property
    def wire_bytes(self) -> int:
        """With headers, and all else that goes over the line for it."""
        return round(self.sent_bytes * (1 + HEADERS))


@dataclass(frozen=True)
class Seconds:
    """What moving one message takes, by parts."""

    sending: float
    ramp: float
    recovery: float
    round_trips: float
    processing: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.sending + self.ramp + self.recovery + self.round_trips + self.processing


def seconds_of(message: Message, line: Line, sites: int) -> Seconds:
    """What it takes to move `message` between the server and one of `sites` that do so at once, over an open link."""
    rate = usable_rate(line)
    trips = _MESSAGE_TRIPS + (_SMALL_TRIPS if message.sent_bytes <= SMALL_TOTAL else _TRANSFER_TRIPS)
    sending = message.wire_bytes / rate
    ramp = ramp_seconds(message.wire_bytes, rate, line.round_trip)
    work = message.raw_bytes / _MIB * (_MIB_SECONDS + sites * _MIB_SECONDS_OF_A_SITE)
    return Seconds(
        sending=sending,
        ramp=ramp,
        recovery=_recovery_seconds(message, line),
        round_trips=trips * line.round_trip,
        processing=message.tensors * _TENSOR_SECONDS * (1 + sites) + math.hypot(sending + ramp, work) - sending - ramp,
    )


def _recovery_seconds(message: Message, line: Line) -> float:
    packets = message.wire_bytes / _SEGMENT
    lost, timed_out = (1.0 - math.pow(1.0 - share, packets) for share in (line.loss, _timed_out(line.loss)))
    return lost * _RECOVERY_TRIPS * line.round_trip + timed_out * (line.round_trip + _TIMEOUT)


def _timed_out(loss: float) -> float:
    """The share of the packets whose loss shows by a time-out only."""
    return loss * min(1.0, 3 * math.sqrt(3 * loss / 8))


def opening_seconds(line: Line) -> float:
    """What the first round takes more, for which a link is opened: addresses, TLS, rails, and what is loaded for it."""
    return _OPENING_SECONDS + _OPENING_TRIPS * line.round_trip


def usable_rate(line: Line) -> float:
    """Bytes/s over all rails of a link that has as many as it wants."""
    rate = line.rate / 8
    return min(rate, MOST_RAILS * rail_rate(line)) if line.loss and line.round_trip else rate


def rail_rate(line: Line) -> float:
    """Bytes/s that one TCP connection reaches where packets are lost; see this module."""
    trip, loss = line.round_trip, line.loss
    again = (trip + _TIMEOUT) * _timed_out(loss) * (1 + 32 * loss**2)
    padhye = 1 / (trip * math.sqrt(2 * loss / 3) + again)
    cubic = 1.054 * math.pow(trip / loss, 0.75) / trip
    return _SEGMENT * max(padhye, cubic)


def ramp_seconds(nbytes: int, rate: float, round_trip: float) -> float:
    """What slow start takes beyond the time that `nbytes` take at `rate` (bytes/s): the pace grows evenly, twofold in
    each round trip."""
    rails = min(max(round_trip * RAILS_PER_SECOND, FEW_RAILS), MOST_RAILS)
    if not round_trip or (first := rails * _FIRST_WINDOW / round_trip) >= rate:
        return 0.0
    growing = round_trip / math.log(2)  # in which the pace grows e-fold
    meanwhile = growing * (rate - first)  # bytes, until it has come to the rate
    if nbytes >= meanwhile:
        return growing * math.log(rate / first) - meanwhile / rate
    return growing * math.log1p(nbytes / (growing * first)) - nbytes / rate
