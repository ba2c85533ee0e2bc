"""One-sided writes emulated over parallel TCP connections (rails).

A write is a header and the payload, sent straight from the source buffer and received straight into the exposed
slice. Rails are dialled to the port of the control stream, so a firewall needs no second hole; each presents a
ticket that the passive side gave out over the control stream and that works once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import secrets
import socket
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from nvflare_rdma.errors import ConfigError, FabricError, ProtocolError
from nvflare_rdma.fabric.base import MAX_RAILS, CompletionHandler, Endpoint, Fabric, Region, RemoteSlice
from nvflare_rdma.fabric.options import Availability, FabricOptions
from nvflare_rdma.fabric.rail_count import FEW_RAILS, LossWatch, rails_for_round_trip, round_trip
from nvflare_rdma.fabric.registry import LinkEnd
from nvflare_rdma.fabric.sockets import acknowledged, keep_alive, seconds_since_acknowledgement
from nvflare_rdma.fabric.threads import join_threads
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

RAIL_MAGIC = b"NVFRAIL2"
TICKET_BYTES = 32
PREAMBLE_BYTES = len(RAIL_MAGIC) + TICKET_BYTES
TICKET_LIFETIME = 30.0
#: For all rails of a peer together, so that one that takes its time for each does not hold who dials them; the last one
#: may take as long as `TcpFabric`'s `dial` besides.
CONNECT_TIMEOUT = 10.0
_ADMITTED, _REFUSED = b"\x01", b"\x00"
#: A firewall or NAT on the way may forget a rail that is idle for so long (seconds). What is written then has to be
#: acknowledged within `_PROOF_SECONDS`, or a part of it; a rail in use may be without an answer for `DEAD_AFTER`.
_IDLE_SECONDS = 5.0
#: How long `TcpEndpoint.close` waits for all its threads.
_END_SECONDS = 5.0
_PROOF_SECONDS = 5.0

# key (u64), address (u64), digest (u64), length (u32), notification (u32); then the CRC-32 of these.
_FIELDS = struct.Struct("!QQQII")
_CRC = struct.Struct("!I")
HEADER_BYTES = _FIELDS.size + _CRC.size
_SCRATCH_BYTES = 64 * 1024


def pack_header(remote: RemoteSlice, length: int, notification: int, digest: int) -> bytes:
    """What precedes the payload of a write."""
    fields = _FIELDS.pack(remote.key, remote.address, digest, length, notification)
    return fields + _CRC.pack(zlib.crc32(fields))


def congestion_controls() -> tuple[str, ...]:
    """What `rdma_tcp_congestion` can be here (tcp(7), TCP_CONGESTION)."""
    try:
        with open("/proc/sys/net/ipv4/tcp_available_congestion_control", encoding="ascii") as file:
            return tuple(file.read().split())
    except OSError:
        return ()


def receive_exactly(sock: socket.socket, buffer: memoryview) -> None:
    """Fill `buffer` from a blocking socket. Raises `ConnectionError` if the peer closes first."""
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
    """A buffer of which slices are exposed."""

    def __init__(self, endpoint: TcpEndpoint, key: int, buffer: memoryview) -> None:
        self._endpoint = endpoint
        self._key = key
        self._buffer = buffer
        self._mine: set[int] = set()

    def expose(self, notification: int, offset: int, length: int, rail: int) -> RemoteSlice:
        """See `Region.expose`."""
        if offset < 0 or length < 0 or offset + length > len(self._buffer):
            raise ValueError(f"slice {offset}+{length} is outside a region of {len(self._buffer)} bytes")
        remote = RemoteSlice(self._key, offset, length)
        self._mine.add(notification)
        self._endpoint.exposed[notification] = (remote, rail, self._buffer[offset : offset + length])
        return remote

    def revoke(self, notification: int) -> None:
        """See `Region.revoke`."""
        self._mine.discard(notification)
        self._endpoint.revoke(notification)

    def close(self) -> None:
        """See `Region.close`."""
        for notification in self._mine:
            self._endpoint.revoke(notification)
        self._mine.clear()


class TcpEndpoint(Endpoint):
    """One peer over at most `most` TCP connections. `congestion` names the kernel's congestion control for them, "" is
    the system's default. On the active side `open_rail` opens the rail of a number, within a deadline."""

    def __init__(
        self,
        handler: CompletionHandler,
        most: int,
        congestion: str = "",
        open_rail: Callable[[int, float], socket.socket] | None = None,
    ) -> None:
        self._handler = handler
        self._most = most
        self._congestion = congestion
        self._open_rail = open_rail
        self._dialled = 0
        self._refused = False  # a rail could not be opened
        self._losses = LossWatch()
        self._keys = itertools.count(1)
        self._lock = threading.Lock()
        self._sockets: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._down: set[int] = set()
        self._closed = False
        #: Rail -> when a write over it ended, or it brought something.
        self._used_at: dict[int, float] = {}
        #: Rails in the middle of a chunk, and in which direction.
        self._busy: set[tuple[int, str]] = set()
        #: Rail -> when it was written to after it was idle, how long it had been, and the bytes acknowledged before.
        self._doubted: dict[int, tuple[float, float, int]] = {}
        self._dead: dict[int, str] = {}
        #: notification -> what the peer may write there, once, and over which rail; no memory once it is revoked.
        #: Popping is atomic: whoever pops an entry closes the slice.
        self.exposed: dict[int, tuple[RemoteSlice, int, memoryview | None]] = {}

    @property
    def rails(self) -> int:
        """See `Endpoint.rails`."""
        return len(self._sockets)

    @property
    def most_rails(self) -> int:
        """See `Endpoint.most_rails`."""
        return self._most

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def register(self, buffer: memoryview) -> TcpRegion:
        """See `Endpoint.register`."""
        return TcpRegion(self, next(self._keys), buffer)

    def revoke(self, notification: int) -> None:
        """See `Region.revoke`."""
        with self._lock:  # two revocations: what the rail takes meanwhile is gone and stays gone
            entry = self.exposed.pop(notification, None)
            if entry is not None and entry[1] not in self._down and not self._closed:
                self.exposed[notification] = (entry[0], entry[1], None)

    def write(self, rail: int, source: memoryview, remote: RemoteSlice, notification: int, digest: int) -> None:
        """See `Endpoint.write`."""
        if len(source) > remote.length:
            raise ValueError(f"a write of {len(source)} bytes does not fit a slice of {remote.length}")
        sock = self._sockets.get(rail)
        try:
            if sock is not None and rail not in self._down and not self._closed:
                self._doubt_if_idle(rail, sock)
                self._busy.add((rail, "write"))
                _send_all(sock, pack_header(remote, len(source), notification, digest), source)
                self._used_at[rail] = time.monotonic()
        except OSError:
            self.drop(rail)  # its receiving thread says what happened
        finally:
            self._busy.discard((rail, "write"))
            self._handler.written(notification)

    def wanted(self) -> int:
        """See `Endpoint.wanted`."""
        with self._lock:
            sockets = {rail: sock for rail, sock in self._sockets.items() if rail not in self._down}
        if self._refused:
            return len(sockets)
        few = min(rails_for_round_trip(round_trip(sockets)), self._most)
        if self._losses.is_lossy(sockets):
            return min(max(few, 2 * len(sockets)), self._most)
        return max(few, len(sockets))

    def grow(self, count: int) -> None:
        """See `Endpoint.grow`. A rail that can't be opened is the last that is tried."""
        if self._open_rail is None or self._refused:
            return
        with self._lock:
            first, last = self._dialled, min(count, self._most)
            self._dialled = max(first, last)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        for rail in range(first, last):
            target, name = functools.partial(self._join, self._open_rail, deadline), f"rdma-tcp-dial-{rail}"
            try:
                threading.Thread(target=target, args=(rail,), name=name, daemon=True).start()
            except RuntimeError as error:  # no more threads; the link has rails
                self._refused = True
                log.info("tcp rail %d can't be opened, data goes over the others: %s", rail, error)
                return

    def _join(self, open_rail: Callable[[int, float], socket.socket], deadline: float, rail: int) -> None:
        try:
            joined = self.attach(rail, open_rail(rail, deadline))
        except OSError as error:
            self._refused = True
            if not self._closed:
                log.info("tcp rail %d can't be opened, data goes over the others: %s", rail, error)
        else:
            if joined:
                self._handler.rail_up(rail)

    def admits(self, rail: int) -> bool:
        """Passive side: whether there is a place for this rail."""
        return self._handler.admits(rail < FEW_RAILS)

    def has_joined(self, rail: int) -> bool:
        """See `Endpoint.has_joined`."""
        return rail in self._sockets

    def open_first(self, count: int) -> None:
        """Active side: open the first rails, one after the other, within one deadline. Raises FabricError: none could
        be."""
        assert self._open_rail is not None
        deadline = time.monotonic() + CONNECT_TIMEOUT
        try:
            for rail in range(count):
                self.attach(rail, self._open_rail(rail, deadline))
                self._dialled = rail + 1
        except OSError as error:
            if not self._sockets:
                raise FabricError(f"no tcp rail could be opened: {error}") from error
            self._refused = True

    def attach(self, rail: int, sock: socket.socket, answer: bytes = b"") -> bool:
        """Take over a connected socket as `rail`, and send `answer` over it first. Returns whether it was taken: it is
        closed where this side is, or has that rail. Raises FabricError: this process can't have another thread."""
        with contextlib.suppress(OSError):  # the peer may have gone again: the receiving thread will say so
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Buffer sizes are the kernel's: it grows them with the bandwidth-delay product, up to tcp_rmem and
            # tcp_wmem; setting them would end that, at the lower rmem_max and wmem_max.
            if self._congestion:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion.encode())
        keep_alive(sock)
        with self._lock:
            if self._closed or rail in self._sockets:
                sock.close()
                return False
            self._sockets[rail] = sock
            self._used_at[rail] = time.monotonic()
            thread = threading.Thread(
                target=self._receive_loop,
                args=(rail, sock, answer),
                name=f"rdma-tcp-{rail}-{sock.fileno()}",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError as error:
                del self._sockets[rail], self._used_at[rail]
                sock.close()
                raise FabricError(f"tcp rail {rail} can't be served: {error}") from error
            self._threads.append(thread)
        return True

    def _doubt_if_idle(self, rail: int, sock: socket.socket) -> None:
        now = time.monotonic()
        idle = now - self._used_at[rail]
        if idle >= _IDLE_SECONDS and rail not in self._doubted and (before := acknowledged(sock)) is not None:
            self._doubted[rail] = now, idle, before

    def check(self) -> None:
        """See `Endpoint.check`. What had been idle as long as a dead rail is taken for dead with it."""
        now = time.monotonic()
        for rail, (since, idle, before) in list(self._doubted.items()):
            sock = self._sockets[rail]
            told = acknowledged(sock) if rail not in self._down else None
            # A peer that has no room for more answers probes, and nothing is acknowledged anew.
            if told is None or told > before or seconds_since_acknowledgement(sock) < now - since:
                del self._doubted[rail]
            elif now - since >= _PROOF_SECONDS:
                reason = (
                    f"what was written after {idle:.0f} s of silence was not acknowledged within {_PROOF_SECONDS:g} s; "
                    "a firewall or NAT on the way may have forgotten the connection"
                )
                for other, used_at in list(self._used_at.items()):
                    idle_too = used_at < since and not self._busy & {(other, "write"), (other, "read")}
                    if other not in self._down and (other in self._doubted or idle_too):
                        self._dead[other] = reason
                        self.drop(other)
                return

    def drop(self, rail: int) -> None:
        """See `Endpoint.drop`."""
        with contextlib.suppress(OSError, KeyError):
            self._sockets[rail].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `Endpoint.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sockets, threads = dict(self._sockets), list(self._threads)
        for rail in sockets:  # the peer may have opened any of them
            self.drop(rail)
        join_threads(threads, _END_SECONDS)
        for sock in sockets.values():
            sock.close()
        self.exposed.clear()

    def _receive_loop(self, rail: int, sock: socket.socket, answer: bytes) -> None:
        error: Exception
        try:
            sock.sendall(answer)
            self._receive(rail, sock)
        except ProtocolError as violation:
            if not self._closed:
                self._handler.failed(violation)
            return
        except Exception as failure:  # noqa: BLE001 - whatever it is, it ends the rail and is reported
            error = failure
        with self._lock:
            self._down.add(rail)
            closed = self._closed
        self.drop(rail)  # also for the thread that may be sending
        if not closed:
            why = self._dead.get(rail) or (str(error) if isinstance(error, OSError) else repr(error))
            self._handler.rail_down(rail, FabricError(f"tcp rail {rail} broke: {why}"))

    def _receive(self, rail: int, sock: socket.socket) -> None:
        header = memoryview(bytearray(HEADER_BYTES))
        while True:
            receive_exactly(sock, header)
            key, address, digest, length, notification = _FIELDS.unpack_from(header)
            if zlib.crc32(header[: _FIELDS.size]) != _CRC.unpack_from(header, _FIELDS.size)[0]:
                raise FabricError("a header was altered on the way")
            with self._lock:  # a revocation may be exchanging the entry
                entry = self.exposed.pop(notification, None)
            if entry is None:
                raise ProtocolError(f"the peer wrote {length} bytes to slice {notification}, which is not exposed")
            remote, expected_rail, target = entry
            if (key, address, rail) != (remote.key, remote.address, expected_rail) or length > remote.length:
                raise ProtocolError(
                    f"the peer wrote {length} bytes at {key}:{address} over rail {rail}, but slice {notification} is "
                    f"{remote.length} bytes at {remote.key}:{remote.address} over rail {expected_rail}"
                )
            self._busy.add((rail, "read"))
            if target is not None:
                receive_exactly(sock, target[:length])
            else:
                self._discard(sock, length)
            del entry, target
            self._used_at[rail] = time.monotonic()
            self._busy.discard((rail, "read"))
            self._handler.landed(notification, length, digest)

    @staticmethod
    def _discard(sock: socket.socket, length: int) -> None:
        scratch = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
        while length:
            part = scratch[: min(length, len(scratch))]
            receive_exactly(sock, part)
            length -= len(part)


def _is_open(endpoint: TcpEndpoint | None) -> bool:
    """Whether a rail's ticket is still good, given whose it is: with an endpoint, its tickets end."""
    return endpoint is not None and not endpoint.closed


class TcpFabric(Fabric):
    """Rails that are TCP connections, `rails` to a peer at most, of which few are opened at first. `dial` connects one
    socket to the peer (active side only). `congestion` is as for `TcpEndpoint`."""

    name = "tcp"
    checked = True

    def __init__(self, rails: int, dial: Callable[[], socket.socket] | None = None, congestion: str = "") -> None:
        if congestion and congestion not in congestion_controls():
            raise ConfigError(
                f"rdma_tcp_congestion={congestion!r}: this kernel does not offer it. Allowed: "
                f"{', '.join(congestion_controls())} (more may come with `modprobe tcp_{congestion}`)."
            )
        self._rails = rails
        self._dial = dial
        self._congestion = congestion
        #: ticket -> whose it is, for which rail, and when it expires
        self._tickets: dict[bytes, tuple[weakref.ref[TcpEndpoint], int, float]] = {}
        self._lock = threading.Lock()

    def offer(self, handler: CompletionHandler) -> tuple[TcpEndpoint, Mapping[str, Any]]:
        """See `Fabric.offer`."""
        endpoint = TcpEndpoint(handler, self._rails, self._congestion)
        tickets = [secrets.token_bytes(TICKET_BYTES) for _ in range(self._rails)]
        now = time.monotonic()
        with self._lock:
            self._tickets = {t: e for t, e in self._tickets.items() if e[2] > now and _is_open(e[0]())}
            for rail, ticket in enumerate(tickets):
                # The first are for now, the others for when the link turns out to need them.
                expires = now + TICKET_LIFETIME if rail < FEW_RAILS else float("inf")
                self._tickets[ticket] = (weakref.ref(endpoint), rail, expires)
        return endpoint, {"tickets": tickets}

    def admit(self, sock: socket.socket, ticket: bytes) -> bool:
        """Take a connection that began with `RAIL_MAGIC` and presents `ticket`, on the passive side. If the ticket is
        no good, or its site has too many rails, it is closed and False returned."""
        with self._lock:
            entry = self._tickets.pop(ticket, None)
        endpoint = entry[0]() if entry is not None and entry[2] > time.monotonic() else None
        if entry is None or endpoint is None or not _is_open(endpoint) or not endpoint.admits(entry[1]):
            with contextlib.suppress(OSError):
                sock.sendall(_REFUSED)
            sock.close()
            return False
        endpoint.attach(entry[1], sock, _ADMITTED)
        return True

    def connect(self, offer: Mapping[str, Any], handler: CompletionHandler) -> TcpEndpoint:
        """See `Fabric.connect`."""
        tickets = offer.get("tickets")
        if (
            not isinstance(tickets, list)
            or not 0 < len(tickets) <= MAX_RAILS
            or any(not isinstance(t, bytes) or len(t) != TICKET_BYTES for t in tickets)
        ):
            raise ProtocolError("the peer's tcp offer has no list of rail tickets")
        if self._dial is None:
            raise FabricError("this side of the tcp fabric can't dial: it was made to listen")
        dial = self._dial

        def open_rail(rail: int, deadline: float) -> socket.socket:
            return self._open_rail(dial, tickets[rail], deadline)

        most = min(self._rails, len(tickets))
        endpoint = TcpEndpoint(handler, most, self._congestion, open_rail)
        endpoint.open_first(min(FEW_RAILS, most))
        return endpoint

    @staticmethod
    def _open_rail(dial: Callable[[], socket.socket], ticket: bytes, deadline: float) -> socket.socket:
        sock = dial()
        try:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError(f"the rails were not open within {CONNECT_TIMEOUT:g} s")
            sock.settimeout(left)
            sock.sendall(RAIL_MAGIC + ticket)
            answer = memoryview(bytearray(1))
            receive_exactly(sock, answer)
            if bytes(answer) != _ADMITTED:
                raise FabricError(
                    "the peer refused the rail's ticket: it is used up or has expired, or this site has too many rails "
                    "there"
                )
        except OSError:
            sock.close()
            raise
        return sock


def probe(options: FabricOptions) -> Availability:
    """See `nvflare_rdma.fabric.registry`: TCP is always there."""
    return Availability(True)


def factory(options: FabricOptions) -> Callable[[LinkEnd], TcpFabric]:
    """See `nvflare_rdma.fabric.registry`."""
    return lambda end: TcpFabric(min(options.rails, end.most_rails or options.rails), end.dial, options.congestion)
