"""iWARP queue pairs, connected by rdma_cm (rdma_cm(7)) through pyverbs: nothing else can, because TCP and MPA (RFC
5044) are the device's. It connects and does no more: queue pairs are made in a context of this package, and what they
flush tells when a connection has ended.

The passive side listens and lets in whoever presents a ticket, once; `verbs_setup` tells the peer where, and the
tickets. Nothing here may wait in librdmacm, because pyverbs keeps the GIL: event channels are set not to block and are
polled.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError
from nvflare_rdma.fabric.interfaces import IPAddress
from nvflare_rdma.fabric.verbs_api import Port, close_all, descriptors, translated, with_descriptor
from nvflare_rdma.fabric.verbs_import import CMID, AddrInfo, CMEvent, CMEventChannel, ConnParam, PyverbsError, ce
from nvflare_rdma.fabric.verbs_queue_pair import QueuePair
from nvflare_rdma.fabric.verbs_setup import RemoteRail

log = logging.getLogger(__name__)

TICKET_LIFETIME = 30.0
#: For all rails of a peer. Longer than devices wait for the peer's answer (siw: 10 s): an identifier that is destroyed
#: before that waits for it in the kernel, and no thread of this process runs meanwhile.
CONNECT_TIMEOUT = 20.0
_LISTEN_ATTEMPTS = 10
_HINTS = {
    ce.RDMA_CM_EVENT_ADDR_ERROR: "there is no route to it, or no neighbour with that address answers",
    ce.RDMA_CM_EVENT_ROUTE_ERROR: "there is no route to it",
    ce.RDMA_CM_EVENT_CONNECT_ERROR: "the connection broke while it was made",
    ce.RDMA_CM_EVENT_UNREACHABLE: "it did not answer in time",
    ce.RDMA_CM_EVENT_REJECTED: "the peer refused the rail's ticket (it is used up or has expired), or listens no more",
    ce.RDMA_CM_EVENT_DEVICE_REMOVAL: "the device was removed",
}


class _Events:
    """An event channel, whose descriptor is ``fd``."""

    def __init__(self, device: str) -> None:
        self._device = device
        with translated(device, "opening an event channel of rdma_cm (`modprobe rdma_ucm`, /dev/infiniband/rdma_cm)"):
            self.channel, self.fd = with_descriptor(CMEventChannel, "fd", "rdma_cm")

    @contextlib.contextmanager
    def next(self) -> Iterator[Any]:
        """The next event, or None if there is none. An identifier is not destroyed before its event is acknowledged,
        and waits for that with the GIL held: hence under the lock, as all that destroys one. librdmacm may open the
        device here."""
        with descriptors:
            try:
                event = CMEvent(self.channel)
            except PyverbsError as error:
                if getattr(error, "error_code", 0) not in (errno.EAGAIN, errno.EWOULDBLOCK):
                    raise FabricError(f"rdma_cm gives no events any more: {error}") from error
                event = None
            try:
                yield event
            finally:
                if event is not None:
                    event.ack_cm_event()

    def expect(self, kind: int, what: str, deadline: float) -> None:
        """Wait for an event. Raises FabricError: another one came, or none before the ``deadline``."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise FabricError(f"{self._device}: {what} failed: no answer within {CONNECT_TIMEOUT:.0f} s")
            poller.poll(left * 1000)
            with self.next() as event:
                if event is None:
                    continue
                if event.event_type == kind:
                    return
                hint = _HINTS.get(event.event_type, "")
                text = f"{self._device}: {what} failed: {event.event_str()}"
                raise FabricError(f"{text}{f' ({hint})' if hint else ''}")

    def close(self) -> None:
        self.channel.close()


class _Identifier:
    """An rdma_cm_id: a listener, or a connection."""

    def __init__(self, cmid: Any) -> None:
        self.cmid = cmid

    @property
    def device(self) -> str:
        return str(self.cmid.dev_name)

    def close(self) -> None:
        """What is connected is disconnected, who asks to be is rejected."""
        with descriptors:
            self.cmid.close()


def _make_identifier(events: _Events, device: str) -> _Identifier:
    with translated(device, "making an identifier of rdma_cm"), descriptors:
        return _Identifier(CMID(creator=events.channel, port_space=ce.RDMA_PS_TCP))


def connect_by_cm(port: Port, remote: RemoteRail, deadline: float, queue_pair: QueuePair) -> None:
    """Active side: connect ``queue_pair`` to where the peer listens. Both ways are open when this side has sent.

    Raises:
        FabricError: the peer can't be reached, or does not take the ticket. ProtocolError: it does not listen.
    """
    if not remote.port.service:
        raise ProtocolError("the peer offers an iWARP rail, but not where it listens for it")
    device, address = port.info.device, remote.port.gid.address
    peer = f"{address} port {remote.port.service}"
    events = _Events(device)
    queue_pair.keep(events)
    identifier = _make_identifier(events, device)
    queue_pair.keep(identifier)
    cmid, what = identifier.cmid, f"finding a way from {port.gid.address} to {peer}"
    with translated(device, what):
        ends = {"src": str(port.gid.address), "dst": str(address), "dst_service": str(remote.port.service)}
        addresses = AddrInfo(**ends, port_space=ce.RDMA_PS_TCP, flags=ce.RAI_NUMERICHOST)
        cmid.resolve_addr(addresses, _milliseconds(deadline))
    events.expect(ce.RDMA_CM_EVENT_ADDR_RESOLVED, what, deadline)
    if identifier.device != device:
        raise FabricError(f"{device}: the way from {port.gid.address} to {peer} is by the device {identifier.device}")
    with translated(device, what), descriptors:
        cmid.resolve_route(_milliseconds(deadline))
    events.expect(ce.RDMA_CM_EVENT_ROUTE_RESOLVED, what, deadline)
    parameters = ConnParam(qp_num=queue_pair.number, data_len=len(remote.ticket))
    parameters.set_private_data(remote.ticket)
    with _tried(port, address, remote.port.service, deadline):
        what = f"connecting a queue pair to {peer}"
        with translated(device, what):
            cmid.connect(parameters)
        events.expect(ce.RDMA_CM_EVENT_ESTABLISHED, what, deadline)


def _milliseconds(deadline: float) -> int:
    return max(1, int((deadline - time.monotonic()) * 1000))


@contextlib.contextmanager
def _tried(port: Port, address: IPAddress, service: int, deadline: float) -> Iterator[None]:
    """siw (siw_cm.c) connects TCP inside of rdma_connect(3), for two minutes where packets are dropped, and that would
    stop every thread of this process: a connection of this side's own shows first that it won't. It is kept until the
    rail is connected, because a listener of siw ends if a connection ends that it has not taken yet."""
    if not port.info.software:
        yield
        return
    left = max(0.001, deadline - time.monotonic())
    try:
        trial = socket.create_connection((str(address), service), left, (str(port.gid.address), 0))
    except OSError as error:
        raise FabricError(f"{port.info.device}: {address} port {service} does not answer: {error}") from error
    with trial:
        yield


class Listener:
    """Passive side: takes one connection for each ticket, for `TICKET_LIFETIME`.

    ``offered``: ticket -> the queue pair that it is for. Queue pairs may be closed after `stop`, and this after them.
    """

    def __init__(self, offered: Mapping[bytes, tuple[Port, QueuePair]]) -> None:
        self._waiting = dict(offered)
        self._taken: set[bytes] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._listening: list[Any] = []
        self._open: list[Any] = []
        #: port -> TCP port
        self.services: dict[Port, int] = {}
        ports = list(dict.fromkeys(port for port, _ in offered.values()))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._device = ports[0].info.device
            self._events = _Events(self._device)
            self._open.append(self._events)
            for port in ports:
                self.services[port] = self._listen(port, 2 * len(offered) + 8)
            self._thread = threading.Thread(target=self._run, name="rdma-verbs-cm", daemon=True)
            self._thread.start()
        except (FabricError, RuntimeError) as error:
            self._thread = None
            self.close()
            raise FabricUnavailable(f"iWARP rails can't be listened for: {error}") from error

    def _listen(self, port: Port, backlog: int) -> int:
        address, device = port.gid.address, port.info.device
        for attempt in range(_LISTEN_ATTEMPTS):
            # rdma_cm can choose a port by itself, but pyverbs does not tell which.
            service = _free_service(address)
            identifier = _make_identifier(self._events, device)
            self._listening.append(identifier)
            try:
                with translated(device, f"listening on {address} port {service}"), descriptors:
                    flags = ce.RAI_PASSIVE | ce.RAI_NUMERICHOST
                    here = AddrInfo(src=str(address), src_service=str(service), port_space=ce.RDMA_PS_TCP, flags=flags)
                    identifier.cmid.bind_addr(here)
                    identifier.cmid.listen(backlog)
            except FabricError:
                if attempt == _LISTEN_ATTEMPTS - 1:
                    raise
                self._listening.pop().close()
                continue
            if identifier.device != device:
                raise FabricUnavailable(f"{device}: its address {address} belongs to the device {identifier.device}")
            return service
        raise AssertionError("unreachable")

    def has_taken(self, ticket: bytes) -> bool:
        """Whether the peer has come with ``ticket``."""
        with self._lock:
            return ticket in self._taken

    def stop(self) -> None:
        """Tickets that were not used are void. Idempotent."""
        self._stopped = True
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """After the queue pairs: their connections are on this event channel."""
        self.stop()
        close_all(self._listening)
        close_all(self._open)
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _run(self) -> None:
        poller = select.poll()
        for fd in (self._events.fd, self._wake):
            poller.register(fd, select.POLLIN)
        end = time.monotonic() + TICKET_LIFETIME
        try:
            while self._waiting and not self._stopped and (left := end - time.monotonic()) > 0:
                poller.poll(left * 1000)
                while not self._stopped and self._take_event():
                    pass
        except FabricError as error:
            log.warning("the listener for verbs rails has ended: %s", error)
        close_all(self._listening)

    def _take_event(self) -> bool:
        with self._events.next() as event:
            if event is None:
                return False
            if event.event_type != ce.RDMA_CM_EVENT_CONNECT_REQUEST:
                # Of a connection, but pyverbs does not say of which. Its queue pair knows.
                return True
            with translated(self._device, "taking a connection request"):
                ticket = event.private_data
                request = _Identifier(CMID(creator=event, listen_id=self._listening[0].cmid))
        if not self._accept(request, ticket):
            request.close()
        return True

    def _accept(self, request: _Identifier, ticket: bytes) -> bool:
        with self._lock:
            port, queue_pair = self._waiting.get(ticket, (None, None))
            if port is None or queue_pair is None or request.device != port.info.device:
                # The number of a queue pair means another one, anyone's, on another device.
                log.warning("refused a verbs rail: its ticket is none that waits here (used up, or never given out)")
                return False
            del self._waiting[ticket]
            try:
                with translated(port.info.device, "accepting a rail"):
                    request.cmid.accept(ConnParam(qp_num=queue_pair.number))
            except FabricError as error:
                log.warning("a verbs rail was not accepted: %s", error)
                return False
            queue_pair.keep(request)
            self._taken.add(ticket)
            return True


def _free_service(address: IPAddress) -> int:
    """A TCP port that is free now."""
    family = socket.AF_INET if isinstance(address, ipaddress.IPv4Address) else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError as error:
            raise FabricUnavailable(f"the address {address} can't be listened on: {error}") from error
        return int(sock.getsockname()[1])
