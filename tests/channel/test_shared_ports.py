"""Doors that take more than what they were opened for."""

from __future__ import annotations

import queue
import socket
import threading
from contextlib import contextmanager

import pytest

from nvflare_rdma.channel.door import Door
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC
from nvflare_rdma.channel.shared_ports import SharedPorts
from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TcpFabric
from tests.support.tcp_pair import DEADLINE

MAGIC = b"A-MAGIC!"


@contextmanager
def shared_door(ports: SharedPorts):
    door = Door(socket.create_server(("127.0.0.1", 0)), None, TcpFabric(1), print, "the door")

    ports.share(door)
    thread = threading.Thread(target=door.serve, daemon=True)
    thread.start()
    try:
        yield door
    finally:
        door.close()
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_taker_is_at_doors_that_are_open_and_at_those_that_open_later():
    ports = SharedPorts()
    taken: queue.Queue = queue.Queue()

    def taker(sock, seconds, admitted) -> None:
        admitted()
        taken.put((sock.recv(100), 0 < seconds <= 10))
        sock.close()

    with shared_door(ports) as first:
        ports.add_taker(MAGIC, taker)
        with shared_door(ports) as second:
            for door in (first, second):
                with socket.create_connection(door.address, DEADLINE) as guest:
                    guest.sendall(MAGIC + b"more")
                    assert taken.get(timeout=DEADLINE) == (b"more", True)
        ports.remove_taker(MAGIC)
        with socket.create_connection(first.address, DEADLINE) as guest:
            guest.sendall(MAGIC)
            assert guest.recv(1) == b""


@pytest.mark.parametrize("magic", [b"", b"too long a magic", CONTROL_MAGIC, RAIL_MAGIC])
def test_a_magic_that_no_taker_can_have_is_refused(magic):
    with pytest.raises(ValueError, match="can't be a taker's magic"):
        SharedPorts().add_taker(magic, print)
