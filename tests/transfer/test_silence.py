"""Links whose peer falls silent without a word: a NAT has forgotten them while nothing moved, or the peer hangs."""

from __future__ import annotations

import socket
import threading

import pytest

from nvflare_rdma.transfer import peers
from tests.support import namespaces
from tests.support.relay import Relay
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import PATIENCE, eventually


@pytest.fixture
def apart():
    namespaces.require(
        "ip link add near type veth peer name far && ip rule add pref 50 ipproto tcp sport 1-2 iif near blackhole"
    )


def test_connections_that_are_forgotten_between_transfers_are_dialled_anew(apart, tmp_path):
    results = namespaces.run_apart("cells_silenced.py", tmp_path, 100 * PATIENCE)
    assert list(results) == ["before", "all, get", "all, put", "rails, get", "rails, put"]
    assert {name: (got["same"], got["path"]) for name, got in results.items()} == dict.fromkeys(
        results, (True, "direct")
    )
    links = [got["link"] for got in results.values()]
    assert len(set(links[:3])) == 3  # others each time, and
    assert len(set(links[2:])) == 1  # this one has got other rails
    assert "it does not answer" in "\n".join(results["all, get"]["log"])
    # The site writes in this one; in the one before, the server says it.
    assert "a firewall or NAT on the way may have forgotten the connection" in "\n".join(results["rails, put"]["log"])


@pytest.fixture
def relayed(cell):
    """A server, a site, and what joins them."""
    server, site = cell("server"), cell("site-1", ports=None)
    invitation = server.invite("site-1")
    with Relay(("127.0.0.1", invitation["port"])) as relay:
        site.dial("server", {**invitation, "port": relay.address[1]})
        assert server.await_open("site-1") is not None
        yield server, site, relay


def test_a_link_that_works_is_used_again(relayed, monkeypatch):
    server, site, _ = relayed
    monkeypatch.setattr(peers, "_QUIET_SECONDS", 0.0)
    for one, other in ((site, "server"), (server, "site-1")):
        link = one.find(other)
        for _ in range(3):
            assert one.find_alive(other) is link is not None


@pytest.mark.parametrize("side", ["active", "passive"])
def test_a_link_whose_peer_does_not_answer_is_given_up(relayed, monkeypatch, caplog, side):
    server, site, relay = relayed
    monkeypatch.setattr(peers, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(peers, "_ANSWER_SECONDS", 0.5)
    relay.silence()
    one, other = (site, "server") if side == "active" else (server, "site-1")
    found = []
    threads = [threading.Thread(target=lambda: found.append(one.find_alive(other))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert found == [None] * 4
    assert caplog.text.count("is given up: nothing has come from the peer for") == 1
    eventually(lambda: not one._links.get(other), DEADLINE)
    monkeypatch.setattr(peers, "_ANSWER_SECONDS", DEADLINE)
    again = site.dial("server", server.invite("site-1"))  # not by the relay
    assert site.find_alive("server") is again
    opened = server.await_open("site-1")
    assert server.find_alive("site-1") is opened is not None


def test_whoever_has_dialled_anew_is_served_over_the_new_link(relayed):
    """Also where this side takes the old one for alive, and the new one is not open here yet."""
    server, site, relay = relayed
    old = server.find("site-1")
    relay.silence()
    for _ in range(5):
        site.dial("server", server.invite("site-1"))
        assert server.await_open("site-1") is not old


def test_dead_paths_are_noticed_by_the_kernel_on_both_sides(relayed):
    server, site, _ = relayed
    links = [server.find("site-1"), site.find("server")]
    sockets = [sock for link in links for sock in (link._stream._sock, *link._rails.endpoint._sockets.values())]
    assert len(sockets) == 6
    for sock in sockets:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        wait, every, count, unanswered = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
        assert wait + every * count == unanswered / 1000 == 60
