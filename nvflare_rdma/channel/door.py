"""How peers come to a control stream: one listening port serves the control streams and the rails of all peers.

The first bytes of a connection show what it is: a TLS record, the control stream's magic, a rail's magic and ticket, or
whatever else whoever opens the door takes on the same port.
Until it is let in, it has one of a few places. Nobody is refused for want of one: the oldest guest goes, of whoever has
most of them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from types import TracebackType
from typing import Any, Protocol

from nvflare_rdma.channel.control import ControlStream, explain_tls
from nvflare_rdma.channel.guests import Complaints, Guests
from nvflare_rdma.channel.protocol import CONTROL_MAGIC
from nvflare_rdma.errors import ProtocolError, RdmaError, TlsError, UnreachableError
from nvflare_rdma.fabric import RAIL_MAGIC, TICKET_BYTES, TcpFabric, connect_tcp, join_address, plain_host
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

GREETING_TIMEOUT = 10.0
#: What a connection in the clear begins with.
MAGIC_BYTES = len(RAIL_MAGIC)
#: Errors of accept(2) that don't pass: the socket listens no more, whoever has shut it down, or was closed.
_LISTENS_NO_MORE = (errno.EINVAL, errno.EBADF, errno.ENOTSOCK)
_TLS_HANDSHAKE_RECORD = b"\x16"


class Pending:
    """Keeps track of sockets on which something is being opened, so that `close` can end that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def track(self, sock: socket.socket) -> Iterator[None]:
        """Have `close` disconnect the socket as long as this lasts. From one holder to the next a socket may be tracked
        by nobody, so each asks here whether it is over.

        Raises:
            ConnectionAbortedError: `close` has been called. The socket is still the caller's to close.
        """
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("this side shuts down")
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def close(self) -> None:
        """Disconnect the sockets that are tracked, and refuse others. A forked process leaves them to its parent."""
        if self._process != os.getpid():
            return
        with self._lock:
            self._closed = True
            sockets = list(self._sockets)
        for sock in sockets:
            # Whoever waits on it wakes up, and closes it; close() would leave them waiting.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Listener(Protocol):
    """What a `Door` needs of what it listens on: a `socket.socket` has it."""

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, and its address: host and port come first. An OSError of `_LISTENS_NO_MORE` says that
        there will be none."""

    def getsockname(self) -> Any:
        """Host and port come first."""

    def shutdown(self, how: int, /) -> None:
        """Have `accept` say that there will be none, also if it waits."""

    def close(self) -> None:
        """Let go of it."""

    def __enter__(self) -> Listener: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Door:
    """One listening socket for the control streams and rails of all peers.

    Control streams must speak the TLS of the context that `tls` makes for each guest, or no TLS if it is None. Rails
    are handed to `fabric`. `on_connection` gets each control stream, in a thread of its own, and owns it and its socket
    from then on; if it raises an OSError or RdmaError, that is logged and the connection is closed. It calls its third
    argument when the guest has shown who it is, which frees its place among the guests. `name` is for log lines.
    `address` is where the door listens, as `dial` takes it.

    Two attributes, to be set before `serve`, are for connections of other kinds on the same port. Whoever is called has
    the socket from then on, in its thread, and calls the last argument as `on_connection` does. `takers`, by the magic
    of `MAGIC_BYTES` that such a connection begins with, in the clear, are called with the socket and the seconds that
    are left for its greeting. `stranger` is called with the socket and the bytes that were read of it for whatever else
    comes in the clear, also where control streams are TLS.
    """

    def __init__(
        self,
        listener: Listener,
        tls: Callable[[], ssl.SSLContext] | None,
        fabric: TcpFabric,
        on_connection: Callable[[socket.socket, ControlStream, Callable[[], None]], None],
        name: str,
        greeting_timeout: float = GREETING_TIMEOUT,
    ) -> None:
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._listener = listener
        self._tls = tls
        self._fabric = fabric
        self._on_connection = on_connection
        self._name = name
        self._greeting_timeout = greeting_timeout
        self.takers: MutableMapping[bytes, Callable[[socket.socket, float, Callable[[], None]], None]] = {}
        self.stranger: Callable[[socket.socket, bytes, Callable[[], None]], None] | None = None
        self._closed, self._over = threading.Event(), threading.Event()
        self._process = os.getpid()
        self._greeting = Pending()
        self._guests = Guests()
        self._complaints = Complaints(name)

    def complain(self, level: int, text: str, *values: object) -> None:
        """Log a line about a guest, unless there were too many."""
        self._complaints.log(level, text, *values)

    @property
    def is_over(self) -> bool:
        """Whether `serve` has returned, so that nobody will be let in any more and the port is free."""
        return self._over.is_set()

    def serve(self) -> None:
        """Let peers in until `close` is called; then the port is free again. Call once, also if closed already. It also
        returns if the listening socket is shut down by anybody else, which is logged."""
        self._say_whom_tls_shows()
        try:
            with self._listener:
                self._serve()
        finally:
            self._over.set()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                if error.errno in _LISTENS_NO_MORE:
                    log.error(
                        "%s listens no more, as its socket was shut down (%s); it is opened anew when it is needed",
                        self._name,
                        error,
                    )
                    return
                # Out of descriptors, or the peer has gone again: the port stays open.
                self._complaints.log(logging.ERROR, "can't accept a connection on %s: %s", self._name, error)
                self._closed.wait(0.1)
                continue
            self._make_room(sock, str(address[0]))
            peer = join_address(plain_host(str(address[0])), address[1])
            try:
                threading.Thread(
                    target=self._receive, args=(sock, peer), name=f"rdma-conn-{sock.fileno()}", daemon=True
                ).start()
            except RuntimeError as error:
                self._complaints.log(logging.ERROR, "can't serve a connection: %s", error)
                self._guests.leave(sock)
                sock.close()

    def _say_whom_tls_shows(self) -> None:
        asks = True
        with contextlib.suppress(OSError, RdmaError):  # each guest is told so
            asks = self._tls is None or self._tls().verify_mode is not ssl.CERT_NONE
        if not asks:
            log.warning(
                "%s asks who dials for no certificate (connection_security=tls), so nothing in TLS says who that is",
                self._name,
            )

    def _make_room(self, sock: socket.socket, address: str) -> None:
        if (victim := self._guests.enter(sock, address)) is not None:
            text = "%s: too many guests have not said who they are; the oldest of them goes"
            self._complaints.log(logging.WARNING, text, self._name)
            with contextlib.suppress(OSError):  # its thread wakes up, and closes it
                victim.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End `serve`, and the connections that are still in their greeting. Callable from any thread, at any time. In
        a forked process it does nothing: the socket that listens is its parent's, too.

        A peer that has just greeted may still come to `on_connection`.
        """
        if self._process != os.getpid():
            return
        self._closed.set()
        # Wakes accept(); close() alone would leave it waiting.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._greeting.close()

    def _receive(self, sock: socket.socket, peer: str) -> None:
        try:
            with self._greeting.track(sock):
                go_on = self._identify(sock, peer)
            if go_on is not None:
                go_on()
        except (OSError, RdmaError) as error:
            sock.close()
            if not self._closed.is_set():
                self._complaints.log(logging.ERROR, "refused the connection from %s: %s", peer, error)
        except Exception:
            sock.close()
            log.exception("ended the connection from %s by an error of this side", peer)
        finally:
            self._guests.leave(sock)

    def _identify(self, sock: socket.socket, peer: str) -> Callable[[], None] | None:
        """How it goes on with a new connection, once it is known what it is; None if it was a rail, or nothing."""
        admitted = functools.partial(self._guests.leave, sock)
        # One deadline for all that a guest has to say, in however many pieces it comes.
        deadline = time.monotonic() + self._greeting_timeout
        sock.settimeout(self._greeting_timeout)
        first = sock.recv(1, socket.MSG_PEEK)
        if not first:
            sock.close()
            log.debug("%s connected and left again", peer)
            return None
        is_tls = first == _TLS_HANDSHAKE_RECORD
        if is_tls and self._tls is None:
            raise ProtocolError("it speaks TLS (srdma://), but this listener is clear (rdma://)")
        if not is_tls:
            magic = _receive_by(sock, MAGIC_BYTES, deadline)
            if magic == RAIL_MAGIC:
                if not self._fabric.admit(sock, _receive_by(sock, TICKET_BYTES, deadline)):
                    text = "refused a rail from %s: its ticket is unknown, used or expired, or its site has too many"
                    self._complaints.log(logging.WARNING, text, peer)
                return None
            if (taker := self.takers.get(magic)) is not None:
                return functools.partial(taker, sock, deadline - time.monotonic(), admitted)
            if magic != CONTROL_MAGIC and self.stranger is not None:
                sock.settimeout(None)
                return functools.partial(self.stranger, sock, magic, admitted)
            if self._tls is not None:
                raise ProtocolError("it does not speak TLS, which this listener requires (srdma://)")
            if magic != CONTROL_MAGIC:
                raise ProtocolError("it is no nvflare-rdma peer; check the scheme in its URL")
        tls = self._tls() if self._tls is not None else None
        stream = _greet(sock, tls, True, deadline - time.monotonic())
        return functools.partial(self._on_connection, sock, stream, admitted)


def dial(
    address: tuple[str, int],
    tls: ssl.SSLContext | None,
    pending: Pending,
    timeout: float = GREETING_TIMEOUT,
    preamble: bytes = b"",
    connected: Callable[[], object] = lambda: None,
) -> tuple[socket.socket, ControlStream]:
    """Open a control stream to the door at `address`; its socket and the stream are returned. `preamble` is what comes
    before it, for whoever passes it on to the door. `connected` is called when the host has answered, and the greeting
    begins.

    `timeout`, in seconds, is for all of it: the host's addresses, one of which has to answer, and the whole greeting,
    which is what the peer could draw out. `pending.close()` ends the greeting.

    Raises:
        TlsError: the peers don't trust each other. UnreachableError: nothing answered within `timeout`. OSError:
            nobody listens, or it did not greet in time.
    """
    deadline = time.monotonic() + timeout
    try:
        sock = connect_tcp(address, timeout)
    except TimeoutError as error:
        raise UnreachableError(f"timed out: nothing answered within {timeout:g} s") from error
    try:
        connected()
        with pending.track(sock):
            if preamble:
                sock.sendall(preamble)
            if tls is None:
                sock.sendall(CONTROL_MAGIC)
            return sock, _greet(sock, tls, False, deadline - time.monotonic())
    except (OSError, RdmaError):
        sock.close()
        raise


def address_of(sock: socket.socket, peer: bool) -> str:
    """Return `host:port` of one end of a connection ([host]:port over IPv6), for people, or "N/A" when it is gone."""
    try:
        host, port = (sock.getpeername() if peer else sock.getsockname())[:2]
    except OSError:
        return "N/A"
    return join_address(plain_host(host), port)


def _greet(sock: socket.socket, tls: ssl.SSLContext | None, server_side: bool, timeout: float) -> ControlStream:
    stream = ControlStream(sock, tls, server_side)
    try:
        stream.handshake(timeout)
    except ssl.SSLError as error:
        stream.close()
        raise TlsError(explain_tls(error, server_side)) from error
    return stream


def _receive_by(sock: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly `size` bytes."""
    data = b""
    while len(data) < size:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("it closed the connection in the middle of its greeting")
        data += part
    return data
