"""How many rails a site may open to a driver's process, and what is left for others."""

from __future__ import annotations

import contextlib
import math
import socket

import pytest
from nvflare.fuel.f3.drivers.connector_info import Mode

from nvflare_rdma.channel.protocol import wire
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC
from nvflare_rdma.fabric import RAIL_MAGIC, RailPlaces
from nvflare_rdma.runtime import shared
from tests.support.processes import free_port
from tests.support.running_drivers import DEADLINE, running, wait_for_port
from tests.support.waiting import eventually


@pytest.fixture
def port(monkeypatch):
    """Of a driver whose process may have 32 descriptors: 16 for rails, of which a site has 8."""
    monkeypatch.setattr(shared().rail_places, "_descriptors", lambda: 32)
    port = free_port()
    with running(f"rdma://127.0.0.1:{port}", Mode.PASSIVE):
        wait_for_port(port)
        yield port


def connect(stack: contextlib.ExitStack, host: str, port: int) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE, source_address=(host, 0)))


def opened(stack: contextlib.ExitStack, host: str, port: int) -> int:
    """Begin a link from an address of this host, try all rails that are offered; return how many were let in."""
    control, parser = connect(stack, host, port), wire.Parser(1 << 20, 1 << 20)
    control.sendall(CONTROL_MAGIC + wire.encode(wire.Hello({"tcp": ""}, 1 << 30, 65536, 64)))
    while not (offers := [m for m in parser.feed(control.recv(65536)) if isinstance(m, wire.Open)]):
        pass
    count = 0
    for ticket in offers[0].offer["tickets"]:
        rail = connect(stack, host, port)
        rail.sendall(RAIL_MAGIC + ticket)
        with contextlib.suppress(ConnectionResetError):
            count += rail.recv(1) == b"\x01"
    return count


def test_a_site_has_only_so_many_rails_and_others_still_get_some(port):
    with contextlib.ExitStack() as stack:
        assert [opened(stack, "127.0.0.3", port) for _ in range(4)] == [4, 2, 2, 0]
        assert opened(stack, "127.0.0.4", port) == 4
        assert sorted(shared().rail_places.taken.values()) == [4, 8]
    eventually(lambda: shared().rail_places.taken == {}, DEADLINE)
    with contextlib.ExitStack() as stack:
        assert opened(stack, "127.0.0.3", port) == 4
    eventually(lambda: shared().rail_places.taken == {}, DEADLINE)


def test_all_sites_together_have_half_of_the_descriptors(caplog):
    places = RailPlaces(lambda: 32)
    assert [places.take(f"site-{n // 2}", first=True) for n in range(20)] == [True] * 16 + [False] * 4
    places.free("site-1", 2)
    assert places.take("site-9", first=True)
    assert not places.take("site-9", first=False)  # a quarter of them is for first rails
    (line,) = caplog.messages
    assert "a rail of site-8 is refused: it has 0, all sites have 16, and this process may have 32 descriptors" in line


def test_where_descriptors_have_no_limit_rails_have_none():
    places = RailPlaces(lambda: math.inf)
    assert all(places.take("site-1", first=False) for _ in range(5000))
