"""What goes over wires of several kinds: traffic.py FOLDER, apart. What came of it is in FOLDER/results.json."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.waiting import eventually
from tests.wan.wire import CENTRE, Link, Star, Wire

PORT = 5000
PACKETS = 10_000
#: Of a packet with 1,172 bytes of payload, with IP's and UDP's headers.
LENGTH = 1200


def _socket(star: Star, name: str, kind: socket.SocketKind) -> socket.socket:
    with star.inside(name):
        made = socket.socket(socket.AF_INET, kind)
    made.settimeout(20.0)
    return made


def datagrams(star: Star, name: str, wire: Wire, number: int, batch: int) -> list[tuple[int, int]]:
    """Send packets from the centre; when each that came was sent and received, in ns. Each of a batch has come to the
    wire before the next batch is sent, so that none is lost before the wire."""
    address = star.address(name)
    with _socket(star, name, socket.SOCK_DGRAM) as target, _socket(star, "server", socket.SOCK_DGRAM) as source:
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        target.bind((address, PORT))
        before, times, found = wire.count()[0], [], []

        def receive(limit: float) -> None:
            target.settimeout(limit)
            while True:
                try:
                    which = int.from_bytes(target.recv(2000)[:4], "big")
                except TimeoutError:
                    return
                found.append((times[which], time.monotonic_ns()))

        for first in range(0, number, batch):
            for which in range(first, min(first + batch, number)):
                times.append(time.monotonic_ns())
                source.sendto(which.to_bytes(4, "big").ljust(LENGTH - 28, b"."), (address, PORT))
            eventually(lambda: (wire.count()[0] - before).packets == len(times))
            receive(0.001)
        carried = (wire.count()[0] - before).carried[0]
        deadline = time.monotonic() + 30.0
        while len(found) < carried and time.monotonic() < deadline:
            receive(0.2)
    return found


def timed(star: Star, folder: Path) -> dict[str, Any]:
    """40 packets at once, each of which takes 9.6 ms on a wire of 1 Mbit/s: what would wait for 100 ms is dropped."""
    wire = star.join("timed", Link(rate=1, delay=30, queue=100), folder / "timed.trace")
    came = datagrams(star, "timed", wire, 40, 40)
    packets = [[p.came, p.due, p.length, p.fate] for p in wire.packets() if p.target == PORT]
    return {"came": came, "packets": packets}


def lossy(star: Star, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, link in {
        "random": Link(rate=100_000, loss=5, queue=10_000),
        "bursty": Link(rate=100_000, loss=5, burst=8, queue=10_000),
        "again": Link(rate=100_000, loss=5, queue=10_000),
    }.items():
        wire = star.join(name, link, folder / f"{name}.trace")
        came = datagrams(star, name, wire, PACKETS, 500)
        fates = "".join(p.fate[0] for p in wire.packets() if p.direction == 0)
        found[name] = {"came": len(came), "fates": fates, "lost": wire.count()[0].lost[0]}
    return found


def streams(star: Star, folder: Path) -> dict[str, Any]:
    """TCP, with a firewall that opens one port, and without."""
    wire = star.join("streams", Link(rate=1000, delay=1), folder / "streams.trace")
    wire.set(open=[PORT])
    data = os.urandom(1 << 20)
    found: dict[str, Any] = {
        "open": stream(star, "streams", PORT, data),
        "shut": stream(star, "streams", PORT + 1, b""),
    }
    found["blocked"] = wire.count()[1].blocked[0]
    wire.set(open=[])
    found["opened"] = stream(star, "streams", PORT + 1, b"x")
    ports = [p for p in wire.packets() if p.target == PORT]
    found["payload"] = sum(p.payload for p in ports)
    wire.set(loss=100)
    found["dead"] = stream(star, "streams", PORT, b"")
    return found


def stream(star: Star, name: str, port: int, data: bytes) -> dict[str, Any]:
    """What came of `data` from that host at the centre, and the congestion control of both ends."""
    got: dict[str, Any] = {}
    with _socket(star, "server", socket.SOCK_STREAM) as door, _socket(star, name, socket.SOCK_STREAM) as dialling:
        door.bind((CENTRE, port))
        door.listen()
        dialling.settimeout(1.0 if not data else 20.0)

        def receive() -> None:
            with door.accept()[0] as accepted:
                accepted.settimeout(20.0)
                got["there"] = _congestion(accepted)
                got["same"] = b"".join(iter(lambda: accepted.recv(1 << 16), b"")) == data

        try:
            dialling.connect((CENTRE, port))
        except TimeoutError:
            return {"refused": "nothing answered"}
        got["here"] = _congestion(dialling)
        thread = threading.Thread(target=receive)
        thread.start()
        dialling.sendall(data)
        dialling.shutdown(socket.SHUT_WR)
        thread.join(20.0)
    return got


def _congestion(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def main() -> None:
    folder = Path(sys.argv[1])
    star = Star(folder / "star", "server")
    parts: list[Callable[[Star, Path], dict[str, Any]]] = [timed, lossy, streams]
    results = {part.__name__: part(star, folder) for part in parts}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
