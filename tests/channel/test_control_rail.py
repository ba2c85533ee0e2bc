"""Why there is a rail on the control stream: networks that let TLS through and nothing else.

A load balancer that routes by the name in the TLS greeting, or a firewall that looks into connections, passes on a
secure control stream. Rails go to the same port but speak no TLS (their chunks are sealed one by one): they are cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.door import Door, Pending, dial
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.fabric.tcp import TcpFabric
from tests.support.certificates import Authority
from tests.support.link_process import tls_context
from tests.support.tcp_pair import DEADLINE, context

TLS_RECORD = b"\x16"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("pki"))
    return {**authority.issue("server", "server"), **authority.issue("client", "client")}


@contextmanager
def passing_tls_only(target: tuple[str, int]) -> Iterator[tuple[tuple[str, int], list[bytes]]]:
    """A port that passes on connections which begin with a TLS record, and the first bytes of those that it cut."""
    cut: list[bytes] = []

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def look_at(near: socket.socket) -> None:
        first = near.recv(1, socket.MSG_PEEK)
        if first != TLS_RECORD:
            cut.append(near.recv(64))
            near.close()
            return
        far = socket.create_connection(target, DEADLINE)
        far.settimeout(None)
        threading.Thread(target=pass_on, args=(far, near), daemon=True).start()
        pass_on(near, far)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=look_at, args=(near,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[:2], cut
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def test_where_only_tls_gets_through_everything_goes_on_the_control_stream(certificates, caplog):
    caplog.set_level(logging.INFO)
    inbox: queue.Queue[bytes] = queue.Queue()
    links: queue.Queue[Link] = queue.Queue()
    fabric = TcpFabric(2)

    def on_connection(sock: socket.socket, stream: ControlStream, admitted) -> None:
        link = Link(stream, Role.PASSIVE, {"tcp": fabric}, context(), lambda m: inbox.put(bytes(m)), "passive")
        link.open()
        admitted()
        links.put(link)
        link.run()

    listener = socket.create_server(("127.0.0.1", 0))
    door = Door(listener, lambda: tls_context(certificates, True), fabric, on_connection, "the door")
    threading.Thread(target=door.serve, daemon=True).start()
    try:
        with passing_tls_only(door.address) as (address, cut):
            _, stream = dial(address, tls_context(certificates, False), Pending(), DEADLINE)
            rails = TcpFabric(2, lambda: socket.create_connection(address, DEADLINE))
            link = Link(stream, Role.ACTIVE, {"tcp": rails}, context(), print, "active")
            link.open()
            runner = threading.Thread(target=link.run, daemon=True)
            runner.start()
            try:
                message = hashlib.shake_128(b"message").digest(3_000_000)
                link.send(message, DEADLINE).wait(DEADLINE)
                assert inbox.get(timeout=DEADLINE) == message
                assert link.fabric == links.get(timeout=DEADLINE).fabric == "control"
            finally:
                link.close()
                runner.join(DEADLINE)
            assert not runner.is_alive()
            assert cut, "no rail was tried"
            assert not any(first.startswith(TLS_RECORD) for first in cut)
    finally:
        door.close()
    lines = [record.getMessage() for record in caplog.records]
    for name in ("active", "passive"):
        (line,) = [line for line in lines if line.startswith(f"{name}: no rail")]
        assert line.startswith(f"{name}: no rail, data goes over the control stream, which is slower: ")
        assert "no tcp rail could be opened: " in line
