"""A TLS peer whose records come byte by byte, each byte in good time and no record ever whole."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator

from tests.support.tcp_pair import DEADLINE

_GAP = 0.02


class TlsPeer:
    """The client's end of ``sock``, over memory BIOs: what it encrypts is sent as slowly as a test wants."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        sock.settimeout(DEADLINE)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)

    def greet(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._incoming.write(self.sock.recv(65536))
        self.sock.sendall(self._outgoing.read())

    def encrypt(self, data: bytes) -> bytes:
        """One record (of up to 16 KiB)."""
        self._tls.write(data)
        return self._outgoing.read()


@contextlib.contextmanager
def trickle(sock: socket.socket, data: bytes) -> Iterator[None]:
    """Meanwhile ``data`` is sent byte by byte, but for the last one."""
    stop = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):  # the other side has ended it
            for byte in data[:-1]:
                if stop.wait(_GAP):
                    return
                sock.sendall(bytes([byte]))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(DEADLINE)
        assert not thread.is_alive()
