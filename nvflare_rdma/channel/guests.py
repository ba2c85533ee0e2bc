"""Who has come to a door and was not let in yet: how many of them there may be, and what is logged of them."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections import Counter
from typing import Any

from nvflare_rdma.logs import Seldom, get_logger

log = get_logger(__name__)

#: Guests that have not been let in yet, in all and of one source: an IPv4 address or an IPv6 network of 64 bits.
MAX_HANDSHAKES, MAX_HANDSHAKES_OF_SOURCE = 256, 64
#: Of lines about guests, so many are logged in so many seconds: they may come by the thousand.
_COMPLAINTS, _COMPLAINTS_SECONDS = 20, 60.0
#: So many lines about one guest wait until it is let in; there are a few of a link that opens as it should.
_MOST_KEPT = 20


class Guests:
    """Who has come to a door and was not let in yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[socket.socket, str] = {}  # in the order of coming

    def enter(self, sock: socket.socket, address: str) -> socket.socket | None:
        """Give a guest a place, and return the one whose place it is that was taken for it."""
        source = source_of(address)
        with self._lock:
            count = Counter(self._sources.values())
            victim = None
            if count[source] >= MAX_HANDSHAKES_OF_SOURCE:
                victim = next(guest for guest, its in self._sources.items() if its == source)
            elif len(self._sources) >= MAX_HANDSHAKES:
                most = count.most_common(1)[0][0]
                victim = next(guest for guest, its in self._sources.items() if its == most)
            if victim is not None:
                del self._sources[victim]
            self._sources[sock] = source
        return victim

    def leave(self, sock: socket.socket) -> None:
        """Free a guest's place: it was let in, or it goes. Idempotent."""
        with self._lock:
            self._sources.pop(sock, None)


class Complaints:
    """What guests do wrong, in the log: so many lines a minute, and how many more there were. `name` is the door's."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._count = 0
        self._since = time.monotonic()

    def log(self, level: int, text: str, *values: object) -> None:
        """Log a line, unless there were too many."""
        now, more = time.monotonic(), 0
        with self._lock:
            if now - self._since > _COMPLAINTS_SECONDS:
                more, self._count, self._since = self._count - _COMPLAINTS, 0, now
            self._count += 1
            quiet = self._count > _COMPLAINTS
        if more > 0:
            log.warning("%s: %d more lines about guests were left out", self._name, more)
        if not quiet:
            log.log(level, text, *values)


class GuestLog(logging.LoggerAdapter[Any]):
    """The logger of a link, whose lines wait for `let_in` as long as `is_guest`. Of a guest that is not let in the door
    has a line, and those are limited (`Complaints`); it may come by the thousand, and have its own words in the link's
    lines. An error with a trace is this side's, and does not wait."""

    def __init__(self, log: logging.LoggerAdapter[Any], is_guest: bool) -> None:
        super().__init__(log, {})
        self._lock = threading.Lock()
        self._seldom = Seldom()
        #: None when it is let in.
        self._kept: list[tuple[int, object, tuple[object, ...]]] | None = [] if is_guest else None

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """See `logging.Logger.log`."""
        if not kwargs.get("exc_info"):
            with self._lock:
                if self._kept is not None:
                    if len(self._kept) < _MOST_KEPT:
                        self._kept.append((level, msg, args))
                    return
        self.logger.log(level, msg, *args, **{**kwargs, "stacklevel": kwargs.get("stacklevel", 1) + 1})

    def seldom(self, level: int, msg: object, *args: object) -> None:
        """Log a line that the peer can bring about on and on: one a minute, and all of them for who wants details."""
        self.log(self._seldom.level(level), msg, *args)

    def let_in(self) -> None:
        """Write what has waited, and let nothing wait any more. Idempotent."""
        with self._lock:
            kept, self._kept = self._kept or [], None
        for level, msg, args in kept:
            self.logger.log(level, msg, *args)


def source_of(address: str) -> str:
    """Whose IP address it is, as far as that can be told: whoever has an IPv6 address usually has 2^64 of them."""
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ip if ip.version == 4 else ipaddress.ip_network((ip, 64), strict=False))
