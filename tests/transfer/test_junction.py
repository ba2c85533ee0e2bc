"""Connections that a parent joins, on real sockets: who is joined with whom, who is not, and what that costs it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from nvflare_rdma.channel import Door
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import TcpFabric, listen_tcp, receive_exactly
from nvflare_rdma.transfer import junction as junction_module
from nvflare_rdma.transfer.junction import Junction
from nvflare_rdma.transfer.remote_listener import RemoteListener
from nvflare_rdma.transfer.routes import (
    DIALLING_BYTES,
    JOINED_BYTES,
    ROUTE_MAGIC,
    TOKEN_BYTES,
    RouteKey,
    dialling,
    parse_joined,
)
from tests.support.link_process import resources
from tests.support.processes import ROOT, environment
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

MIB = 1 << 20


class Parent:
    """A parent's port, on which connections are joined."""

    def __init__(self, splice: bool) -> None:
        self.junction = Junction("server", "the server's data port", splice)
        fabric = TcpFabric(1)
        self.door = Door(listen_tcp("127.0.0.1", 0), None, fabric, self.junction.refuse, "the server's data port", 5.0)
        self.door.takers = dict(self.junction.takers)
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self.door.serve, name="rdma-parent", daemon=True).start()

    def connect(self) -> socket.socket:
        sock = socket.create_connection(self.door.address, DEADLINE)
        self.sockets.append(sock)
        return sock

    def wait(self, key: RouteKey, number: int = 0) -> socket.socket:
        """A connection that waits, and is known to."""
        before, sock = self.waiting(key), self.connect()
        sock.sendall(key.waiting(number))
        eventually(lambda: self.waiting(key) > before, DEADLINE)
        return sock

    def waiting(self, key: RouteKey) -> int:
        route = self.junction._routes.get(key.id)
        return len(route.waiting) if route is not None else 0

    def dial(self, key: RouteKey, site: str = "site-1") -> socket.socket:
        sock = self.connect()
        sock.sendall(dialling(key.token(site)))
        return sock

    def pair(self, key: RouteKey, number: int = 0, site: str = "site-1") -> tuple[socket.socket, socket.socket]:
        """Who has waited and who has dialled, joined."""
        waiting = self.wait(key, number)
        dialled = self.dial(key, site)
        assert told(waiting) == dialled.getsockname()
        return waiting, dialled


def told(sock: socket.socket) -> tuple[str, int]:
    data = bytearray(JOINED_BYTES)
    receive_exactly(sock, memoryview(data))
    return parse_joined(bytes(data))


def assert_dropped(sock: socket.socket) -> None:
    sock.settimeout(DEADLINE)
    with contextlib.suppress(ConnectionError):
        assert sock.recv(1) == b""


@contextlib.contextmanager
def parents(splice: bool) -> Iterator[Parent]:
    made, before = Parent(splice), resources()["descriptors"]
    try:
        yield made
    finally:
        made.junction.close()
        made.door.close()
        for sock in made.sockets:
            sock.close()
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("rdma")], DEADLINE)
        assert resources()["descriptors"] < before


@pytest.fixture(params=[True, False], ids=["spliced", "copied"])
def parent(request) -> Iterator[Parent]:
    with parents(request.param) as made:
        yield made


@pytest.fixture
def spliced() -> Iterator[Parent]:
    with parents(True) as made:
        yield made


# -- what is joined ------------------------------------------------------------------------------------------


def test_bytes_go_both_ways_and_who_waits_learns_who_dials(parent):
    waiting, dialled = parent.pair(parent.junction.open("server.job"))
    dialled.sendall(b"to you")
    assert waiting.recv(100) == b"to you"
    waiting.sendall(b"and back")
    assert dialled.recv(100) == b"and back"
    assert parent.junction.pairs == 1


def test_what_is_said_with_the_token_at_once_arrives(spliced):
    key = spliced.junction.open("server.job")
    waiting, dialled = spliced.wait(key), spliced.connect()
    dialled.sendall(dialling(key.token("site-1")) + b"hello")
    told(waiting)
    assert waiting.recv(100) == b"hello"


def test_the_end_of_one_direction_is_passed_on_and_the_other_goes_on(parent):
    waiting, dialled = parent.pair(parent.junction.open("server.job"))
    dialled.sendall(b"all")
    dialled.shutdown(socket.SHUT_WR)
    assert waiting.recv(100) == b"all"
    assert waiting.recv(100) == b""
    waiting.sendall(b"x" * MIB)
    got = bytearray(MIB)
    receive_exactly(dialled, memoryview(got))
    waiting.close()
    assert_dropped(dialled)
    eventually(lambda: parent.junction.pairs == 0, DEADLINE)


def test_a_reset_ends_both(parent):
    waiting, dialled = parent.pair(parent.junction.open("server.job"))
    dialled.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    dialled.close()
    assert_dropped(waiting)


def test_who_does_not_read_holds_up_who_sends_and_gets_everything(parent):
    waiting, dialled = parent.pair(parent.junction.open("server.job"))
    size, sent = 64 * MIB, 0
    dialled.settimeout(1.0)
    block = bytes(range(256)) * 4096
    with contextlib.suppress(TimeoutError):
        while sent < size:
            sent += dialled.send(block[sent % MIB :])
    assert sent < size
    got = bytearray(sent)
    receive_exactly(waiting, memoryview(got))
    assert got == (block * (sent // MIB + 1))[:sent]


def test_a_pair_with_nothing_to_do_keeps_no_pipes(spliced, monkeypatch):
    from nvflare_rdma.transfer import joining

    monkeypatch.setattr(joining, "_IDLE_MS", 50)
    waiting, dialled = spliced.pair(spliced.junction.open("server.job"))
    idle = resources()["descriptors"]
    for _ in range(2):
        dialled.sendall(b"x")
        assert waiting.recv(1) == b"x"
        eventually(lambda: resources()["descriptors"] == idle, DEADLINE)


def test_who_dials_first_waits_a_moment(parent):
    key = parent.junction.open("server.job")
    dialled = parent.dial(key)
    waiting = parent.connect()
    waiting.sendall(key.waiting(0))
    told(waiting)
    dialled.sendall(b"hello")
    assert waiting.recv(100) == b"hello"


@pytest.mark.parametrize("how", ["splice", "copy"])
def test_a_parent_s_memory_does_not_grow_with_what_goes_through(how):
    command = [sys.executable, "-m", "tests.support.junction_process", how]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port, *hexes = json.loads(process.stdout.readline())
        key = RouteKey(*map(bytes.fromhex, hexes))

        def rss() -> int:
            print(file=process.stdin, flush=True)
            return int(process.stdout.readline())

        address = "127.0.0.1", port
        with socket.create_connection(address) as waiting, socket.create_connection(address) as to:
            waiting.sendall(key.waiting(0))
            to.sendall(dialling(key.token("site-1")))
            told(waiting)
            block, got = bytes(range(256)) * 4096, bytearray(MIB)
            sender = threading.Thread(target=lambda: [to.sendall(block) for _ in range(101)], daemon=True)
            sender.start()
            receive_exactly(waiting, memoryview(got))
            before = rss()
            for _ in range(100):
                receive_exactly(waiting, memoryview(got))
                assert got == block
            assert rss() < before + 2 * MIB
            sender.join(DEADLINE)
        process.stdin.close()


# -- who is not joined ---------------------------------------------------------------------------------------


def test_who_finds_nobody_waiting_is_dropped(spliced, monkeypatch, caplog):
    monkeypatch.setattr(junction_module, "PATIENCE_SECONDS", 0.1)
    assert_dropped(spliced.dial(spliced.junction.open("server.job")))
    eventually(lambda: "nobody waits for it: server.job has gone, or is too busy" in caplog.text, DEADLINE)


def test_who_has_gone_does_not_wait(spliced, monkeypatch):
    monkeypatch.setattr(junction_module, "PATIENCE_SECONDS", 0.1)
    key = spliced.junction.open("server.job")
    spliced.wait(key).close()
    assert_dropped(spliced.dial(key))
    assert spliced.waiting(key) == 0


def test_who_says_something_while_it_waits_is_dropped(spliced):
    key = spliced.junction.open("server.job")
    early, waiting = spliced.wait(key, 0), spliced.wait(key, 1)
    early.sendall(b"x")
    spliced.dial(key)
    told(waiting)
    assert_dropped(early)


@pytest.mark.parametrize("magic", ["wait", "dial"])
def test_a_stranger_is_dropped(magic, spliced, caplog):
    key, own = spliced.junction.open("server.job"), RouteKey.make()
    waiting = spliced.wait(key)
    for forged in (own, RouteKey(key.id, own.secret)):
        sock = spliced.connect()
        sock.sendall(forged.waiting(0) if magic == "wait" else dialling(forged.token("site-1")))
        assert_dropped(sock)
    eventually(lambda: caplog.text.count("refused the connection") == 2, DEADLINE)
    spliced.dial(key)
    told(waiting)


def test_a_token_is_one_site_s(spliced):
    key = spliced.junction.open("server.job")
    token = bytearray(key.token("site-1"))
    token[20] ^= 1
    sock = spliced.connect()
    sock.sendall(dialling(bytes(token)))
    assert_dropped(sock)


def test_what_is_dialled_with_can_be_no_command_of_another_protocol():
    said = dialling(b"\r\nFLUSHALL\r\n".ljust(TOKEN_BYTES, b"\0"))
    assert said.isalnum()


@pytest.mark.parametrize("spell", [str.upper, lambda token: f" {token[1:]}", lambda token: token.replace("0", "\n")])
def test_a_token_that_is_spelt_otherwise_is_refused(spell, spliced, caplog):
    token = spliced.junction.open("server.job").token("site-1").hex()
    spelt = spell(f"{token[:-2]}0a")
    sock = spliced.connect()
    sock.sendall(ROUTE_MAGIC + spelt.encode())
    assert_dropped(sock)
    eventually(lambda: "its token is not in hexadecimal digits" in caplog.text, DEADLINE)


def test_all_pairs_leave_descriptors_for_the_rest_of_the_process(monkeypatch, spliced, caplog):
    monkeypatch.setattr(junction_module, "_most_pairs", lambda: 0)
    key = spliced.junction.open("server.job")
    sock = spliced.connect()
    sock.sendall(dialling(key.token("site-1")))
    assert_dropped(sock)
    eventually(lambda: "has no descriptors left for it" in caplog.text, DEADLINE)


def test_what_somebody_has_overheard_does_not_let_him_wait(spliced, caplog):
    key = spliced.junction.open("server.job")
    for number in (1, 0, 200):  # they may come in another order
        spliced.wait(key, number)
    for number in (1, 100):
        thief = spliced.connect()
        thief.sendall(key.waiting(number))
        assert_dropped(thief)
    eventually(lambda: "what another connection has said before" in caplog.text, DEADLINE)


def test_who_wants_a_link_to_the_parent_is_refused(spliced, caplog):
    from nvflare_rdma.channel.protocol import CONTROL_MAGIC

    sock = spliced.connect()
    sock.sendall(CONTROL_MAGIC)
    assert_dropped(sock)
    eventually(lambda: "only joins others" in caplog.text, DEADLINE)


def test_a_greeting_that_is_drawn_out_ends(monkeypatch, caplog):
    with parents(True) as parent:
        parent.door._greeting_timeout = 0.2
        sock = parent.connect()
        sock.sendall(ROUTE_MAGIC + bytes(DIALLING_BYTES - 1))
        assert_dropped(sock)
        eventually(lambda: "timed out" in caplog.text, DEADLINE)


def test_a_closed_route_leads_nowhere_and_what_is_joined_goes_on(spliced):
    key = spliced.junction.open("server.job")
    waiting, dialled = spliced.pair(key)
    spare = spliced.wait(key, 1)
    spliced.junction.close_routes("job")
    assert_dropped(spare)
    assert_dropped(spliced.dial(key))
    dialled.sendall(b"hello")
    assert waiting.recv(100) == b"hello"


def test_closing_ends_everything(spliced):
    key = spliced.junction.open("server.job")
    waiting, dialled = spliced.pair(key)
    spare = spliced.wait(key, 1)
    spliced.junction.close()
    for sock in (waiting, dialled, spare):
        assert_dropped(sock)
    with pytest.raises(ProtocolError, match="is closed"):
        spliced.junction.open("server.other")


# -- how much one may take -----------------------------------------------------------------------------------


def test_only_so_many_wait_at_a_route_and_the_oldest_goes(spliced):
    key, other = spliced.junction.open("server.job"), spliced.junction.open("site-2.job")
    honest = spliced.wait(other)
    sockets = [spliced.wait(key, number) for number in range(junction_module.MAX_WAITING)]
    more = spliced.connect()
    more.sendall(key.waiting(junction_module.MAX_WAITING))
    assert_dropped(sockets[0])
    eventually(lambda: spliced.waiting(key) == junction_module.MAX_WAITING, DEADLINE)
    spliced.dial(other)
    told(honest)


def test_a_site_has_only_so_many_routes_and_takes_none_of_another(spliced, monkeypatch, caplog):
    monkeypatch.setattr(junction_module, "MAX_ROUTES", 2)
    server, honest = spliced.junction.open("server.job"), spliced.junction.open("site-2.job")
    used = spliced.junction.open("site-1.0")
    spliced.wait(used)
    idle = spliced.junction.open("site-1.1")
    spliced.junction.open("site-1.2")
    eventually(
        lambda: "site-1 has 2 routes through the server's data port; the oldest is closed" in caplog.text, DEADLINE
    )
    routes = spliced.junction._routes
    assert {server.id, honest.id, used.id} < set(routes)
    assert idle.id not in routes
    assert spliced.junction.open("site-1.0").id not in (used.id, idle.id)
    assert len(routes) == 4


def test_a_route_whose_cell_is_gone_is_closed(spliced, monkeypatch):
    lost, kept = spliced.junction.open("server.lost"), spliced.junction.open("server.kept")
    spliced.wait(lost).close()
    spliced.wait(kept)
    monkeypatch.setattr(junction_module, "_ROUTE_SECONDS", 0.0)
    spliced.junction.open("server.new")
    assert lost.id not in spliced.junction._routes
    assert kept.id in spliced.junction._routes


def test_a_site_dials_only_so_often_and_takes_nothing_from_another(spliced, monkeypatch, caplog):
    monkeypatch.setattr(junction_module, "MAX_PAIRS_OF_DIALLER", 2)
    first, second = spliced.junction.open("server.one"), spliced.junction.open("server.two")
    pairs = [spliced.pair(first), spliced.pair(second)]
    waiting = spliced.wait(first, 1)
    assert_dropped(spliced.dial(first))
    eventually(
        lambda: "its site has too many connections through the server's data port already" in caplog.text, DEADLINE
    )
    spliced.dial(first, "site-2")
    told(waiting)
    for sock in pairs[0]:
        sock.close()
    eventually(lambda: sum(spliced.junction._pairs.values()) == 2, DEADLINE)
    spliced.pair(first, 2)


def test_tokens_that_a_site_makes_count_for_that_site(spliced, monkeypatch, caplog):
    """It could name others in them."""
    monkeypatch.setattr(junction_module, "MAX_PAIRS_TO_SITE", 2)
    server, its = spliced.junction.open("server.job"), spliced.junction.open("site-1.job")
    for number in range(2):
        spliced.pair(its, number, f"site-{number + 2}")
    spliced.wait(its, 9)  # there would be somebody to join it with
    assert_dropped(spliced.dial(its, "site-9"))
    eventually(lambda: "its site has too many connections" in caplog.text, DEADLINE)
    spliced.pair(server, 0, "site-2")


def test_a_site_has_a_share_of_what_there_is_whatever_it_says_who_dials(spliced, monkeypatch, caplog):
    monkeypatch.setattr(junction_module, "_most_pairs", lambda: 8)
    server, its = spliced.junction.open("server.job"), spliced.junction.open("site-1.job")
    for number in range(2):
        spliced.pair(its, number, f"site-{number + 2}")
    spliced.wait(its, 9)  # there would be somebody to join it with
    assert_dropped(spliced.dial(its, "site-9"))
    eventually(lambda: "its site has too many connections" in caplog.text, DEADLINE)
    spliced.pair(server, 0, "site-2")


def test_a_site_has_only_so_many_connections_that_wait(spliced, monkeypatch, caplog):
    monkeypatch.setattr(junction_module, "MAX_WAITING_OF_SITE", 2)
    routes = [spliced.junction.open(cell) for cell in ("site-1.a", "site-1.b", "site-2.a", "server.job")]
    for route in routes[:2]:
        spliced.wait(route)
    sock = spliced.connect()
    sock.sendall(routes[0].waiting(9))
    assert_dropped(sock)
    eventually(
        lambda: "its site has 2 connections that wait at the server's data port already" in caplog.text, DEADLINE
    )
    for route in routes[2:]:
        spliced.wait(route)


def test_a_flood_of_strangers_leaves_places_for_others(spliced):
    key = spliced.junction.open("server.job")
    waiting = spliced.wait(key)
    strangers = [spliced.connect() for _ in range(100)]
    for sock in strangers:
        sock.sendall(dialling(RouteKey.make().token("site-1")))
    spliced.dial(key)
    told(waiting)
    for sock in strangers:
        assert_dropped(sock)


# -- the waiting side ----------------------------------------------------------------------------------------


def test_a_listener_gets_what_is_dialled_elsewhere(spliced):
    key = spliced.junction.open("server.job")
    with RemoteListener(spliced.connect, key, ("127.0.0.1", 8102)) as listener:
        assert listener.getsockname() == ("127.0.0.1", 8102)
        dialled = []
        for _ in range(10):
            dialled.append(spliced.dial(key))
            sock, address = listener.accept()
            spliced.sockets.append(sock)
            assert address == dialled[-1].getsockname()
            dialled[-1].sendall(b"hello")
            assert sock.recv(100) == b"hello"


def test_a_listener_that_is_shut_down_wakes_up(spliced):
    key, ended = spliced.junction.open("server.job"), threading.Event()
    listener = RemoteListener(spliced.connect, key, ("127.0.0.1", 8102))

    def accept() -> None:
        with listener, pytest.raises(OSError, match="closed"):
            listener.accept()
        ended.set()

    threading.Thread(target=accept, daemon=True).start()
    eventually(lambda: spliced.waiting(key) == 4, DEADLINE)
    listener.shutdown()
    assert ended.wait(DEADLINE)
    eventually(lambda: not any(map(junction_module._waits, spliced.junction._routes[key.id].waiting)), DEADLINE)


def test_a_listener_ends_when_its_parent_has_forgotten_it(spliced):
    key = spliced.junction.open("server.job")
    spliced.junction.close_routes("job")
    with (
        RemoteListener(spliced.connect, key, ("127.0.0.1", 8102)) as listener,
        pytest.raises(OSError, match="takes no connections for it any more"),
    ):
        listener.accept()
