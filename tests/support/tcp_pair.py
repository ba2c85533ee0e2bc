"""Two tcp endpoints, or two links, joined by real loopback sockets in one process."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from nvflare_rdma.channel.bodies import Sink
from nvflare_rdma.channel.context import LinkContext
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.limits import ChannelLimits
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.fabric.budget import MemoryBudget
from nvflare_rdma.fabric.send_memory import SendMemory
from nvflare_rdma.fabric.slots import SlotPool
from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TICKET_BYTES, TcpFabric, receive_exactly

DEADLINE = 20.0


@contextmanager
def admitting(fabric: TcpFabric) -> Iterator[Callable[[], socket.socket]]:
    """Serve rails for ``fabric``; yields how to dial."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                preamble = bytearray(len(RAIL_MAGIC) + TICKET_BYTES)
                try:
                    receive_exactly(sock, memoryview(preamble))
                except OSError:
                    continue
                fabric.admit(sock, bytes(preamble[len(RAIL_MAGIC) :]))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield lambda: socket.create_connection(address, timeout=DEADLINE)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE)


def context(limits: ChannelLimits | None = None, budget: int = 64 << 20, **fields) -> LinkContext:
    settings = {
        "order": ("verbs", "tcp"),
        "unavailable": {"verbs": "no device in this test", "tcp": ""},
        "chunk_bytes": 256 * 1024,
        **fields,
    }
    limits, pool = limits or ChannelLimits(max_message_bytes=1 << 30), SlotPool()
    return LinkContext(limits, MemoryBudget(budget), pool, SendMemory(pool, 16 << 20), **settings)


class LinkPair:
    """``active`` and ``passive`` are open links; ``inbox[link]`` gets what each receives."""

    def __init__(self, active: Link, passive: Link, inbox: dict[Link, queue.Queue], contexts) -> None:
        self.active, self.passive, self.inbox = active, passive, inbox
        self.active_context, self.passive_context = contexts
        self.runners = [threading.Thread(target=link.run, daemon=True) for link in (active, passive)]
        for runner in self.runners:
            runner.start()

    def receive(self, link: Link) -> memoryview | bytes:
        return self.inbox[link].get(timeout=DEADLINE)

    def join(self) -> None:
        for runner in self.runners:
            runner.join(DEADLINE)
            assert not runner.is_alive(), "a link did not end"


@contextmanager
def link_pair(
    active_context: LinkContext | None = None,
    passive_context: LinkContext | None = None,
    tls: tuple | None = None,
    dial: Callable[[], socket.socket] | None = None,
    rails: int = 2,
    sinks: Mapping[int, Sink] | None = None,
    other_fabrics: Sequence[str] = (),
) -> Iterator[LinkPair]:
    """Open links. ``sinks``: of the passive one, by label. ``tls``: (client context, server context). ``dial`` replaces
    how rails are dialled. ``other_fabrics`` are offered by both, and are tcp by another name."""
    contexts = (active_context or context(), passive_context or context())
    client_tls, server_tls = tls or (None, None)
    listening = TcpFabric(rails)
    near, far = socket.socketpair()
    inbox: dict[str, queue.Queue] = {"active": queue.Queue(), "passive": queue.Queue()}
    with admitting(listening) as default_dial:
        streams: dict[str, ControlStream] = {}

        def greet(role: str, sock: socket.socket, tls_context, server_side: bool) -> None:
            streams[role] = ControlStream(sock, tls_context, server_side)
            streams[role].handshake(DEADLINE)

        in_parallel(lambda: greet("active", near, client_tls, False), lambda: greet("passive", far, server_tls, True))
        active = Link(
            streams["active"],
            Role.ACTIVE,
            {"tcp": TcpFabric(rails, dial or default_dial), **{name: TcpFabric(rails) for name in other_fabrics}},
            contexts[0],
            inbox["active"].put,
            "active",
        )
        passive = Link(
            streams["passive"],
            Role.PASSIVE,
            {"tcp": listening, **{name: TcpFabric(rails) for name in other_fabrics}},
            contexts[1],
            inbox["passive"].put,
            "passive",
            lambda label, again: (sinks or {}).get(label),
        )
        in_parallel(active.open, passive.open)
        pair = LinkPair(active, passive, {active: inbox["active"], passive: inbox["passive"]}, contexts)
        try:
            yield pair
        finally:
            active.close()
            passive.close()
            pair.join()


def in_parallel(*calls: Callable[[], object]) -> None:
    """Run calls at once; raises the first error."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "timed out"
    if errors:
        raise errors[0]
