"""What plain TCP carries between the two ends of a bench: the ceiling of everything else that goes over the network.

The connections come to the port of the other ones. Each begins with a magic and a ticket, which works once and which
the peer has got over its link. Then, as often as it likes, the active side says which way, and how many bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from nvflare_rdma.cli.peer_bodies import noise
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.fabric import TICKET_BYTES, connect_tcp, receive_exactly

MAGIC = b"NVFBENCH"
#: Connections of a run at once, and how long one may be silent.
MOST_CONNECTIONS, _SILENT_SECONDS = 16, 60.0
_QUESTION, _ANSWER = struct.Struct("!?Q"), b"\x01"
_PIECE, _MEMORY_BYTES = 1024 * 1024, 4 * 1024 * 1024
_CONNECT_SECONDS = 5.0


def _send(sock: socket.socket, nbytes: int, count: Callable[[int], None] = lambda nbytes: None) -> None:
    data, left = noise(_MEMORY_BYTES), nbytes
    while left:
        at = (nbytes - left) % _MEMORY_BYTES
        piece = data[at : at + min(_PIECE, left)]
        sock.sendall(piece)
        left -= len(piece)
        count(len(piece))


def _receive(
    sock: socket.socket, memory: memoryview, nbytes: int, count: Callable[[int], None] = lambda nbytes: None
) -> None:
    left = nbytes
    while left:
        at = (nbytes - left) % _MEMORY_BYTES
        piece = memory[at : at + min(_PIECE, left)]
        receive_exactly(sock, piece)
        left -= len(piece)
        count(len(piece))


class RawDoor:
    """The listening side. `most_bytes` is what may be asked for at once."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._tickets: set[bytes] = set()
        self._open: set[socket.socket] = set()
        self.moved_bytes = 0
        """What all connections have moved so far, in either direction."""

    def ticket(self) -> str | None:
        """A ticket for one connection; None if there are as many as there may be."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            if len(self._tickets) + len(self._open) >= MOST_CONNECTIONS:
                return None
            self._tickets.add(ticket)
        return ticket.hex()

    def take(self, sock: socket.socket, left: float, admitted: Callable[[], None]) -> None:
        """See `Door.takers`: serve one connection until its peer goes."""
        with sock:
            deadline = time.monotonic() + left
            ticket = b""
            while len(ticket) < TICKET_BYTES:
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                if not (part := sock.recv(TICKET_BYTES - len(ticket))):
                    return
                ticket += part
            with self._lock:
                if ticket not in self._tickets:
                    raise ProtocolError("it comes for a bench with a ticket that is unknown or used")
                self._tickets.discard(ticket)
                self._open.add(sock)
            admitted()
            try:
                with contextlib.suppress(OSError):  # the peer has gone, or says nothing
                    self._serve(sock)
            finally:
                with self._lock:
                    self._open.discard(sock)

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(_SILENT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        memory = memoryview(bytearray(_MEMORY_BYTES))
        question = memoryview(bytearray(_QUESTION.size))
        while True:
            receive_exactly(sock, question)
            comes, nbytes = _QUESTION.unpack(question)
            if nbytes > self._most_bytes:
                raise ProtocolError(f"it asks for {nbytes} bytes at once, and {self._most_bytes} are the most")
            if comes:
                _receive(sock, memory, nbytes, self._count)
                sock.sendall(_ANSWER)
            else:
                _send(sock, nbytes, self._count)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.moved_bytes += nbytes

    def end(self) -> None:
        """End all connections, and let no tickets be used any more."""
        with self._lock:
            self._tickets.clear()
            ending = list(self._open)
        for sock in ending:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class RawPeer:
    """The active side: one connection for each of the tickets that the peer has given."""

    def __init__(
        self, address: tuple[str, int], tickets: Sequence[str], connect_seconds: float = _CONNECT_SECONDS
    ) -> None:
        self._ends = contextlib.ExitStack()
        self._pool = concurrent.futures.ThreadPoolExecutor(len(tickets), "rdma-bench-raw")
        self._sockets: list[tuple[socket.socket, memoryview]] = []
        try:
            for ticket in tickets:
                sock = self._ends.enter_context(connect_tcp(address, min(connect_seconds, _CONNECT_SECONDS)))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(MAGIC + bytes.fromhex(ticket))
                self._sockets.append((sock, memoryview(bytearray(_MEMORY_BYTES))))
        except BaseException:
            self.close()
            raise

    def move(self, to_peer: bool, size: int, most_seconds: float) -> float:
        """Move about `size` bytes to the peer, or from it, in equal parts over all connections. Returns the seconds.

        Raises:
            OSError, TransferError: they are not there in time, or a connection has ended.
        """
        nbytes = size // len(self._sockets)
        began = time.perf_counter()
        # A piece, or an answer, that takes longer than all together may is too late in any case.
        moves = [
            self._pool.submit(_move, sock, memory, to_peer, nbytes, most_seconds) for sock, memory in self._sockets
        ]
        done, late = concurrent.futures.wait(moves, most_seconds)
        if late:
            self.close()
            raise TimeoutError(f"{size} bytes were not moved within {most_seconds:.3g} s over plain TCP")
        for each in done:
            if (error := each.exception()) is not None:
                raise TransferError(f"plain TCP: {error}") from error
        return time.perf_counter() - began

    def close(self) -> None:
        """Close all connections."""
        for sock, _ in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._ends.close()
        self._pool.shutdown(wait=False)


def _move(sock: socket.socket, memory: memoryview, to_peer: bool, nbytes: int, most_seconds: float) -> None:
    sock.settimeout(most_seconds)
    sock.sendall(_QUESTION.pack(to_peer, nbytes))
    if to_peer:
        _send(sock, nbytes)
        receive_exactly(sock, memory[: len(_ANSWER)])
    else:
        _receive(sock, memory, nbytes)
