"""One end of a link: in this process to test, and as a program of its own to be its peer.

    python link_process.py '{"fabric": "tcp", ...}'

The program listens, prints its port, and serves one link. It answers a message that did not come inline with its
digest, and does what inline messages (JSON) tell it; see `Served.obey`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from nvflare_rdma.channel.bodies import BufferSource
from nvflare_rdma.channel.context import LinkContext
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.limits import ChannelLimits
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC
from nvflare_rdma.errors import TransferError
from nvflare_rdma.fabric.base import Fabric
from nvflare_rdma.fabric.budget import MemoryBudget
from nvflare_rdma.fabric.options import VerbsOptions
from nvflare_rdma.fabric.send_memory import SendMemory
from nvflare_rdma.fabric.shm.fabric import ShmFabric
from nvflare_rdma.fabric.slots import SlotPool
from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TICKET_BYTES, TcpFabric, receive_exactly
from nvflare_rdma.fabric.verbs.registration_cache import RegistrationCache
from tests.support import rdma_devices
from tests.support.bodies import MaskedSource
from tests.support.waiting import PATIENCE, eventually

Dial = Callable[[], socket.socket] | None

DEADLINE = 60.0 * PATIENCE

#: What the conformance suite runs over: a name, the fabric's own name, and how to make one. ``dial`` is None on the
#: passive side.
FABRICS: dict[str, tuple[str, Callable[[Dial, int], Fabric]]] = {
    "tcp": ("tcp", lambda dial, rails: TcpFabric(rails, dial)),
    "shm-direct": ("shm", lambda dial, rails: ShmFabric(("direct",))),
    "shm-memfd": ("shm", lambda dial, rails: ShmFabric(("memfd",))),
    "verbs": ("verbs", lambda dial, rails: make_verbs(rdma_devices.pair()[dial is not None], rails)),
    "verbs-iwarp": ("verbs", lambda dial, rails: make_verbs(rdma_devices.iwarp_pair()[dial is not None], rails)),
}


def make_verbs(device: str, rails: int) -> Fabric:
    from nvflare_rdma.fabric.verbs.fabric import VerbsFabric  # needs pyverbs

    options = VerbsOptions((device,), ack_timeout=14, retries=6)
    return VerbsFabric(rails, options, RegistrationCache(64 << 20))


def pattern(size: int, seed: int = 0) -> memoryview:
    """``size`` bytes in which no two aligned groups of eight are alike."""
    words = np.arange(seed << 32, (seed << 32) + -(-size // 8), dtype=np.uint64)
    return words.view(np.uint8)[:size].data


def digest(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def make_context(options: dict) -> LinkContext:
    name = FABRICS[options["fabric"]][0]
    limits = ChannelLimits(
        max_message_bytes=2 << 30,
        handshake_timeout=DEADLINE,
        stall_timeout=options.get("stall_timeout", DEADLINE),
    )
    pool = SlotPool(keep_bytes=options.get("keep_bytes", 64 << 20))
    return LinkContext(
        limits,
        MemoryBudget(options.get("budget", 64 << 20)),
        pool,
        SendMemory(pool, 16 << 20),
        order=options.get("order", [name]),
        unavailable=dict.fromkeys(options.get("order", [name]), ""),
        host="this host",
        controller=options.get("controller", "fixed"),
        chunk_bytes=options.get("chunk_bytes", 1 << 20),
        depth=options.get("depth", 8),
        integrity=options.get("integrity", "auto"),
        window_bytes=options.get("window_bytes", 4 << 30),
    )


def make_fabrics(options: dict, dial: Dial) -> dict[str, Fabric]:
    name, make = FABRICS[options["fabric"]]
    rails = options.get("rails", 2)
    fabrics = {name: make(dial, rails)}
    if "tcp" in options.get("order", []):
        fabrics.setdefault("tcp", TcpFabric(rails, dial))
    return fabrics


def tls_context(files: dict[str, str] | None, server_side: bool) -> ssl.SSLContext | None:
    if files is None:
        return None
    role = "server" if server_side else "client"
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH if server_side else ssl.Purpose.SERVER_AUTH)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(files["ca_cert"])
    made.load_cert_chain(files[f"{role}_cert"], files[f"{role}_key"])
    return made


def resources() -> dict[str, int]:
    """What this process holds of what can leak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": threading.active_count(),
        "rss": int(status["VmRSS"].split()[0]) * 1024,
        "peak_rss": int(status["VmHWM"].split()[0]) * 1024,
    }


class Served:
    """The passive end."""

    def __init__(self, options: dict) -> None:
        self.options = options
        self.context = make_context(options)
        self.fabrics = make_fabrics(options, None)
        self.refusing = threading.Event()
        self.link: Link
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def serve(self) -> None:
        print(self.listener.getsockname()[1], flush=True)
        threading.Thread(target=self._work, daemon=True).start()
        while True:
            sock, _ = self.listener.accept()
            magic = bytearray(len(RAIL_MAGIC))
            try:
                receive_exactly(sock, memoryview(magic))
                if magic == RAIL_MAGIC:
                    ticket = bytearray(TICKET_BYTES)
                    receive_exactly(sock, memoryview(ticket))
                    self.fabrics["tcp"].admit(sock, bytes(ticket))
                    continue
            except OSError:
                continue
            assert magic == CONTROL_MAGIC
            threading.Thread(target=self._serve_link, args=(sock,), daemon=True).start()

    def _serve_link(self, sock: socket.socket) -> None:
        stream = ControlStream(sock, tls_context(self.options.get("tls"), True), server_side=True)
        stream.handshake(DEADLINE)
        self.link = Link(stream, Role.PASSIVE, self.fabrics, self.context, self.receive, "peer")
        self.link.open()
        self.link.run()
        os._exit(0)

    def _work(self) -> None:
        while True:
            self.work.get()()

    def answer(self, **fields) -> None:
        self.link.send(json.dumps(fields).encode(), DEADLINE)

    def receive(self, message: bytes | memoryview) -> None:
        if isinstance(message, bytes) and message[:1] == b"{":
            self.work.put(lambda: self.obey(json.loads(message)))
            return
        self.answer(received=len(message), digest=digest(message))

    def obey(self, order: dict) -> None:
        match order.pop("do"):
            case "send":
                self.link.send(pattern(order["size"], order["seed"]), DEADLINE)
            case "offer":
                message = pattern(order["size"], order["seed"])
                source = MaskedSource(message, order["unit"]) if order["unit"] else BufferSource(message)
                try:
                    self.link.offer(source, order["label"]).wait(DEADLINE)
                    self.answer(failure="")
                except TransferError as error:
                    self.answer(failure=str(error))
            case "send and give up":
                sending = self.link.send(pattern(order["size"], order["seed"]), DEADLINE)
                self.link.withdraw(sending, "changed its mind")
            case "refuse the next":
                incoming = eventually(lambda: [t for t, (landed, _) in self.link.incoming().items() if landed])
                self.link.refuse(incoming[0], "disk full")
            case "tell":
                incoming = self.link._core._incoming
                self.answer(
                    **resources(),
                    budget_in_use=self.context.budget.in_use,
                    budget_peak=self.context.budget.peak,
                    incoming=len(self.link.incoming()),
                    fabric=self.link.fabric,
                    granted_chunks=incoming.granted_chunks,
                    lost_chunks=incoming.lost_chunks,
                    most_granted=incoming.most_granted,
                )


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = json.loads(sys.argv[1])

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        Served(options).serve()


if __name__ == "__main__":
    main()
