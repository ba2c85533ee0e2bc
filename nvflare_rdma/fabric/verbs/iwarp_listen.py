"""The passive side of iWARP rails: listens, and lets in whoever presents a ticket, once. `description` tells the peer
where, and the tickets. See `iwarp_connect`.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Mapping

from nvflare_rdma.errors import FabricError, FabricUnavailable
from nvflare_rdma.fabric.interfaces import IPAddress
from nvflare_rdma.fabric.verbs.iwarp_connect import Events, Identifier, make_identifier
from nvflare_rdma.fabric.verbs.ports import Port, close_all, descriptors, make_event, translated
from nvflare_rdma.fabric.verbs.pyverbs import CMID, AddrInfo, ConnParam, ce
from nvflare_rdma.fabric.verbs.queue_pair import QueuePair
from nvflare_rdma.logs import Seldom, get_logger

log = get_logger(__name__)
#: Of all listeners of the process: there is a new one for each link that opens.
_strangers = Seldom()

TICKET_LIFETIME = 30.0
_LISTEN_ATTEMPTS = 10


class IwarpListener:
    """Passive side: takes one connection for each ticket, for `TICKET_LIFETIME`.

    `offered`: ticket -> the queue pair that it is for. Queue pairs may be closed after `stop`, and this after them.
    """

    def __init__(self, offered: Mapping[bytes, tuple[Port, QueuePair]]) -> None:
        self._waiting = dict(offered)
        self._taken: set[bytes] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Lock()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._listening: list[Identifier] = []
        self._open: list[Events] = []
        #: port -> TCP port
        self.services: dict[Port, int] = {}
        ports = list(dict.fromkeys(port for port, _ in offered.values()))
        self._device = ports[0].info.device
        self._wake = make_event(self._device)
        try:
            self._events = Events(self._device)
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
            identifier = make_identifier(self._events, device)
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
        """Whether the peer has come with `ticket`."""
        with self._lock:
            return ticket in self._taken

    def stop(self) -> None:
        """Tickets that were not used are void. Idempotent."""
        self._stopped = True
        with self._stopping:
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
                while not self._stopped and time.monotonic() < end and self._take_event():
                    pass
        except Exception as error:  # noqa: BLE001 - the peer hears of it: nobody listens any more
            log.warning("the listener for verbs rails has ended, and rails that have not come won't: %r", error)
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
                request = Identifier(CMID(creator=event, listen_id=self._listening[0].cmid))
        if not self._accept(request, ticket):
            request.close()
        return True

    def _accept(self, request: Identifier, ticket: bytes) -> bool:
        with self._lock:
            port, queue_pair = self._waiting.get(ticket, (None, None))
            if port is None or queue_pair is None or request.device != port.info.device:
                # The number of a queue pair means another one, anyone's, on another device.
                # Whoever reaches this address may come again and again: it is to be seen, and not to fill the log.
                text = "refused a verbs rail: its ticket is none that waits here (used up, or never given out)"
                log.log(_strangers.level(logging.WARNING), text)
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
