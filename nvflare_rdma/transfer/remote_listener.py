"""The waiting side of a route: connections come to a parent's port, and this process gets them from there."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from nvflare_rdma.errors import ProtocolError, RdmaError
from nvflare_rdma.fabric import keep_alive, receive_exactly
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.routes import JOINED_BYTES, RouteKey, parse_joined

log = get_logger(__name__)

#: Connections that wait: as many as come at once with a link, its control stream and its rails.
_WAITING = 4
#: Who was joined has so long to say so.
_SAY_SECONDS = 5.0
#: A connection that ended sooner was refused. After so many in a row, each tried later than the one before, the route
#: is given up: its parent has forgotten it, or has gone.
_REFUSED_SECONDS, _REFUSED_MOST, _FIRST_PAUSE = 2.0, 5, 0.1


class RemoteListener:
    """What a `Door` listens on, as on a socket, when its connections come through a parent's port.

    `connect` connects to that port. `address` is the port's, as peers know it. `accept` returns what was joined with
    one of the connections that wait, and raises an OSError (EINVAL) when the route is closed.
    """

    def __init__(self, connect: Callable[[], socket.socket], key: RouteKey, address: tuple[str, int]) -> None:
        self._connect, self._key, self._address = connect, key, address
        self._number = 0
        self._waiting: dict[int, tuple[socket.socket, float]] = {}
        self._refused = 0
        self._closed = threading.Event()
        self._woken, self._wake = socket.socketpair()
        self._process = os.getpid()

    def getsockname(self) -> tuple[str, int]:
        """The port's address."""
        return self._address

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """The next connection, and the address that it came from to the parent. For one thread."""
        while not self._closed.is_set():
            self._fill()
            poll = select.poll()
            for number in (self._woken.fileno(), *self._waiting):
                poll.register(number, select.POLLIN)
            full = len(self._waiting) == _WAITING
            for number, _ in poll.poll(None if full else self._pause * 1000):
                if number in self._waiting and (found := self._joined(number)) is not None:
                    return found
        raise OSError(errno.EINVAL, "the way through the parent is closed")

    @property
    def _pause(self) -> float:
        """Seconds until it is tried again to wait."""
        return _FIRST_PAUSE * 2.0 ** max(self._refused - 1, 0)

    def _fill(self) -> None:
        """Have as many connections wait as there should be, or one more if the last ones were refused."""
        if any(time.monotonic() - since > _REFUSED_SECONDS for _, since in self._waiting.values()):
            self._refused = 0
        while len(self._waiting) < _WAITING:
            if self._refused and self._waiting:
                return  # until it is known what becomes of that one
            self._number += 1
            try:
                sock = self._connect()
            except OSError as error:
                self._refuse(str(error))
                return
            try:
                sock.sendall(self._key.waiting(self._number))
                keep_alive(sock)
                sock.settimeout(_SAY_SECONDS)
            except OSError as error:
                sock.close()
                self._refuse(str(error))
                return
            self._waiting[sock.fileno()] = sock, time.monotonic()

    def _refuse(self, reason: str) -> None:
        self._refused += 1
        if self._refused >= _REFUSED_MOST:
            raise OSError(errno.EINVAL, f"the parent takes no connections for it any more: {reason}")
        self._closed.wait(self._pause)

    def _joined(self, number: int) -> tuple[socket.socket, tuple[str, int]] | None:
        sock, since = self._waiting.pop(number)
        said = bytearray(JOINED_BYTES)
        try:
            receive_exactly(sock, memoryview(said))
            address = parse_joined(bytes(said))
        except (OSError, RdmaError) as error:
            sock.close()
            if isinstance(error, ProtocolError) or time.monotonic() - since < _REFUSED_SECONDS:
                self._refuse(str(error))
            return None
        self._refused = 0
        return sock, address

    def shutdown(self, how: int = socket.SHUT_RDWR, /) -> None:
        """End `accept`, also if it waits."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def close(self) -> None:
        """End the connections that wait. In a forked process, whose parent has them, nothing is said to the peer."""
        self._closed.set()
        for sock, _ in self._waiting.values():
            sock.close()
        self._waiting.clear()
        self._woken.close()
        self._wake.close()

    def __enter__(self) -> RemoteListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
