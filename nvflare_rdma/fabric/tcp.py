"""One-sided writes emulated over parallel TCP connections (rails).

A write is a 24-byte header and the payload, sent straight from the source buffer and received straight into
the exposed slice. Rails are dialled to the port of the control stream, so a firewall needs no second hole;
each presents a ticket that the passive side gave out over the control stream and that works once.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import secrets
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.base import CompletionHandler, Endpoint, Fabric, Region, RemoteSlice

RAIL_MAGIC = b"NVFRAIL1"
TICKET_BYTES = 32
PREAMBLE_BYTES = len(RAIL_MAGIC) + TICKET_BYTES
TICKET_LIFETIME = 30.0
MAX_RAILS = 64
_ADMITTED, _REFUSED = b"\x01", b"\x00"

# key (u64), address (u64), length (u32), notification (u32), network byte order.
_HEADER = struct.Struct("!QQII")


def receive_exactly(sock: socket.socket, buffer: memoryview) -> None:
    """Fill ``buffer`` from a blocking socket. Raises ``ConnectionError`` if the peer closes first."""
    got, size = 0, len(buffer)
    while got < size:
        n = sock.recv_into(buffer[got:])
        if n == 0:
            raise ConnectionError("closed by the peer")
        got += n


def _send_all(sock: socket.socket, header: bytes, payload: memoryview) -> None:
    sent = sock.sendmsg([header, payload])
    if sent < len(header):
        sock.sendall(header[sent:])
        sent = len(header)
    if sent - len(header) < len(payload):
        sock.sendall(payload[sent - len(header) :])


class TcpRegion(Region):
    def __init__(self, endpoint: TcpEndpoint, key: int, buffer: memoryview) -> None:
        self._endpoint = endpoint
        self._key = key
        self._buffer = buffer
        self._mine: set[int] = set()

    def expose(self, notification: int, offset: int, length: int) -> RemoteSlice:
        if offset < 0 or length < 0 or offset + length > len(self._buffer):
            raise ValueError(f"slice {offset}+{length} is outside a region of {len(self._buffer)} bytes")
        remote = RemoteSlice(self._key, offset, length)
        self._mine.add(notification)
        self._endpoint.exposed[notification] = (remote, self._buffer[offset : offset + length])
        return remote

    def revoke(self, notification: int) -> None:
        self._mine.discard(notification)
        self._endpoint.exposed.pop(notification, None)

    def close(self) -> None:
        for notification in self._mine:
            self._endpoint.exposed.pop(notification, None)
        self._mine.clear()


class TcpEndpoint(Endpoint):
    def __init__(self, handler: CompletionHandler) -> None:
        self._handler = handler
        self._keys = itertools.count(1)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        # One queue for all rails: a rail that is slow simply takes fewer writes.
        self._writes: queue.SimpleQueue[tuple[memoryview, RemoteSlice, int] | None] = queue.SimpleQueue()
        #: notification -> what the peer may write there, once. Popping is atomic and is the revocation.
        self.exposed: dict[int, tuple[RemoteSlice, memoryview]] = {}

    @property
    def rails(self) -> int:
        return len(self._sockets)

    def register(self, buffer: memoryview) -> TcpRegion:
        return TcpRegion(self, next(self._keys), buffer)

    def write(self, source: memoryview, remote: RemoteSlice, notification: int) -> None:
        if self._closed:
            raise FabricError("can't write over tcp: the endpoint is closed")
        if len(source) > remote.length:
            raise FabricError(f"a write of {len(source)} bytes does not fit a slice of {remote.length}")
        self._writes.put((source, remote, notification))

    def attach(self, sock: socket.socket) -> None:
        """Take over a connected, admitted socket as one more rail."""
        try:
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError:
            sock.close()  # the peer has gone again
            return
        with self._lock:
            if self._closed:
                sock.close()
                return
            self._sockets.append(sock)
            for loop, role in ((self._receive_loop, "rx"), (self._send_loop, "tx")):
                thread = threading.Thread(
                    target=loop, args=(sock,), name=f"rdma-tcp-{role}-{sock.fileno()}", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sockets, threads = list(self._sockets), list(self._threads)
        for sock in sockets:
            self._writes.put(None)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)
        for sock in sockets:
            sock.close()
        self.exposed.clear()

    def _send_loop(self, sock: socket.socket) -> None:
        try:
            while (item := self._writes.get()) is not None:
                source, remote, notification = item
                _send_all(sock, _HEADER.pack(remote.key, remote.address, len(source), notification), source)
                self._handler.written(notification)
                del item, source  # keep no reference to the buffer while waiting for the next write
        except OSError as error:
            self._broken(error)

    def _receive_loop(self, sock: socket.socket) -> None:
        header = memoryview(bytearray(_HEADER.size))
        try:
            while True:
                receive_exactly(sock, header)
                key, address, length, notification = _HEADER.unpack(header)
                entry = self.exposed.pop(notification, None)
                if entry is None:
                    raise ProtocolError(f"the peer wrote {length} bytes to slice {notification}, which is not exposed")
                remote, target = entry
                if (key, address) != (remote.key, remote.address) or length > remote.length:
                    raise ProtocolError(
                        f"the peer wrote {length} bytes at {key}:{address}, but slice {notification} is "
                        f"{remote.length} bytes at {remote.key}:{remote.address}"
                    )
                receive_exactly(sock, target[:length])
                del entry, target
                self._handler.landed(notification, length)
        except (OSError, ProtocolError) as error:
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        if self._closed:
            return
        if isinstance(error, OSError):
            error = FabricError(f"a tcp rail broke: {error}")
        self._handler.failed(error)


class TcpFabric(Fabric):
    """``rails``: connections a peer may open. ``dial``: connects one socket to the peer (active side only)."""

    name = "tcp"

    def __init__(self, rails: int, dial: Callable[[], socket.socket] | None = None) -> None:
        self._rails = rails
        self._dial = dial
        self._tickets: dict[bytes, tuple[weakref.ref[TcpEndpoint], float]] = {}  # with when they expire
        self._lock = threading.Lock()

    def offer(self, handler: CompletionHandler) -> tuple[TcpEndpoint, Mapping[str, Any]]:
        endpoint = TcpEndpoint(handler)
        tickets = [secrets.token_bytes(TICKET_BYTES) for _ in range(self._rails)]
        now = time.monotonic()
        with self._lock:
            self._tickets = {t: e for t, e in self._tickets.items() if e[1] > now}
            for ticket in tickets:
                self._tickets[ticket] = (weakref.ref(endpoint), now + TICKET_LIFETIME)
        return endpoint, {"tickets": tickets}

    def admit(self, sock: socket.socket, ticket: bytes) -> bool:
        """Passive side: a connection that began with `RAIL_MAGIC` presents ``ticket``. False: refused, closed."""
        with self._lock:
            entry = self._tickets.pop(ticket, None)
        endpoint = entry[0]() if entry is not None and entry[1] > time.monotonic() else None
        if endpoint is None:
            with contextlib.suppress(OSError):
                sock.sendall(_REFUSED)
            sock.close()
            return False
        try:
            sock.sendall(_ADMITTED)
        except OSError:
            sock.close()
            return False
        # What the peer writes before this waits in the socket's buffer.
        endpoint.attach(sock)
        return True

    def connect(self, offer: Mapping[str, Any], handler: CompletionHandler) -> TcpEndpoint:
        tickets = offer.get("tickets")
        if (
            not isinstance(tickets, list)
            or not 0 < len(tickets) <= MAX_RAILS
            or any(not isinstance(t, bytes) or len(t) != TICKET_BYTES for t in tickets)
        ):
            raise ProtocolError("the peer's tcp offer has no list of rail tickets")
        if self._dial is None:
            raise FabricError("this side of the tcp fabric can't dial: it was made to listen")
        endpoint = TcpEndpoint(handler)
        error: Exception | None = None
        for ticket in tickets[: self._rails]:
            try:
                endpoint.attach(self._open_rail(self._dial, ticket))
            except OSError as e:
                error = e
                break
        if endpoint.rails == 0:
            raise FabricError(f"no tcp rail could be opened: {error}")
        return endpoint

    @staticmethod
    def _open_rail(dial: Callable[[], socket.socket], ticket: bytes) -> socket.socket:
        sock = dial()
        try:
            sock.sendall(RAIL_MAGIC + ticket)
            answer = memoryview(bytearray(1))
            receive_exactly(sock, answer)
            if bytes(answer) != _ADMITTED:
                raise FabricError("the peer refused the rail's ticket (it is used up or has expired)")
        except OSError:
            sock.close()
            raise
        return sock
