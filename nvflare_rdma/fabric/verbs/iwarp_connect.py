"""iWARP queue pairs, connected by rdma_cm (rdma_cm(7)) through pyverbs: nothing else can, because TCP and MPA (RFC
5044) are the device's. It connects and does no more: queue pairs are made in a context of this package, and what they
flush tells when a connection has ended.

The active side connects, here, to where the passive side listens (`iwarp_listen`). Nothing may wait in librdmacm,
because pyverbs keeps the GIL: event channels are set not to block and are polled.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.interfaces import IPAddress
from nvflare_rdma.fabric.verbs.description import RemoteRail
from nvflare_rdma.fabric.verbs.ports import Port, descriptors, nothing_came, translated, with_descriptor
from nvflare_rdma.fabric.verbs.pyverbs import CMID, AddrInfo, CMEvent, CMEventChannel, ConnParam, PyverbsError, ce
from nvflare_rdma.fabric.verbs.queue_pair import QueuePair
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

#: For all rails of a peer. Longer than devices wait for the peer's answer (siw: 10 s): an identifier that is destroyed
#: before that waits for it in the kernel, and no thread of this process runs meanwhile.
CONNECT_TIMEOUT = 20.0
#: So many source ports are tried. Of the usual 28,000 a few hundred are in use at most.
_CONNECT_ATTEMPTS = 5
_HINTS = {
    ce.RDMA_CM_EVENT_ADDR_ERROR: "there is no route to it, or no neighbour with that address answers",
    ce.RDMA_CM_EVENT_ROUTE_ERROR: "there is no route to it",
    ce.RDMA_CM_EVENT_CONNECT_ERROR: "the connection broke while it was made",
    ce.RDMA_CM_EVENT_UNREACHABLE: "it did not answer in time",
    ce.RDMA_CM_EVENT_REJECTED: "the peer refused the rail's ticket (it is used up or has expired), or listens no more",
    ce.RDMA_CM_EVENT_DEVICE_REMOVAL: "the device was removed",
}


class Events:
    """An event channel, whose descriptor is `fd`."""

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
                if not nothing_came(error):
                    raise FabricError(f"rdma_cm gives no events any more: {error}") from error
                event = None
            try:
                yield event
            finally:
                if event is not None:
                    event.ack_cm_event()

    def expect(self, kind: int, what: str, deadline: float) -> None:
        """Wait for an event. Raises FabricError: another one came, or none before the `deadline`."""
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
        """Close the event channel."""
        self.channel.close()


class Identifier:
    """An rdma_cm_id: a listener, or a connection."""

    def __init__(self, cmid: Any) -> None:
        self.cmid = cmid

    @property
    def device(self) -> str:
        """Name of the device, "" if none is bound yet."""
        return str(self.cmid.dev_name)

    def close(self) -> None:
        """What is connected is disconnected, who asks to be is rejected."""
        with descriptors:
            self.cmid.close()


def make_identifier(events: Events, device: str) -> Identifier:
    """An identifier whose events come to `events`. Raises FabricError."""
    with translated(device, "making an identifier of rdma_cm"), descriptors:
        return Identifier(CMID(creator=events.channel, port_space=ce.RDMA_PS_TCP))


def connect_by_cm(port: Port, remote: RemoteRail, deadline: float, queue_pair: QueuePair) -> None:
    """Active side: connect `queue_pair` to where the peer listens. Both ways are open when this side has sent.

    Raises:
        FabricError: the peer can't be reached, or does not take the ticket. ProtocolError: it does not listen.
    """
    if not remote.port.service:
        raise ProtocolError("the peer offers an iWARP rail, but not where it listens for it")
    device, address = port.info.device, remote.port.gid.address
    events = Events(device)
    queue_pair.keep(events)
    parameters = ConnParam(qp_num=queue_pair.number, data_len=len(remote.ticket))
    parameters.set_private_data(remote.ticket)
    identifier = _find_way(events, port, remote, deadline, queue_pair)
    with contextlib.ExitStack() as passed_over, _tried(port, address, remote.port.service, deadline):
        what = f"connecting a queue pair to {address} port {remote.port.service}"
        # rdma_cm chooses a source port that no identifier has, and siw then binds a TCP socket to it. TCP refuses if it
        # has given the port away meanwhile: to anyone's socket, to the trial here, or to one that was closed less than
        # a minute ago (TIME_WAIT), as each rail's trial was.
        for attempt in range(1, _CONNECT_ATTEMPTS + 1):
            try:
                with translated(device, what):
                    identifier.cmid.connect(parameters)
                break
            except FabricError as error:
                if attempt == _CONNECT_ATTEMPTS or not _address_in_use(error):
                    raise
                passed_over.callback(_give_up, identifier)  # not yet: it has the port, so the next one gets another
                identifier = _find_way(events, port, remote, deadline, queue_pair)
        events.expect(ce.RDMA_CM_EVENT_ESTABLISHED, what, deadline)


def _find_way(events: Events, port: Port, remote: RemoteRail, deadline: float, queue_pair: QueuePair) -> Identifier:
    """An identifier that can connect to the peer. `queue_pair` keeps it."""
    device, address = port.info.device, remote.port.gid.address
    peer = f"{address} port {remote.port.service}"
    identifier = make_identifier(events, device)
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
    return identifier


def _give_up(identifier: Identifier) -> None:
    with contextlib.suppress(PyverbsError):  # another one is connected; the queue pair closes this one again
        identifier.close()


def _address_in_use(error: FabricError) -> bool:
    return getattr(error.__cause__, "error_code", None) == errno.EADDRINUSE


def _milliseconds(deadline: float) -> int:
    return max(1, int((deadline - time.monotonic()) * 1000))


@contextlib.contextmanager
def _tried(port: Port, address: IPAddress, service: int, deadline: float) -> Iterator[None]:
    """siw (siw_cm.c) connects TCP inside of rdma_connect(3), for two minutes where packets are dropped, and that would
    stop every thread of this process: a connection of this side's own shows first that it won't. It is kept until the
    rail is connected, because a listener of siw ends if a connection ends before it was taken from the queue (docs/
    verbs.md)."""
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
