"""A peer of the verbs fabric: its rails, what is exposed to it, and the start and end of both."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError
from nvflare_rdma.fabric.base import CompletionHandler, Endpoint, Region, RemoteSlice
from nvflare_rdma.fabric.shm import address_of
from nvflare_rdma.fabric.verbs.description import TICKET_BYTES, RemotePort, RemoteRail, describe, parse
from nvflare_rdma.fabric.verbs.devices import IWARP
from nvflare_rdma.fabric.verbs.iwarp_connect import CONNECT_TIMEOUT, connect_by_cm
from nvflare_rdma.fabric.verbs.iwarp_listen import IwarpListener
from nvflare_rdma.fabric.verbs.ports import Access, MemoryRegion, Port
from nvflare_rdma.fabric.verbs.queue_pair import QueuePair
from nvflare_rdma.fabric.verbs.rail import VerbsRail
from nvflare_rdma.fabric.verbs.registration_cache import Lease
from nvflare_rdma.logs import get_logger

if TYPE_CHECKING:
    from nvflare_rdma.fabric.verbs.fabric import VerbsFabric

log = get_logger(__name__)

#: From here on registering memory costs less than copying it to memory that is registered already (benchmarks/
#: verbs_costs.py).
IN_PLACE_BYTES = 512 * 1024
_JOIN_TIMEOUT = 10.0


@dataclass(slots=True)
class _ExposedMemory:
    region: MemoryRegion
    memory: memoryview
    rail: int


class VerbsRegion(Region):
    """A buffer of which slices are registered one by one."""

    def __init__(self, endpoint: VerbsEndpoint, buffer: memoryview) -> None:
        self._endpoint = endpoint
        self._buffer = buffer

    def expose(self, notification: int, offset: int, length: int, rail: int) -> RemoteSlice:
        """See `Region.expose`."""
        if offset < 0 or length < 0 or offset + length > len(self._buffer):
            raise ValueError(f"slice {offset}+{length} is outside a region of {len(self._buffer)} bytes")
        return self._endpoint.expose(notification, self._buffer[offset : offset + length], rail)

    def revoke(self, notification: int) -> None:
        """Nothing to do: an honest peer may be writing, and its device would stop the rail if it were refused."""

    def close(self) -> None:
        """Slices that are still exposed keep what they need."""


class VerbsEndpoint(Endpoint):
    """One peer over RDMA devices. Rails are spread over `ports`, which belong to this endpoint."""

    def __init__(self, handler: CompletionHandler, ports: Sequence[Port], count: int, fabric: VerbsFabric) -> None:
        self._handler = handler
        self._ports = list(ports)
        self._fabric = fabric
        self._state = threading.Lock()
        self._closing_ports = threading.Lock()
        self._closed = False
        self._rails: list[VerbsRail] = []
        #: What iWARP rails are connected with: see `iwarp_connect`.
        self._tickets: dict[int, bytes] = {}
        self._listener: IwarpListener | None = None
        self._started: set[int] = set()
        #: Rails over which nothing is exposed any more; and those whose thread has nothing left to do.
        self._ended: set[int] = set()
        self._over: set[int] = set()
        #: notification -> what the peer may write, once, and over which rail
        self._exposed: dict[int, _ExposedMemory] = {}
        self._answer: Mapping[str, Any] = {}
        try:
            for number in range(count):
                self._rails.append(VerbsRail(number, self._ports[number % len(self._ports)], self))
        except BaseException:
            self.close()
            raise
        _endpoints.add(self)

    # -- life ----------------------------------------------------------------------------------------------

    @property
    def rails(self) -> int:
        """See `Endpoint.rails`."""
        return len(self._started)

    @property
    def answer(self) -> Mapping[str, Any]:
        """See `Endpoint.answer`."""
        return self._answer

    def listen(self) -> None:
        """Passive side: wait for the rails that the peer has to connect. Raises FabricError."""
        coming = [rail for rail in self._rails if rail.port.info.transport == IWARP]
        self._tickets = {rail.number: secrets.token_bytes(TICKET_BYTES) for rail in coming}
        if coming:
            self._listener = IwarpListener(
                {self._tickets[rail.number]: (rail.port, rail.queue_pair) for rail in coming}
            )

    def describe(self, count: int | None = None) -> Mapping[str, Any]:
        """Describe this side's first `count` rails, for the peer."""
        services = self._listener.services if self._listener is not None else {}
        ports = [
            RemotePort(p.info.transport, p.gid, p.lid, p.mtu, p.max_message, services.get(p, 0)) for p in self._ports
        ]
        rails = [
            (
                self._ports.index(rail.port),
                rail.queue_pair.number,
                rail.queue_pair.first_packet,
                self._tickets.get(rail.number, b""),
            )
            for rail in self._rails[:count]
        ]
        return describe(ports, rails)

    def connect(self, peer: Sequence[RemoteRail], passive: bool) -> None:
        """Raises FabricError: no rail can be connected."""
        error: FabricError | None = None
        deadline = time.monotonic() + CONNECT_TIMEOUT
        for rail, remote in zip(self._rails, peer, strict=False):
            try:
                self._check(rail.port, remote.port)
                most = min(rail.port.max_message, remote.port.max_message)
                if rail.port.info.transport != IWARP:
                    rail.start(functools.partial(self._connect, remote), most, greet=passive)
                elif passive:
                    rail.start(functools.partial(self._came, remote), most, greet=False, wait=True)
                else:
                    self._tickets[rail.number] = remote.ticket
                    come = functools.partial(connect_by_cm, rail.port, remote, deadline)
                    rail.start(come, most, greet=True)
                self._started.add(rail.number)
            except FabricError as failure:
                error = failure
                break  # they are numbered from 0 without gaps
        if not self._started:
            raise error or FabricError("no verbs rail could be opened")
        if error is not None:
            log.warning("%d of %d verbs rails are open: %s", len(self._started), len(peer), error)
        if not passive:
            self._answer = self.describe(len(self._started))

    def accept(self, answer: Mapping[str, Any]) -> None:
        """See `Endpoint.accept`."""
        peer = parse(answer)
        for rail, remote in zip(self._rails, peer, strict=False):
            if remote.ticket and remote.ticket != self._tickets.get(rail.number):
                raise ProtocolError(f"the peer says that {rail} came with a ticket, which it was not given")
        if self._listener is not None:
            self._listener.stop()  # who has not come by now won't; and rails that fail are closed here
        self.connect(peer, passive=True)

    @staticmethod
    def _check(port: Port, remote: RemotePort) -> None:
        if (port.info.transport, port.gid.family) != (remote.transport, remote.gid.family):
            raise FabricError(
                f"{port.info} uses {port.gid.family}, the peer's port {remote.gid.family}: they can't reach each other"
            )

    def _came(self, remote: RemoteRail, queue_pair: QueuePair) -> None:
        if self._listener is None or not self._listener.has_taken(remote.ticket):
            raise FabricError("the peer says that it is connected, but it has not come, or not in time")

    def _connect(self, remote: RemoteRail, queue_pair: QueuePair) -> None:
        port = remote.port
        queue_pair.connect(port.gid, port.lid, port.mtu, remote.number, remote.packet, self._fabric.options)

    def drop(self, rail: int) -> None:
        """See `Endpoint.drop`."""
        if rail in self._started:
            self._rails[rail].stop(FabricError(f"{self._rails[rail]}: the peer gave it up"))

    def close(self) -> None:
        """See `Endpoint.close`."""
        with self._state:
            self._closed = True
            listener = self._listener
        if listener is not None:
            listener.stop()
        for rail in self._rails:
            rail.stop(FabricError("closed"))
        for rail in self._rails:
            rail.join(_JOIN_TIMEOUT)
        self._close_ports()

    def _close_ports(self) -> None:
        """When no rail is left: children first (ibv_dealloc_pd(3) fails while there are some)."""
        with self._closing_ports:  # to the end: when a thread of several returns from `close`, nothing is open
            with self._state:
                if not self._closed or self._started - self._over:
                    return  # the last rail's thread does it
                ports, self._ports = self._ports, []
                exposed, self._exposed = self._exposed, {}
                listener, self._listener = self._listener, None
            if listener is not None:
                listener.close()
            for exposure in exposed.values():
                exposure.region.close()
            for port in ports:
                self._fabric.cache.drop(port)
                port.close()

    # -- receiving -----------------------------------------------------------------------------------------

    def register(self, buffer: memoryview) -> VerbsRegion:
        """See `Endpoint.register`."""
        return VerbsRegion(self, buffer)

    def expose(self, notification: int, memory: memoryview, rail: int) -> RemoteSlice:
        """See `Region.expose`."""
        nothing = RemoteSlice(0, 0, len(memory))
        try:
            with self._state:  # also while registering: the port is not closed meanwhile
                if self._closed or rail not in self._started or rail in self._ended:
                    return nothing  # the end of the rail, or of all, is being reported, and voids the grant
                region = self._rails[rail].port.register(address_of(memory), len(memory), Access.EXPOSED)
                self._exposed[notification] = _ExposedMemory(region, memory, rail)
            self._rails[rail].expect()
        except FabricError as error:
            # The rail ends, and with it what is granted over it: `rail_down` says why.
            self._rails[rail].stop(error)
            return nothing
        return RemoteSlice(region.rkey, address_of(memory), len(memory))

    def take(self, rail: int, notification: int) -> None:
        """See `VerbsRailOwner.take`."""
        with self._state:
            exposure = self._exposed.get(notification)
            if exposure is None or exposure.rail != rail:
                raise ProtocolError(f"the peer answered slice {notification} over rail {rail}: it is not exposed there")
            del self._exposed[notification]
        exposure.region.close()

    def landed(self, notification: int, length: int, digest: int) -> None:
        """See `VerbsRailOwner.landed`."""
        self._handler.landed(notification, length, digest)

    # -- sending -------------------------------------------------------------------------------------------

    def write(self, rail: int, source: memoryview, remote: RemoteSlice, notification: int, digest: int) -> None:
        """See `Endpoint.write`."""
        if len(source) > remote.length:
            raise ValueError(f"a write of {len(source)} bytes does not fit a slice of {remote.length}")
        if rail >= len(self._rails) or remote.address + remote.length > 1 << 64:
            raise ProtocolError(f"the peer grants {remote} over rail {rail}: there is no such memory, or rail")
        self._rails[rail].write(source, remote, notification, digest)

    def lease(self, port: Port, source: memoryview, abandoned: Callable[[], bool]) -> Lease:
        """See `VerbsRailOwner.lease`."""
        fabric = self._fabric
        if len(source) < IN_PLACE_BYTES:
            slot = fabric.pool.take(len(source))
            slot[:] = source
            source = slot
        return fabric.cache.acquire(port, lambda at, size: port.register(at, size, Access.SOURCE), source, abandoned)

    def release(self, lease: Lease) -> None:
        """See `VerbsRailOwner.release`."""
        self._fabric.cache.release(lease)

    def abandon(self) -> None:
        """See `VerbsRailOwner.abandon`."""
        self._fabric.cache.wake()

    def written(self, notification: int) -> None:
        """See `VerbsRailOwner.written`."""
        self._handler.written(notification)

    # -- the end of a rail ---------------------------------------------------------------------------------

    def rail_over(self, rail: int, error: Exception) -> None:
        """See `VerbsRailOwner.rail_over`."""
        with self._state:
            # The key of what was exposed from here on would work over the other rails: nobody would close it.
            self._ended.add(rail)
            mine = [number for number, exposure in self._exposed.items() if exposure.rail == rail]
            exposures = [self._exposed.pop(number) for number in mine]
        for exposure in exposures:
            exposure.region.close()
        if isinstance(error, FabricUnavailable):  # what is true of its device, or its peer, is true of the others
            for other in self._rails:
                if other.port is self._rails[rail].port:
                    other.stop(error)
        if not self._closed:
            if isinstance(error, ProtocolError):
                self._handler.failed(error)
            else:
                broke = error if isinstance(error, FabricError) else FabricError(f"verbs rail {rail} broke: {error!r}")
                self._handler.rail_down(rail, broke)
        with self._state:
            self._over.add(rail)
        self._close_ports()


#: Closed in order at exit: the interpreter would do it in any order, and not wait for the threads.
_endpoints: weakref.WeakSet[VerbsEndpoint] = weakref.WeakSet()


@atexit.register
def _close_endpoints() -> None:
    for endpoint in list(_endpoints):
        try:
            endpoint.close()
        except Exception:
            log.exception("a verbs endpoint was not closed in order")  # the others still are


def _leave_to_parent() -> None:
    """In a forked process: what it has inherited is its parent's, and to close it here closes it there."""
    for endpoint in _endpoints:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(endpoint))  # nor does the garbage collector, at the end
    _endpoints.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
