"""What is between the workers: connections that are cut, stalled, black-holed, and whose bits are flipped."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import Counter
from dataclasses import dataclass

from nvflare_rdma.fabric import RAIL_MAGIC, TICKET_BYTES

#: What may happen to a connection, and how often. Most live, or nothing would ever arrive.
FATES = {"": 8, "flip": 3, "cut": 3, "stall": 2, "hole": 1}
_STALL_SECONDS = 3.0
_LOOK_SECONDS = 10.0


@dataclass(frozen=True)
class Fate:
    """What happens to one direction of a connection once so many bytes have passed."""

    kind: str = ""
    at: int = 0


class Proxy:
    """Leads to the doors of workers, through ways that `way_to` makes.

    Args:
        rng: decides the fate of each connection.
        secure: whether control streams speak TLS. If not, only rails are flipped: nothing but TCP's own checksum
            protects a clear control stream, as it is with FLARE's connections.
    """

    def __init__(self, rng: random.Random, secure: bool) -> None:
        self.happened: Counter[str] = Counter()
        self._rng = rng
        self._secure = secure
        self._lock = threading.Lock()
        self._ways: dict[int, socket.socket] = {}
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()

    def way_to(self, port: int) -> int:
        """The port of a way to a door's port on this host."""
        with self._lock:
            if port not in self._ways:
                self._ways[port] = listener = socket.create_server(("127.0.0.1", 0), backlog=128)
                threading.Thread(target=self._serve, args=(listener, port), daemon=True).start()
            return int(self._ways[port].getsockname()[1])

    def cut_all(self) -> None:
        """Cut all connections at once, as a router that starts anew does."""
        with self._lock:
            sockets = list(self._open)
        self.happened["outage"] += 1
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End everything."""
        self._closed.set()
        self.cut_all()
        for listener in self._ways.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)

    def _serve(self, listener: socket.socket, port: int) -> None:
        with listener:
            while not self._closed.is_set():
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._join, args=(near, port), daemon=True).start()

    def _join(self, near: socket.socket, port: int) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", port), _LOOK_SECONDS)
            far.settimeout(None)
            near.settimeout(_LOOK_SECONDS)
            first = near.recv(len(RAIL_MAGIC), socket.MSG_PEEK)
            near.settimeout(None)
        except OSError:
            near.close()
            return
        with self._lock:
            self._open |= {near, far}
            fates = self._fates(first == RAIL_MAGIC)
        there = threading.Thread(target=self._pass_on, args=(near, far, fates[0]), daemon=True)
        there.start()
        self._pass_on(far, near, fates[1])
        there.join()
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()

    def _fates(self, is_rail: bool) -> tuple[Fate, Fate]:
        kind = self._rng.choices(list(FATES), list(FATES.values()))[0]
        if kind == "flip" and not (is_rail or self._secure):
            kind = "cut"
        fates = [Fate(kind, int(2 ** self._rng.uniform(7, 22))) for _ in range(2)]
        if kind == "flip":  # a flipped ticket is only refused
            fates = [Fate(kind, max(fate.at, len(RAIL_MAGIC) + TICKET_BYTES)) for fate in fates]
        if kind == "hole" and self._rng.random() < 0.5:
            fates[self._rng.randrange(2)] = Fate()  # packets get lost one way only
        return fates[0], fates[1]

    def _pass_on(self, source: socket.socket, sink: socket.socket, fate: Fate) -> None:
        passed, swallows = 0, False
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if fate.kind and passed <= fate.at < passed + len(data):
                    self.happened[fate.kind] += 1
                    if fate.kind in ("cut", "hole"):
                        sink.sendall(data[: fate.at - passed])
                    if fate.kind == "cut":
                        break
                    if fate.kind == "flip":
                        data[fate.at - passed] ^= 1 << (fate.at % 8)
                    elif fate.kind == "stall":
                        self._closed.wait(_STALL_SECONDS)
                    elif fate.kind == "hole":
                        swallows = True
                passed += len(data)
                if not swallows:
                    sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
