"""Where a process waits for peers that can't reach it straight: at the ports of parents, one door for each."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvflare_rdma.channel import Door, Listener
from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.fabric import connect_tcp
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.addresses import SERVER, Reach, WayThrough, may_be_named, site_of
from nvflare_rdma.transfer.remote_listener import RemoteListener
from nvflare_rdma.transfer.routes import RouteKey

log = get_logger(__name__)

_CONNECT_SECONDS = 5.0
#: Who asks a parent for a route has an answer by then, or none.
_ANSWER_SECONDS = 6.0
#: A parent that had no route for this process is not asked again for so long.
_ASK_AGAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """A route that a parent has made for this process.

    Attributes:
        near: where this process finds the parent's port.
        hosts: addresses of the parent's host.
        port: the port that peers dial; 0 for the one in their server's URL.
    """

    key: RouteKey
    near: tuple[str, int]
    hosts: Sequence[str]
    port: int


class Meetings:
    """The routes to the cell `name`. `ask` has a parent, by its cell's name, make one; it raises FabricUnavailable
    where there is none. `open_door` opens a door for what listens, with a name for it. `reach` says how far the server
    can be reached."""

    def __init__(
        self,
        name: str,
        ask: Callable[[str], Place] | None,
        open_door: Callable[[Listener, str], Door],
        reach: Callable[[], Reach],
    ) -> None:
        self._name, self._ask, self._open_door, self._reach = name, ask, open_door, reach
        self._changed = threading.Condition()
        #: Parents that are being asked for a route.
        self._asked: set[str] = set()
        self._places: dict[str, tuple[Place, Door]] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._closed = False

    def ways_for(self, peer: str) -> tuple[list[WayThrough], str]:
        """The ways through parents that `peer` may take to this process, and why there are no others."""
        ways, reasons = [], []
        for parent in _parents_for(self._name, peer) if self._ask is not None else ():
            try:
                place = self.place_at(parent)
            except FabricUnavailable as error:
                reasons.append(str(error))
                continue
            at_server, server = parent == SERVER, self._reach()
            hosts = [] if at_server else [host for host in place.hosts if may_be_named(host, server)]
            ways.append(WayThrough(at_server, hosts, place.port, place.key.token(site_of(peer))))
        return ways, "; ".join(reasons)

    def place_at(self, parent: str) -> Place:
        """The route that this parent has made, or makes now; then this process begins to wait there.

        Raises:
            FabricUnavailable: it makes none.
        """
        with self._changed:
            # One asks, and the others wait for what it is told.
            deadline = time.monotonic() + _ANSWER_SECONDS
            while (known := self._known(parent)) is None and parent in self._asked:
                if (left := deadline - time.monotonic()) <= 0:
                    raise FabricUnavailable(f"{parent} has not said yet whether it joins connections")
                self._changed.wait(left)
            if known is not None:
                return known
            self._asked.add(parent)
        try:
            return self._begin(parent)
        except FabricUnavailable as error:
            with self._changed:
                self._failed[parent] = time.monotonic(), str(error)
            raise
        finally:
            with self._changed:
                self._asked.discard(parent)
                self._changed.notify_all()

    def _known(self, parent: str) -> Place | None:
        """The route that this parent has made, if it is known; raises FabricUnavailable if it is known that there is
        none."""
        if self._closed or self._ask is None:
            raise FabricUnavailable(f"{self._name} is ending")
        if (found := self._places.get(parent)) is not None and not found[1].is_over:
            return found[0]
        since, reason = self._failed.get(parent, (0.0, ""))
        if reason and time.monotonic() - since < _ASK_AGAIN_SECONDS:
            raise FabricUnavailable(reason)
        return None

    def _begin(self, parent: str) -> Place:
        """Ask for a route, and wait there. Not under the lock: the answer takes as long as it takes."""
        assert self._ask is not None
        place = self._ask(parent)
        listener = RemoteListener(functools.partial(_connect, place.near), place.key, place.near)
        door = self._open_door(listener, f"{self._name}'s way through {parent}")
        with self._changed:
            closed = self._closed
            self._places[parent] = place, door
        if closed:
            door.close()
            raise FabricUnavailable(f"{self._name} is ending")
        log.info("%s waits for peers at port %d of %s", self._name, place.near[1], parent)
        return place

    def close(self) -> None:
        """Wait nowhere any more."""
        with self._changed:
            self._closed = True
            doors = [door for _, door in self._places.values()]
            self._changed.notify_all()
        for door in doors:
            door.close()


def _parents_for(name: str, peer: str) -> list[str]:
    """The parents at whose ports `peer` meets the cell `name`: this one's, and for two sites the server's, too."""
    own, its = site_of(name), site_of(peer)
    if own == its:
        return []
    return [own] if SERVER in (own, its) else [own, SERVER]


def _connect(address: tuple[str, int]) -> socket.socket:
    return connect_tcp(address, _CONNECT_SECONDS)
