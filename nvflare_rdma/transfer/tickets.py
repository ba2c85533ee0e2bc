"""The tickets of a door: each lets one peer in, once, within two minutes."""

from __future__ import annotations

import secrets
import threading

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.addresses import TICKET_BYTES, site_of

log = get_logger(__name__)

TICKET_SECONDS = 120.0
#: For all cells of a site. The oldest makes room.
MAX_INVITATIONS = 32


class Tickets:
    """The tickets that are good. `now` is as `time.monotonic` has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Ticket -> the peer that it is for, and until when; in the order in which they were made.
        self._good: dict[bytes, tuple[str, float]] = {}

    def issue(self, peer: str, now: float) -> bytes:
        """The ticket of the open invitation of `peer`, or a new one if there is none that lasts."""
        with self._lock:
            self._good = {ticket: entry for ticket, entry in self._good.items() if entry[1] > now}
            for ticket, (whose, expires) in self._good.items():
                if whose == peer and expires - now > TICKET_SECONDS / 2:
                    return ticket
            site = site_of(peer)
            others = [ticket for ticket, (whose, _) in self._good.items() if site_of(whose) == site]
            if len(others) >= MAX_INVITATIONS:
                log.warning("%s has %d open invitations; the oldest is withdrawn", site, len(others))
                del self._good[others[0]]
            ticket = secrets.token_bytes(TICKET_BYTES)
            self._good[ticket] = peer, now + TICKET_SECONDS
        return ticket

    def peer_of(self, ticket: bytes) -> str:
        """Whom a ticket is for; "" if it is none."""
        with self._lock:
            return self._good.get(ticket, ("", 0.0))[0]

    def use(self, ticket: bytes, now: float) -> None:
        """Use a ticket up. Raises ProtocolError if it is none, or too old."""
        with self._lock:
            _, expires = self._good.pop(ticket, ("", 0.0))
        if now > expires:
            raise ProtocolError("its ticket is unknown, used or expired")
