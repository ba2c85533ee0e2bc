"""The two ends of `wan.py`. The receiver is a process of its own and obeys the sender's (see `measuring.obey`).

Links are put together as in the product: a control stream over the same wire, so that every grant pays the round
trip, and the fabric's rails beside it. A verbs link may fall back on tcp, and does so only when its rails have broken.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measuring import obey
from wan_cells import LONG_MESSAGE, PLAIN, Setting
from wan_wire import RECEIVER, SENDER, arrived

from nvflare_rdma.channel import ChannelLimits, ControlStream, Link, LinkContext, Role
from nvflare_rdma.channel.protocol import CONTROL_MAGIC
from nvflare_rdma.fabric import (
    RAIL_MAGIC,
    TICKET_BYTES,
    Fabric,
    MemoryBudget,
    SendMemory,
    SlotPool,
    TcpFabric,
    VerbsOptions,
    receive_exactly,
)
from nvflare_rdma.fabric.verbs import RegistrationCache, VerbsFabric

PORT = 7471
TIMEOUT = 30.0
MAGIC_BYTES = len(CONTROL_MAGIC)
PLAIN_MAGIC = b"a socket"[:MAGIC_BYTES].ljust(MAGIC_BYTES)
Dial = Callable[[], socket.socket] | None

_pool = SlotPool(keep_bytes=None)  # so that every message but the first meets warm pages
_cache = RegistrationCache(4 * LONG_MESSAGE)


def data(nbytes: int) -> memoryview:
    """The same on both sides; no two groups of eight bytes are alike."""
    return np.arange(nbytes // 8, dtype=np.uint64).view(np.uint8).data


def _equal(one: memoryview, other: memoryview) -> bool:
    # As words: the emulated CPU would take long for the flags of single bytes.
    return bool((np.frombuffer(one, np.uint64) == np.frombuffer(other, np.uint64)).all())


def make_link(
    stream: ControlStream, role: Role, setting: Setting, dial: Dial, deliver: Callable[[Any], None]
) -> tuple[Link, dict[str, Fabric]]:
    """A link that `open` is still to be called on, and its fabrics."""
    device, address = ("rxa", RECEIVER) if role is Role.PASSIVE else ("rxb", SENDER)
    fabrics: dict[str, Fabric] = {"tcp": TcpFabric(setting.rails, dial)}
    if setting.fabric == "verbs":
        near = ipaddress.ip_address(address)
        fabrics = {"verbs": VerbsFabric(setting.rails, VerbsOptions((device,)), _cache, near)} | fabrics
    context = LinkContext(
        ChannelLimits(max_message_bytes=1 << 31),
        MemoryBudget(4 * LONG_MESSAGE),
        _pool,
        SendMemory(_pool, LONG_MESSAGE),
        order=list(fabrics),
        unavailable=dict.fromkeys(fabrics, ""),
        controller="adaptive" if setting.adaptive else "fixed",
        chunk_bytes=setting.chunk,
        depth=setting.depth,
    )
    return Link(stream, role, fabrics, context, deliver, role.name.lower()), fabrics


class Noted(logging.Handler):
    """What the package warns of: rails that break and come again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.notes: list[tuple[float, str]] = []
        log = logging.getLogger("nvflare_rdma")
        log.addHandler(self)
        log.propagate = False

    def take(self) -> list[tuple[float, str]]:
        notes, self.notes = self.notes, []
        return notes

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append((time.monotonic(), record.getMessage()))


class Sender:
    """The active end of one setting."""

    def __init__(self, setting: Setting) -> None:
        self._link: Link | None = None

        def dial() -> socket.socket:
            return socket.create_connection((RECEIVER, PORT), TIMEOUT, source_address=(SENDER, 0))

        self._socket = dial()
        if setting.fabric == PLAIN:
            self._socket.sendall(PLAIN_MAGIC)
            return
        self._socket.sendall(CONTROL_MAGIC)
        stream = ControlStream(self._socket, None, server_side=False)
        stream.handshake(TIMEOUT)
        self._link, _ = make_link(stream, Role.ACTIVE, setting, dial, lambda message: None)
        self._link.open()
        threading.Thread(target=self._link.run, daemon=True).start()

    def send(self, message: memoryview) -> None:
        """Begin to send."""
        if self._link is not None:
            self._link.send(message, TIMEOUT)
            return

        def send_all() -> None:
            with contextlib.suppress(OSError):
                self._socket.sendall(message)

        threading.Thread(target=send_all, daemon=True).start()

    def close(self) -> None:
        if self._link is not None:
            self._link.close(linger=0)
        else:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


class Receiver:
    """The passive end, of one setting after the other."""

    def __init__(self) -> None:
        self._setting = Setting(PLAIN)
        self._expected = data(0)
        self._link: Link | None = None
        self._fabrics: dict[str, Fabric] = {}
        self._plain: socket.socket | None = None
        self._plain_landed = 0
        self._inbox: queue.SimpleQueue[tuple[float, memoryview]] = queue.SimpleQueue()
        self._noted = Noted()
        listener = socket.create_server((RECEIVER, PORT), backlog=64)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    # -- commands ------------------------------------------------------------------------------------------

    def expect(self, setting: dict[str, Any], nbytes: int) -> None:
        """The next connection is of that setting, and brings messages of ``nbytes``."""
        self._setting = Setting(**setting)
        if len(self._expected) != nbytes:
            self._expected = data(nbytes)

    def receive(self, seconds: float, step: float) -> dict[str, Any]:
        """The next message, or what has come of it after ``seconds``. Looks every ``step`` seconds at what is here."""
        deadline = time.monotonic() + seconds
        samples: list[tuple[float, int, int]] = []  # time, bytes that came to the interface, bytes landed
        at: float | None = None
        message: memoryview | None = None
        while message is None and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                at, message = self._inbox.get(timeout=step)
            samples.append((time.monotonic(), arrived(), self._progress(message)))
        if message is not None and not _equal(message, self._expected):
            raise SystemExit(f"what arrived differs from what was sent: {self._setting}")
        # A message that has just landed and is not yet delivered is not in progress any more: hence not the last.
        return {"at": at, "landed": max(landed for _, _, landed in samples), "samples": samples}

    def state(self) -> dict[str, Any]:
        """What the link has come to."""
        notes = self._noted.take()
        if self._link is None:
            return {"notes": notes}
        incoming = self._link._core._incoming
        return {
            "notes": notes,
            "fabric": self._link.fabric,
            "chunk": incoming._controller.chunk_bytes,
            "window": incoming._controller.window_bytes,
            "granted": incoming.granted_chunks,
            "lost": incoming.lost_chunks,
        }

    def close(self) -> None:
        link, self._link = self._link, None
        plain, self._plain = self._plain, None
        if link is not None:
            link.close(linger=0)
        if plain is not None:
            with contextlib.suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)
            plain.close()
        self._inbox = queue.SimpleQueue()
        self._fabrics = {}

    # -- connections ---------------------------------------------------------------------------------------

    def _progress(self, message: memoryview | None) -> int:
        """Bytes landed of the message that is being received."""
        if message is not None:
            return len(message)
        if (link := self._link) is not None:
            return sum(landed for landed, _ in link.incoming().values())
        return self._plain_landed

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self._take, args=(sock,), daemon=True).start()

    def _take(self, sock: socket.socket) -> None:
        inbox = self._inbox
        magic = bytearray(MAGIC_BYTES)
        receive_exactly(sock, memoryview(magic))
        if magic == RAIL_MAGIC:
            ticket = bytearray(TICKET_BYTES)
            receive_exactly(sock, memoryview(ticket))
            fabric = self._fabrics["tcp"]
            assert isinstance(fabric, TcpFabric)
            fabric.admit(sock, bytes(ticket))
        elif magic == CONTROL_MAGIC:
            stream = ControlStream(sock, None, server_side=True)
            stream.handshake(TIMEOUT)
            link, self._fabrics = make_link(
                stream, Role.PASSIVE, self._setting, None, lambda message: inbox.put((time.monotonic(), message))
            )
            self._link = link
            link.open()
            link.run()
        else:
            self._take_plain(sock, inbox)

    def _take_plain(self, sock: socket.socket, inbox: queue.SimpleQueue[tuple[float, memoryview]]) -> None:
        self._plain = sock
        slot = _pool.take(len(self._expected))
        self._plain_landed = 0
        with contextlib.suppress(OSError):
            while self._plain_landed < len(slot):
                got = sock.recv_into(slot[self._plain_landed :])
                if not got:
                    return
                self._plain_landed += got
            inbox.put((time.monotonic(), slot))


def main() -> None:
    receiver = Receiver()
    names = ("expect", "receive", "state", "close")
    obey({name: getattr(receiver, name) for name in names})


if __name__ == "__main__":
    main()
