"""How many TCP connections a peer is worth: as many as fill the path to it soon, and more where packets are lost.

A connection begins with ten packets in flight (RFC 6928), and again after it was idle (RFC 2861); it doubles them each
round trip. Over a long path that takes a while, and each packet that is lost costs a part of what it has reached
(CUBIC, RFC 9438). Several connections begin with several times as many, and a loss costs only one of them. Over a short
path there is nothing to gain.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping

from nvflare_rdma.fabric.sockets import tcp_told

#: Over a short path, one for what another one's thread is busy with.
FEW_RAILS = 2
#: Bytes/s that are to be reached within two round trips.
_SOON = 100e6 / 8
#: What a connection may have in flight in its second round trip.
_SECOND_WINDOW = 20 * 1460
#: Where so large a part of the packets is sent again, more rails are opened; and of how many it has to be a part.
_LOST = 0.0003
_LEAST_LOST = 3


def rails_for_round_trip(seconds: float) -> int:
    """How many rails fill a path of that round trip soon."""
    return max(FEW_RAILS, math.ceil(seconds * _SOON / _SECOND_WINDOW))


class LossWatch:
    """Looks at what the kernel had to send again over the rails of a peer."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int]] = {}

    def is_lossy(self, rails: Mapping[int, socket.socket]) -> bool:
        """Whether many packets have been lost since this was called last."""
        sent = lost = 0
        for rail, sock in rails.items():
            if (told := tcp_told(sock)) is not None:
                now = told.segments, told.resent
                then = self._before.get(rail, (0, 0))
                self._before[rail] = now
                sent, lost = sent + now[0] - then[0], lost + now[1] - then[1]
        return lost >= _LEAST_LOST and lost > _LOST * sent


def round_trip(rails: Mapping[int, socket.socket]) -> float:
    """The shortest round trip that the kernel has seen on any of these rails, in seconds; 0 if it does not tell."""
    told = [one.round_trip for one in map(tcp_told, rails.values()) if one is not None and one.round_trip]
    return min(told, default=0.0)
