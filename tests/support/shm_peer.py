"""An shm endpoint that does what it is told: in this process (`Peer`), or in another one (`RemotePeer`).

Run as a script, it obeys one JSON line after the other from the socket whose number is its argument. That socket
stands for the control stream of a channel: what it carries is not ordered with the fabric's own messages.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import default_rng  # now: it can't be imported by a user who may not read the package

from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.shm import handshake, process_memory
from nvflare_rdma.fabric.shm.endpoint import ShmEndpoint
from nvflare_rdma.fabric.shm.fabric import ShmFabric
from tests.support.recorder import Recorder

DEADLINE = 20.0


def pattern(seed: int, size: int) -> bytes:
    return default_rng(seed).bytes(size)


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    return sum("memfd:nvflare-rdma" in line for line in Path("/proc/self/maps").read_text().splitlines())


class Peer:
    """Arguments and results are JSON, so that each method works over `RemotePeer` too."""

    def __init__(self) -> None:
        self.events = Recorder()
        self.endpoint: ShmEndpoint
        self.buffers: dict[int, memoryview] = {}
        self.regions: dict[int, Any] = {}

    def offer(self, *paths: str) -> dict[str, str]:
        self.endpoint, offer = ShmFabric(paths or ("direct", "memfd")).offer(self.events)
        return {"name": offer["name"], "ticket": offer["ticket"].hex()}

    def connect(self, offer: dict[str, str], *paths: str) -> dict[str, str]:
        fabric = ShmFabric(paths or ("direct", "memfd"))
        ticket = bytes.fromhex(offer["ticket"])
        self.endpoint = fabric.connect({"name": offer["name"], "ticket": ticket}, self.events)
        return dict(self.endpoint.paths)

    def paths(self) -> dict[str, str]:
        return dict(self.endpoint.paths)

    def buffer(self, name: int, size: int, allocate: bool = True) -> None:
        """Memory to receive in: the endpoint's own if it wants that and ``allocate``, filled with 0xAA."""
        view = self.endpoint.allocate(size) if allocate else None
        self.buffers[name] = memoryview(bytearray(size)) if view is None else view
        self.buffers[name][:] = b"\xaa" * size
        self.regions[name] = self.endpoint.register(self.buffers[name])

    def free(self, name: int) -> None:
        self.regions.pop(name).close()
        del self.buffers[name]

    def expose(self, name: int, notification: int, offset: int, length: int) -> list[int]:
        remote = self.regions[name].expose(notification, offset, length, 0)
        return [remote.key, remote.address, remote.length]

    def revoke(self, name: int, notification: int) -> None:
        self.regions[name].revoke(notification)

    def write(self, notification: int, remote: list[int], seed: int, size: int) -> None:
        self.endpoint.write(0, memoryview(pattern(seed, size)), RemoteSlice(*remote), notification, seed)

    def landed(self) -> list[int]:
        return list(self.events.landings.get(timeout=DEADLINE))

    def written(self) -> int:
        return self.events.writes.get(timeout=DEADLINE)

    def down(self) -> str:
        rail, error = self.events.down.get(timeout=DEADLINE)
        assert rail == 0
        return f"{type(error).__name__}: {error}"

    def failed(self) -> str:
        error = self.events.failures.get(timeout=DEADLINE)
        return f"{type(error).__name__}: {error}"

    def unread(self) -> list[int]:
        """How many landings, writes, rail_downs and failures nobody has asked for."""
        e = self.events
        return [q.qsize() for q in (e.landings, e.writes, e.down, e.failures)]

    def digest(self, name: int, start: int = 0, stop: int | None = None) -> str:
        return digest(self.buffers[name][start:stop])

    def counts(self) -> list[int]:
        return [descriptors(), mappings()]

    def pid(self) -> int:
        return os.getpid()

    def undumpable(self, user: int) -> None:
        """What a hardened process does: another process of the user may not trace it (PR_SET_DUMPABLE)."""
        self.become(user)
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)

    def forbid_reading(self) -> None:
        """What a container's seccomp profile may do: process_vm_readv fails with EPERM in this process."""
        forbid(310 if os.uname().machine == "x86_64" else 270)

    def read_only_when_told(self) -> None:
        """What Yama does to this process: the first attempt at reading the peer is refused."""
        attempts = iter([PermissionError(1, "process_vm_readv: Operation not permitted")])

        def read_into(pid: int, address: int, target: memoryview) -> None:
            for refusal in attempts:
                raise refusal
            process_memory.read_into(pid, address, target)

        handshake.read_into = read_into

    def become(self, user: int) -> None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as if started by that user

    def show_ticket(self, offer: dict[str, str]) -> str:
        """Dial without looking who listens."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(DEADLINE)
            sock.connect("\0" + offer["name"])
            try:
                sock.send(handshake.MAGIC + bytes.fromhex(offer["ticket"]))
                return sock.recv(64).decode()
            except ConnectionError:
                return ""

    def exchange_chunks(self, count: int, name: int, slices: list[list[int]], base: int, size: int) -> list[str]:
        """Write ``count`` chunks at once with the peer's; wait for everything; the hashes of what landed."""
        for i in range(count):
            self.write(base + i, slices[i], base + i, size)
        for _ in range(count):
            self.landed()
            self.written()
        return [self.digest(name, i * size, (i + 1) * size) for i in range(count)]

    def close(self) -> None:
        self.endpoint.close()


def forbid(number: int) -> None:
    """A seccomp filter (seccomp(2)): system call ``number`` fails with EPERM."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    code = np.array(
        [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)],
        dtype=[("code", "u2"), ("jt", "u1"), ("jf", "u1"), ("k", "u4")],
    )
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(Program(len(code), code.ctypes.data)), 0, 0) == 0  # PR_SET_SECCOMP


class RemotePeer:
    """A `Peer` in a process of its own; every method of it can be called, and fails after a deadline."""

    def __init__(self, **environment: str) -> None:
        near, far = socket.socketpair()
        near.settimeout(2 * DEADLINE)
        path = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with far:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(far.fileno())],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
            )
        self._socket = near
        self._stream = near.makefile("rw")

    def start(self, name: str, *arguments: Any) -> None:
        self._stream.write(json.dumps([name, arguments]) + "\n")
        self._stream.flush()

    def result(self) -> Any:
        answer = json.loads(self._stream.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.start(name, *arguments)
            return self.result()

        return call

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def __enter__(self) -> RemotePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._stream.close()
        self._socket.close()
        try:
            self.process.wait(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=DEADLINE)


def serve(number: int) -> None:
    peer = Peer()
    with socket.socket(fileno=number) as sock, sock.makefile("rw") as stream:
        for line in stream:
            name, arguments = json.loads(line)
            try:
                answer = {"result": getattr(peer, name)(*arguments)}
            except Exception as error:  # noqa: BLE001 - the test raises it
                answer = {"error": f"{type(error).__name__}: {error}"}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
    if hasattr(peer, "endpoint"):
        peer.endpoint.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
