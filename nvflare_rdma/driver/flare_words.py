"""FLARE's own tcp protocol (`nvflare.fuel.f3.drivers.socket_conn`), spoken on a control stream's socket.

`FlareConnection` is FLARE's `SocketConnection` on what looks like a socket to it: what was read of the socket before
comes first, and TLS is the control stream's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.f3.connection import BytesAlike
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.socket_conn import SocketConnection
from nvflare.fuel.f3.sfm.constants import Types
from nvflare.fuel.f3.sfm.prefix import PREFIX_LEN, Prefix

from nvflare_rdma.channel import ControlStream
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import plain_host

#: The longest first frame that a guest may send: it has a cell's name and properties.
MAX_HELLO_FRAME_BYTES = 64 * 1024


def receive_hello(stream: ControlStream, first: bytes, timeout: float) -> bytes:
    """What a guest says first in FLARE's words: a whole HELLO frame, and whatever came with it. `first` was read of the
    stream already; `timeout` is in seconds.

    Raises:
        ProtocolError: it says something else. OSError: it does not say it in time, or is gone.
    """
    deadline, data = time.monotonic() + timeout, bytearray(first)
    needed = PREFIX_LEN
    while len(data) < needed or needed == PREFIX_LEN:
        if len(data) >= PREFIX_LEN:
            prefix = Prefix.from_bytes(data)
            if prefix.type != Types.HELLO or not PREFIX_LEN < prefix.length <= MAX_HELLO_FRAME_BYTES:
                raise ProtocolError(
                    "it speaks neither this package's protocol nor FLARE's tcp: its first frame would be of type "
                    f"{prefix.type} and have {prefix.length} bytes, and not be a HELLO (type {Types.HELLO}) of up to "
                    f"{MAX_HELLO_FRAME_BYTES}; check the scheme in its URL"
                )
            needed = prefix.length
            if len(data) >= needed:
                break
        part = stream.receive(deadline - time.monotonic()) if time.monotonic() < deadline else None
        if part is None:
            raise TimeoutError("timed out: it did not say who it is in FLARE's words")
        if not part:
            raise ConnectionError("it closed the connection in the middle of its greeting")
        data += part
    return bytes(data)


class FlareSocket:
    """What FLARE's `SocketConnection` uses of a socket, on a control stream. `first` was read of it already."""

    def __init__(self, sock: socket.socket, stream: ControlStream, first: bytes, send_timeout: float) -> None:
        self._sock = sock
        self._stream = stream
        self._first = memoryview(first)
        self._send_timeout = send_timeout
        self._sending = threading.Lock()
        self.family = sock.family
        self.fileno, self.setsockopt, self.shutdown = sock.fileno, sock.setsockopt, sock.shutdown
        self.close = sock.close
        # In the clear, FLARE's frames go through the socket itself.
        self.send = self._send_in_tls if stream.secure else sock.send
        self._receive = self._receive_in_tls if stream.secure else sock.recv_into
        self.recv_into = self._receive_first if first else self._receive

    def _receive_first(self, buffer: Any, nbytes: int) -> int:
        part = self._first[:nbytes]
        memoryview(buffer)[: len(part)] = part
        self._first = self._first[len(part) :]
        if not self._first:
            self.recv_into = self._receive
        return len(part)

    def _receive_in_tls(self, buffer: Any, nbytes: int) -> int:
        return self._stream.receive_into(memoryview(buffer)[:nbytes])

    def _send_in_tls(self, data: Any) -> int:
        with self._sending:
            return self._stream.send_part(memoryview(data), self._send_timeout)

    def getpeername(self) -> tuple[str, int]:
        """As `socket.getpeername` over IPv4: host and port."""
        host, port = self._sock.getpeername()[:2]
        return plain_host(host), port

    def getsockname(self) -> tuple[str, int]:
        """As `socket.getsockname` over IPv4: host and port."""
        host, port = self._sock.getsockname()[:2]
        return plain_host(host), port

    def getpeercert(self) -> dict[str, Any] | None:
        """As `ssl.SSLSocket.getpeercert`."""
        return self._stream.peer_certificate()


class FlareConnection(SocketConnection):
    """A connection that speaks FLARE's tcp. `first` was read of the stream already."""

    def __init__(
        self, sock: socket.socket, stream: ControlStream, connector: ConnectorInfo, first: bytes = b""
    ) -> None:
        self._process = os.getpid()
        self._busy = 0
        self.heard = False
        """Whether a frame has come."""
        sending = CommConfigurator().get_streaming_send_timeout(30.0)
        super().__init__(FlareSocket(sock, stream, first, sending), connector, stream.secure)

    @property
    def usable(self) -> bool:
        """Whether it was not closed on this side."""
        return not self.closing

    @property
    def idle(self) -> bool:
        """Whether nothing is being sent."""
        return not self._busy

    def process_frame(self, frame: BytesAlike) -> None:
        """FLARE's: hand a frame to who has registered for it."""
        self.heard = True
        super().process_frame(frame)

    def send_frame(self, frame: BytesAlike) -> None:
        """FLARE's hook: send a frame."""
        self._busy += 1
        try:
            super().send_frame(frame)
        finally:
            self._busy -= 1

    def close(self, linger: float | None = None) -> None:
        """FLARE's hook: end the connection, at once. A forked process leaves it to its parent."""
        if self._process == os.getpid():
            super().close()
