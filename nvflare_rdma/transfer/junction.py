"""The parent's side of routes: it joins connections that come to its port, and reads nothing of what goes over them.

It never dials. Who wants to be reached keeps connections to the port open; who dials comes to the same port, with a
token that says to whom it wants. See `routes` for what they say, and `joining` for how their bytes are moved.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import keep_alive
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.addresses import site_of
from nvflare_rdma.transfer.joining import join
from nvflare_rdma.transfer.routes import (
    DIALLING_BYTES,
    ROUTE_MAGIC,
    WAIT_MAGIC,
    WAITING_BYTES,
    RouteKey,
    id_of,
    joined,
    parse_dialling,
)

log = get_logger(__name__)

#: Routes to the cells of a site, and to those of the site whose parent this is. The oldest makes room, one at which
#: nobody waits first.
MAX_ROUTES, MAX_OWN_ROUTES = 32, 1024
#: Connections that wait at a route, where the oldest makes room; and at all routes of a site whose parent this is not.
MAX_WAITING, MAX_WAITING_OF_SITE = 8, 64
#: Pairs in which one site dials the same site, and all those to a site whose parent this is not. A link has one for its
#: control stream and one for each rail.
MAX_PAIRS_OF_DIALLER, MAX_PAIRS_TO_SITE = 144, 576
#: A pair in use has two sockets, and two pipes of two ends: all pairs have at most half of this process's descriptors.
_DESCRIPTORS_OF_PAIR = 6
#: And those of one site at most such a part of them, so that there are some for others.
_SHARE_OF_SITE = 4
#: Who dials waits so long for a connection to be joined with.
PATIENCE_SECONDS = 5.0
#: Who opens several connections that wait may have them come in another order, but not by more.
_DISORDER = 64
#: A route at which nobody has waited for so long is closed.
_ROUTE_SECONDS = 120.0


class _Route:
    """A route to one cell: its key, and the connections that wait."""

    def __init__(self, cell: str) -> None:
        self.cell, self.key = cell, RouteKey.make()
        self.waiting: deque[socket.socket] = deque()
        self._numbers: set[int] = set()
        self.used = time.monotonic()
        self.closed = False

    def is_new(self, number: int) -> bool:
        """Whether no connection has come with this number, nor could have; from now on one has."""
        highest = max(self._numbers, default=number)
        if number in self._numbers or number <= highest - _DISORDER:
            return False
        self._numbers = {seen for seen in self._numbers if seen > number - _DISORDER} | {number}
        return True

    def drop_ended(self) -> None:
        """Forget the connections whose other end has gone."""
        for sock in [sock for sock in self.waiting if not _waits(sock)]:
            self.waiting.remove(sock)
            sock.close()
        if self.waiting:
            self.used = time.monotonic()

    def close(self) -> None:
        self.closed = True
        while self.waiting:
            self.waiting.popleft().close()


class Junction:
    """Joins the connections that wait at routes with those that are dialled. `site` is the site whose parent this is,
    and `name` is for log lines. What is in `takers` belongs into `Door.takers`, for each door that it has."""

    def __init__(self, site: str, name: str, splice: bool = True) -> None:
        self._site, self._name = site, name
        self._splice = splice
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._routes: dict[bytes, _Route] = {}  # in the order of their making
        self._pairs: Counter[tuple[str, bytes]] = Counter()
        self._joined: set[socket.socket] = set()
        self._closed = False

    @property
    def takers(self) -> Mapping[bytes, Callable[[socket.socket, float, Callable[[], None]], None]]:
        """What takes the connections, by the magic that they begin with."""
        return {WAIT_MAGIC: self._take_waiting, ROUTE_MAGIC: self._take_dialler}

    @property
    def pairs(self) -> int:
        """How many pairs of connections are joined."""
        with self._lock:
            return len(self._joined) // 2

    def open(self, cell: str) -> RouteKey:
        """Make a route to `cell`, in place of the one that it has. What is joined goes on."""
        site = site_of(cell)
        with self._lock:
            if self._closed:
                raise ProtocolError(f"{self._name} is closed")
            self._sweep()
            for route in [route for route in self._routes.values() if route.cell == cell]:
                self._drop(route)
            others = [route for route in self._routes.values() if site_of(route.cell) == site]
            if len(others) >= (MAX_OWN_ROUTES if site == self._site else MAX_ROUTES):
                log.warning("%s has %d routes through %s; the oldest is closed", site, len(others), self._name)
                self._drop(next((route for route in others if not route.waiting), others[0]))
            route = _Route(cell)
            self._routes[route.key.id] = route
            return route.key

    def close_routes(self, part: str) -> None:
        """Close the routes to cells with a name of which `part` is a part, as a job's name is."""
        with self._lock:
            for route in [route for route in self._routes.values() if part in route.cell.split(".")]:
                self._drop(route)

    def close(self) -> None:
        """End all routes, and all that is joined. Idempotent."""
        with self._lock:
            self._closed = True
            for route in list(self._routes.values()):
                self._drop(route)
            sockets = list(self._joined)
            self._arrived.notify_all()
        for sock in sockets:
            with contextlib.suppress(OSError):  # its thread wakes up, and closes it
                sock.shutdown(socket.SHUT_RDWR)

    def _drop(self, route: _Route) -> None:
        route.close()
        self._routes.pop(route.key.id, None)
        self._arrived.notify_all()

    def _sweep(self) -> None:
        """Close the routes whose cells are gone: nobody says so if a process was killed."""
        now = time.monotonic()
        for route in list(self._routes.values()):
            route.drop_ended()
            if now - route.used > _ROUTE_SECONDS:
                self._drop(route)

    def _take_waiting(self, sock: socket.socket, left: float, admitted: Callable[[], None]) -> None:
        """Keep a connection until it is joined."""
        said = _receive(sock, WAITING_BYTES, left)
        with self._lock:
            route = self._route(said)
            if not route.is_new(route.key.number_of(said)):
                raise ProtocolError("it waits with what another connection has said before")
            route.drop_ended()
            if len(route.waiting) >= MAX_WAITING:
                route.waiting.popleft().close()
            elif self._has_many_waiting(site_of(route.cell)):
                raise ProtocolError(f"its site has {MAX_WAITING_OF_SITE} connections that wait at {self._name} already")
            sock.settimeout(None)
            keep_alive(sock)
            admitted()  # before anybody finds it here: as a guest it may have to make room for another
            route.waiting.append(sock)
            route.used = time.monotonic()
            self._arrived.notify_all()

    def _has_many_waiting(self, site: str) -> bool:
        if site == self._site:
            return False
        waiting = sum(len(route.waiting) for route in self._routes.values() if site_of(route.cell) == site)
        return waiting >= MAX_WAITING_OF_SITE

    def _take_dialler(self, sock: socket.socket, left: float, admitted: Callable[[], None]) -> None:
        """Join a connection with one that waits, and move what goes over both until they end."""
        token = parse_dialling(_receive(sock, DIALLING_BYTES, left))
        with self._lock:
            route = self._route(token)
            site = site_of(route.cell)
            place = "" if site == self._site else site, route.key.dialler_of(token)
            to_site = sum(count for (whose, _), count in self._pairs.items() if whose == place[0])
            if self._pairs.total() >= (most := _most_pairs()):
                raise ProtocolError(f"{self._name} has no descriptors left for it (RLIMIT_NOFILE)")
            share = most // _SHARE_OF_SITE  # who has the key of a route may say that any site dials
            of_dialler, of_site = min(MAX_PAIRS_OF_DIALLER, share), min(MAX_PAIRS_TO_SITE, share)
            if self._pairs[place] >= of_dialler or (place[0] and to_site >= of_site):
                raise ProtocolError(f"its site has too many connections through {self._name} already")
            self._pairs[place] += 1
        try:
            waiting = self._wait_for(route)
            try:
                waiting.sendall(joined(sock.getpeername()[:2]))
                with self._lock:
                    if self._closed:
                        raise ConnectionAbortedError("this side shuts down")
                    self._joined |= {sock, waiting}
                admitted()
                join(sock, waiting, self._splice)
            finally:
                waiting.close()
                with self._lock:
                    self._joined -= {sock, waiting}
        finally:
            sock.close()
            with self._lock:
                self._pairs[place] -= 1
                self._pairs += Counter()  # without those that have none

    def _wait_for(self, route: _Route) -> socket.socket:
        """The connection at a route that has waited for longest, as soon as there is one."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._arrived:
            while True:
                route.drop_ended()
                if route.waiting:
                    return route.waiting.popleft()
                if route.closed or (left := deadline - time.monotonic()) <= 0:
                    raise ProtocolError(f"nobody waits for it: {route.cell} has gone, or is too busy")
                self._arrived.wait(left)

    def _route(self, said: bytes) -> _Route:
        if (route := self._routes.get(id_of(said))) is None:
            raise ProtocolError("it asks for a route that is unknown, or closed")
        return route

    def refuse(self, sock: object, stream: object, admitted: object) -> None:
        """Refuse a control stream: as `Door` wants it of a port that has routes only."""
        raise ProtocolError("it wants a link to this port, which only joins others")


def _most_pairs() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft // 2 // _DESCRIPTORS_OF_PAIR if soft != resource.RLIM_INFINITY else MAX_ROUTES**2


def _receive(sock: socket.socket, size: int, left: float) -> bytes:
    buffer, deadline, got = bytearray(size), time.monotonic() + left, 0
    while got < size:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (count := sock.recv_into(memoryview(buffer)[got:])):
            raise ConnectionError("it closed the connection in the middle of its greeting")
        got += count
    return bytes(buffer)


def _waits(sock: socket.socket) -> bool:
    """Whether the other end is there, and silent, as it has to be."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        pass
    return False
