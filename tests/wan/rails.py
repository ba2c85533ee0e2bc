"""How many rails links open over wires of several kinds: rails.py FOLDER, apart. What came of it is in
FOLDER/results.json."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from queue import Queue
from typing import Any

from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.fabric.sockets import connect_tcp, listen_tcp
from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TICKET_BYTES, TcpFabric, receive_exactly
from tests.support.tcp_pair import context, in_parallel
from tests.support.waiting import eventually
from tests.wan import wire
from tests.wan.wire import CENTRE, Star

DEADLINE = 60.0
MIB = 1 << 20
SMALL, LARGE = bytes(100_000), bytes(range(256)) * (4 * MIB // 256)
MOST = {"passive": 16, "active": 12}


def measure(star: Star, name: str) -> dict[str, Any]:
    """Send a message each way over a link to a host; "" is the centre itself."""
    door, listening = Queue[Any](), TcpFabric(MOST["passive"])
    with star.inside("server"):
        listener = listen_tcp(CENTRE, 0)

    def dial() -> Any:
        with star.inside(name or "server"):
            return connect_tcp((CENTRE, listener.getsockname()[1]), DEADLINE)

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=greet, args=(sock,), daemon=True).start()

    def greet(sock: Any) -> None:
        preamble = bytearray(len(RAIL_MAGIC))
        receive_exactly(sock, memoryview(preamble))
        if preamble != RAIL_MAGIC:
            door.put(sock)
            return
        ticket = bytearray(TICKET_BYTES)
        receive_exactly(sock, memoryview(ticket))
        listening.admit(sock, bytes(ticket))

    threading.Thread(target=accept, daemon=True).start()
    near = dial()
    near.sendall(b"control.")
    got: dict[str, Queue[Any]] = {"active": Queue(), "passive": Queue()}
    active = Link(
        ControlStream(near),
        Role.ACTIVE,
        {"tcp": TcpFabric(MOST["active"], dial)},
        context(),
        got["active"].put,
        "active",
    )
    passive = Link(
        ControlStream(door.get(timeout=DEADLINE)),
        Role.PASSIVE,
        {"tcp": listening},
        context(),
        got["passive"].put,
        "passive",
    )
    in_parallel(active.open, passive.open)
    for link in (active, passive):
        threading.Thread(target=link.run, daemon=True).start()

    def rails() -> list[int]:
        return [len(link._core._rails) for link in (active, passive)]

    found: dict[str, Any] = {"opened": rails(), "right": True}

    def exchange(data: bytes) -> None:
        for link, to in ((active, "passive"), (passive, "active")):
            sending = link.send(data, DEADLINE)
            found["right"] &= bytes(got[to].get(timeout=DEADLINE)) == data
            sending.wait(DEADLINE)

    exchange(SMALL)
    found["after little"] = rails()
    exchange(LARGE)
    expected = [MOST["active"]] * 2 if name == "far" else None
    if expected:  # those that are dialled join while data moves, or after it
        eventually(lambda: rails() == expected, DEADLINE)
    found["after much"] = rails()
    exchange(LARGE)
    found["granted over"] = sorted(active._core._incoming._loads)
    active.close()
    passive.close()
    listener.close()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    star = Star(folder / "star", "server")
    star.join("far", wire.Link(rate=100, delay=20, loss=0.1))
    star.join("near", wire.Link(rate=1000, delay=0.2))
    results = {name or "here": measure(star, name) for name in ("far", "near", "")}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
