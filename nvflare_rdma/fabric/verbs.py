"""RDMA through libibverbs (pyverbs): the peer's device writes into exposed memory, no CPU of this side takes part.

Every peer has protection domains of its own, so no key of one works for another. A slice is registered when it is
exposed, for exactly its bytes, and deregistered when its write is reported: its key dies with the grant. Memory windows
would spare the pinning, but they are bound by a request in the send queue, behind what is being sent, and the grant
would have to wait for that; some devices (iWARP's) have none.
"""

from __future__ import annotations

import atexit
import functools
import ipaddress
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError
from nvflare_rdma.fabric.base import CompletionHandler, Endpoint, Fabric, Region, RemoteSlice
from nvflare_rdma.fabric.memory import SlotPool
from nvflare_rdma.fabric.process_memory import address_of
from nvflare_rdma.fabric.verbs_api import Access, MemoryRegion, Port, QueuePair
from nvflare_rdma.fabric.verbs_devices import IPAddress, VerbsOptions, choose_gid, choose_ports, list_ports
from nvflare_rdma.fabric.verbs_memory import Lease, RegistrationCache
from nvflare_rdma.fabric.verbs_rail import VerbsRail
from nvflare_rdma.fabric.verbs_setup import RemotePort, RemoteRail, describe, parse

log = logging.getLogger(__name__)

#: From here on registering memory costs less than copying it to memory that is registered already (docs/verbs.md).
IN_PLACE_BYTES = 512 * 1024
_JOIN_TIMEOUT = 10.0


@dataclass(slots=True)
class _Exposure:
    region: MemoryRegion
    memory: memoryview
    rail: int


class VerbsRegion(Region):
    """A buffer of which slices are registered one by one."""

    def __init__(self, endpoint: VerbsEndpoint, buffer: memoryview) -> None:
        self._endpoint = endpoint
        self._buffer = buffer

    def expose(self, notification: int, offset: int, length: int, rail: int) -> RemoteSlice:
        if offset < 0 or length < 0 or offset + length > len(self._buffer):
            raise ValueError(f"slice {offset}+{length} is outside a region of {len(self._buffer)} bytes")
        return self._endpoint.expose(notification, self._buffer[offset : offset + length], rail)

    def revoke(self, notification: int) -> None:
        """Nothing to do: an honest peer may be writing, and its device would stop the rail if it were refused."""

    def close(self) -> None:
        """Slices that are still exposed keep what they need."""


class VerbsEndpoint(Endpoint):
    """``ports``: what rails are spread over; they belong to this endpoint."""

    def __init__(self, handler: CompletionHandler, ports: Sequence[Port], count: int, fabric: VerbsFabric) -> None:
        self._handler = handler
        self._ports = list(ports)
        self._fabric = fabric
        self._state = threading.Lock()
        self._closed = False
        self._rails: list[VerbsRail] = []
        self._started: set[int] = set()
        self._over: set[int] = set()
        #: notification -> what the peer may write, once, and over which rail
        self._exposed: dict[int, _Exposure] = {}
        self._answer: Mapping[str, Any] = {}
        try:
            for number in range(count):
                watches = number < len(self._ports)  # the first rail on a port
                self._rails.append(VerbsRail(number, self._ports[number % len(self._ports)], self, watches))
        except FabricError:
            self.close()
            raise
        _endpoints.add(self)

    # -- life ----------------------------------------------------------------------------------------------

    @property
    def rails(self) -> int:
        return len(self._started)

    @property
    def answer(self) -> Mapping[str, Any]:
        return self._answer

    def describe(self, count: int | None = None) -> Mapping[str, Any]:
        """This side's first ``count`` rails, for the peer."""
        ports = [
            RemotePort(port.info.transport, port.gid, port.lid, port.mtu, port.max_message) for port in self._ports
        ]
        rails = [
            (self._ports.index(rail.port), rail.queue_pair.number, rail.queue_pair.first_packet)
            for rail in self._rails[:count]
        ]
        return describe(ports, rails)

    def connect(self, peer: Sequence[RemoteRail], passive: bool) -> None:
        """Raises FabricError: no rail can be connected."""
        error: FabricError | None = None
        for rail, remote in zip(self._rails, peer, strict=False):
            try:
                self._check(rail.port, remote.port)
                most = min(rail.port.max_message, remote.port.max_message)
                rail.start(functools.partial(self._connect, remote), most, greet=passive)
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
        self.connect(parse(answer), passive=True)

    @staticmethod
    def _check(port: Port, remote: RemotePort) -> None:
        if (port.info.transport, port.gid.family) != (remote.transport, remote.gid.family):
            raise FabricError(
                f"{port.info} uses {port.gid.family}, the peer's port {remote.gid.family}: they can't reach each other"
            )

    def _connect(self, remote: RemoteRail, queue_pair: QueuePair) -> None:
        port = remote.port
        queue_pair.connect(port.gid, port.lid, port.mtu, remote.number, remote.packet, self._fabric.options)

    def drop(self, rail: int) -> None:
        if rail in self._started:
            self._rails[rail].stop(FabricError(f"{self._rails[rail]}: the peer gave it up"))

    def close(self) -> None:
        with self._state:
            self._closed = True
        for rail in self._rails:
            rail.stop(FabricError("closed"))
        for rail in self._rails:
            rail.join(_JOIN_TIMEOUT)
        self._close_ports()

    def _close_ports(self) -> None:
        """When no rail is left: children first (ibv_dealloc_pd(3) fails while there are some)."""
        with self._state:
            if not self._closed or self._started - self._over:
                return  # the last rail's thread does it
            ports, self._ports = self._ports, []
            exposed, self._exposed = self._exposed, {}
        for exposure in exposed.values():
            exposure.region.close()
        for port in ports:
            self._fabric.cache.drop(port)
            port.close()

    # -- receiving -----------------------------------------------------------------------------------------

    def register(self, buffer: memoryview) -> VerbsRegion:
        return VerbsRegion(self, buffer)

    def expose(self, notification: int, memory: memoryview, rail: int) -> RemoteSlice:
        """See `Region.expose`."""
        on = self._rails[rail]
        try:
            region = on.port.register(address_of(memory), len(memory), Access.EXPOSED)
        except FabricError as error:
            # The rail ends, and with it what is granted over it: `rail_down` says why.
            on.stop(error)
            return RemoteSlice(0, 0, len(memory))
        with self._state:
            if rail in self._over or self._closed:
                stale = True
            else:
                self._exposed[notification] = _Exposure(region, memory, rail)
                stale = False
        if stale:
            region.close()
            return RemoteSlice(0, 0, len(memory))
        try:
            on.expect()
        except FabricError as error:
            on.stop(error)
        return RemoteSlice(region.rkey, address_of(memory), len(memory))

    def take(self, rail: int, notification: int) -> None:
        with self._state:
            exposure = self._exposed.get(notification)
            if exposure is None or exposure.rail != rail:
                raise ProtocolError(f"the peer answered slice {notification} over rail {rail}: it is not exposed there")
            del self._exposed[notification]
        exposure.region.close()

    def landed(self, notification: int, length: int, digest: int) -> None:
        self._handler.landed(notification, length, digest)

    # -- sending -------------------------------------------------------------------------------------------

    def write(self, rail: int, source: memoryview, remote: RemoteSlice, notification: int, digest: int) -> None:
        if len(source) > remote.length:
            raise ValueError(f"a write of {len(source)} bytes does not fit a slice of {remote.length}")
        self._rails[rail].write(source, remote, notification, digest)

    def lease(self, port: Port, source: memoryview, abandoned: Callable[[], bool]) -> Lease:
        fabric = self._fabric
        if len(source) < IN_PLACE_BYTES:
            slot = fabric.pool.take(len(source))
            slot[:] = source
            source = slot
        return fabric.cache.acquire(port, lambda at, size: port.register(at, size, Access.SOURCE), source, abandoned)

    def release(self, lease: Lease) -> None:
        self._fabric.cache.release(lease)

    def abandon(self) -> None:
        self._fabric.cache.wake()

    def written(self, notification: int) -> None:
        self._handler.written(notification)

    # -- the end of a rail ---------------------------------------------------------------------------------

    def rail_over(self, rail: int, error: Exception) -> None:
        with self._state:
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
        endpoint.close()


class VerbsFabric(Fabric):
    """``rails``: queue pairs to a peer. ``cache``: registered source memory, of all peers. ``near``: this side's
    address on the control stream, whose network is the best guess for the data too."""

    name = "verbs"

    def __init__(
        self, rails: int, options: VerbsOptions, cache: RegistrationCache, near: IPAddress | None = None
    ) -> None:
        self.options = options
        self.cache = cache
        self.pool = SlotPool()
        self._count = rails
        self._near = near

    def offer(self, handler: CompletionHandler) -> tuple[VerbsEndpoint, Mapping[str, Any]]:
        endpoint = self._open(handler, self._count, "")
        return endpoint, endpoint.describe()

    def connect(self, offer: Mapping[str, Any], handler: CompletionHandler) -> VerbsEndpoint:
        peer = parse(offer)
        endpoint = self._open(handler, min(self._count, len(peer)), peer[0].port.gid.family)
        try:
            endpoint.connect(peer, passive=False)
        except FabricError:
            endpoint.close()
            raise
        return endpoint

    def _open(self, handler: CompletionHandler, count: int, family: str) -> VerbsEndpoint:
        options = self.options
        ports: list[Port] = []
        try:
            for info in choose_ports(list_ports(), options)[:count]:
                gid, why = choose_gid(info, options, self._near, family)
                log.info("verbs: %s, %s: %s", info, gid, why)
                ports.append(Port(info, gid))
        except FabricError:
            for port in ports:
                port.close()
            raise
        return VerbsEndpoint(handler, ports, count, self)


def address_on(host: str) -> IPAddress | None:
    """An address of a socket, for ``near``."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address
