"""The two processes of `channel_raw.py` and `verbs_costs.py`: a link that is set up by `open_link`, and the references
beside it."""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from measuring import MIB, Measured, Meter, obey, pattern

from nvflare_rdma.channel import ChannelLimits, ControlStream, Link, LinkContext, Role
from nvflare_rdma.channel.protocol import CONTROL_MAGIC
from nvflare_rdma.fabric import RAIL_MAGIC, TICKET_BYTES, MemoryBudget, SendMemory, SlotPool, TcpFabric, receive_exactly
from nvflare_rdma.fabric.shm import ShmFabric

HOST, NAME, TIMEOUT = "127.0.0.1", "bench", 120.0
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)
Dial = Callable[[], socket.socket] | None
#: What is measured -> the fabric's name, and how to make one; ``dial`` is None on the listening side.
FABRICS: dict[str, tuple[str, Callable[[dict[str, Any], Dial], Any]]] = {
    "tcp": ("tcp", lambda options, dial: TcpFabric(options["rails"], dial)),
    "shm-direct": ("shm", lambda options, dial: ShmFabric(("direct",))),
    "shm-memfd": ("shm", lambda options, dial: ShmFabric(("memfd",))),
    "verbs": ("verbs", lambda options, dial: make_verbs(options, dial)),
}


def make_verbs(options: dict[str, Any], dial: Dial) -> Any:
    """``devices``: the receiver's, the sender's. ``in_place``: see `endpoint.IN_PLACE_BYTES`."""
    from nvflare_rdma.fabric import VerbsOptions
    from nvflare_rdma.fabric.verbs import RegistrationCache, VerbsFabric, address_on, endpoint

    endpoint.IN_PLACE_BYTES = options["in_place"]
    end = int(dial is not None)
    chosen = VerbsOptions((options["devices"][end],))
    near = address_on(options["hosts"][end])
    return VerbsFabric(options["rails"], chosen, RegistrationCache(64 * MIB), near)


def open_link(role: str, options: dict[str, Any], tls: ssl.SSLContext | None, deliver: Callable[[Any], None]) -> Link:
    """All that this file knows of how a link is made."""
    limits = ChannelLimits(max_message_bytes=1 << 31)
    name, make = FABRICS[options["fabric"]]
    host, source = options.get("hosts", (HOST, ""))
    port = options["port"]
    pool = SlotPool(keep_bytes=None)
    context = LinkContext(
        *(limits, MemoryBudget(64 * MIB), pool, SendMemory(pool, 16 * MIB), (name,), {name: ""}),
        host="this",
        chunk_bytes=options["chunk"],
    )
    if role == "send":
        dial = functools.partial(socket.create_connection, (host, port), TIMEOUT, (source, 0))
        sock = dial()
        if tls is None:
            sock.sendall(CONTROL_MAGIC)
        made, side = make(options, dial), Role.ACTIVE
    else:
        listener = socket.create_server((host, port))
        print("{}", flush=True)
        sock, _ = listener.accept()
        if tls is None:
            receive_exactly(sock, memoryview(bytearray(len(CONTROL_MAGIC))))
        made, side = make(options, None), Role.PASSIVE
        threading.Thread(target=admit_rails, args=(listener, made), daemon=True).start()
    stream = ControlStream(sock, tls, server_side=role != "send")
    stream.handshake(TIMEOUT)
    link = Link(stream, side, {name: made}, context, deliver, NAME)
    link.open()
    threading.Thread(target=link.run, daemon=True).start()
    return link


def anonymous_tls(server_side: bool) -> ssl.SSLContext:
    """TLS without certificates: who the peer is does not matter here, and the handshake is not timed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")
    return context


def admit_rails(listener: socket.socket, fabric: Any) -> None:
    while True:
        sock, _ = listener.accept()
        preamble = bytearray(len(RAIL_MAGIC) + TICKET_BYTES)
        receive_exactly(sock, memoryview(preamble))
        fabric.admit(sock, bytes(preamble[len(RAIL_MAGIC) :]))


class LinkSide(Measured):
    def __init__(self, role: str, options: dict[str, Any]) -> None:
        self._total, self._size = options["total"], options["message"]
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._data = memoryview(b"")
        if role == "send":
            data = pattern(self._size)
            # The registration cache keeps what belongs to an array, and nothing else.
            self._data = np.array(data).data if options.get("array") else memoryview(data)
        tls = anonymous_tls(server_side=role != "send") if options["sealed"] else None
        self.link = open_link(role, options, tls, self._inbox.put)
        self._meter = Meter()

    def send(self) -> dict[str, Any]:
        start = time.monotonic()
        for _ in range(self._total // self._size):
            self.link.send(self._data, TIMEOUT)
        return {"at": start}

    def receive(self) -> dict[str, Any]:
        # Each message goes as soon as it is here, as in a consumer that keeps up.
        for _ in range(self._total // self._size):
            self._inbox.get(timeout=TIMEOUT)
        return {"at": time.monotonic()}

    def send_one(self) -> dict[str, Any]:
        self.link.send(self._data, TIMEOUT)
        return {"digest": zlib.crc32(self._data)}

    def receive_one(self) -> dict[str, Any]:
        return {"digest": zlib.crc32(self._inbox.get(timeout=TIMEOUT))}


class LoopSide:
    """The bare loopback loop, and the two sides of `process_vm_readv`."""

    def __init__(self, role: str, options: dict[str, Any]) -> None:
        self._total, self._chunk = options["total"], options["chunk"]
        # As large as a link's message, so that it is no more at home in the caches.
        self._memory = memoryview(pattern(options["message"]))
        self._offsets = range(0, options["message"], self._chunk)
        self._libc = ctypes.CDLL(None, use_errno=True)
        if role == "receive":
            listener = socket.create_server((HOST, options["port"]))
            print("{}", flush=True)
            self._sock, _ = listener.accept()
        else:
            self._sock = socket.create_connection((HOST, options["port"]), TIMEOUT)
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> dict[str, Any]:
        start = time.monotonic()
        for _ in range(self._total // len(self._memory)):
            for offset in self._offsets:
                self._sock.sendall(self._memory[offset : offset + self._chunk])
        return {"at": start}

    def receive(self) -> dict[str, Any]:
        for _ in range(self._total // len(self._memory)):
            for offset in self._offsets:
                receive_exactly(self._sock, self._memory[offset : offset + self._chunk])
        return {"at": time.monotonic()}

    def expose(self) -> dict[str, Any]:
        # Where Yama lets only a parent read a process's memory, the process itself can let everybody.
        self._libc.prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
        return {"pid": os.getpid(), "address": ctypes.addressof(ctypes.c_char.from_buffer(self._memory))}

    def read(self, pid: int, address: int) -> dict[str, Any]:
        into = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        call = self._libc.process_vm_readv
        call.restype = ctypes.c_ssize_t
        start = time.monotonic()
        for step in range(self._total // self._chunk):
            offset = self._offsets[step % len(self._offsets)]
            own = (ctypes.c_size_t * 2)(into + offset, self._chunk)
            other = (ctypes.c_size_t * 2)(address + offset, self._chunk)
            got = call(pid, ctypes.byref(own), ctypes.c_ulong(1), ctypes.byref(other), ctypes.c_ulong(1), 0)
            if got != self._chunk:
                return {"refused": os.strerror(ctypes.get_errno())}
        return {"seconds": time.monotonic() - start}


def serve(kind: str, role: str, options: dict[str, Any]) -> None:
    side: Any = LinkSide(role, options) if kind == "link" else LoopSide(role, options)
    names = ("idle", "lap", "send", "receive", "used", "send_one", "receive_one", "expose", "read")
    obey({name: getattr(side, name) for name in names if hasattr(side, name)})
