"""Data channels between two cells, on real sockets: who gets in, who does not, and what is left when they close."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import types

import pytest

from nvflare_rdma.channel.bodies import BufferSource
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, TransferError
from nvflare_rdma.transfer import dialling, tickets
from nvflare_rdma.transfer import peers as channels_module
from nvflare_rdma.transfer.addresses import MAX_ADDRESSES, TICKET_BYTES, Reach, own_hosts, parse_invitation
from tests.support.bodies import TestSink
from tests.support.certificates import Authority
from tests.support.data_channels import ANY_PORT, cells, descriptors
from tests.support.link_process import tls_context
from tests.support.tcp_pair import DEADLINE
from tests.support.unanswered import unanswered
from tests.support.waiting import eventually

SIZE = 300_000
FOR_EVER = 600.0


def join(server, client):
    """The client dials; both ends of the channel."""
    near = client.dial(server.name, server.invite(client.name))
    far = server.await_open(client.name)
    assert far is not None
    assert client.find(server.name) is near
    return near, far


def assert_moves(link, sender, receiver) -> None:
    """A message with a label, from the sender's end ``link`` of a channel."""
    sink = TestSink(SIZE)
    label = receiver.expected.expect(sender.name, [sink])
    data = bytes(range(250)) * (SIZE // 250)
    link.offer(BufferSource(memoryview(data)), label).wait(DEADLINE)
    assert sink.ended.wait(DEADLINE)
    assert (sink.reason, bytes(sink.memory)) == ("", data)
    receiver.expected.forget(sender.name, label, 1)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    """Two, each as what makes TLS contexts."""

    def contexts(folder):
        authority = Authority(folder)
        files = {**authority.issue("server", "server"), **authority.issue("client", "client")}
        return lambda server_side: tls_context(files, server_side)

    return contexts(tmp_path_factory.mktemp("pki")), contexts(tmp_path_factory.mktemp("other-pki"))


# -- who gets in -------------------------------------------------------------------------------------------


def test_data_moves_either_way_and_to_each_peer_its_own(cell):
    server, first, second = cell("server"), cell("site-1", ports=None), cell("site-2", ports=None)
    for client in (first, second):
        near, far = join(server, client)
        assert_moves(near, client, server)
        assert_moves(far, server, client)
    assert server.find("site-1") is not server.find("site-2")
    assert server.find("site-3") is None


def test_a_ticket_works_once(cell, caplog):
    server, client, thief = cell("server"), cell("site-1"), cell("site-2")
    invitation = server.invite("site-1")
    client.dial("server", invitation)
    with pytest.raises(FabricError, match="no direct way from site-2 to server: 127"):
        thief.dial("server", invitation)
    eventually(lambda: "its ticket is unknown, used or expired" in caplog.text, DEADLINE)
    join(server, thief)


@pytest.mark.parametrize("ticket", [bytes(TICKET_BYTES), None], ids=["unknown", "expired"])
def test_another_ticket_does_not_work(ticket, cell, monkeypatch):
    server, client = cell("server"), cell("site-1")
    with monkeypatch.context() as patch:
        if ticket is None:
            patch.setattr(tickets, "TICKET_SECONDS", -1.0)
        invitation = server.invite("site-1")
    with pytest.raises(FabricError, match="no direct way"):
        client.dial("server", {**invitation, "ticket": ticket or invitation["ticket"]})
    assert server.find("site-1") is None
    join(server, client)


def test_more_than_a_ticket_is_refused(cell, caplog):
    server = cell("server")
    invitation = server.invite("site-1")
    with socket.create_connection(("127.0.0.1", invitation["port"]), DEADLINE) as guest:
        guest.sendall(CONTROL_MAGIC + invitation["ticket"] + b"x")
        assert_dropped(guest)
    eventually(lambda: "it sent more than it was asked for" in caplog.text, DEADLINE)


def test_a_peer_has_one_open_invitation_however_often_it_asks(cell):
    server, client = cell("server"), cell("site-1")
    invitation = server.invite("site-1")
    assert all(server.invite("site-1") == invitation for _ in range(5000))
    assert server.invite("site-2")["ticket"] != invitation["ticket"]
    client.dial("server", invitation)
    assert server.invite("site-1")["ticket"] != invitation["ticket"]  # that one is used


def test_an_invitation_that_is_about_to_end_is_not_given_again(cell, monkeypatch):
    server = cell("server")
    with monkeypatch.context() as patch:
        patch.setattr(tickets, "TICKET_SECONDS", 30.0)
        old = server.invite("site-1")
    assert server.invite("site-1")["ticket"] != old["ticket"]


def test_a_site_has_only_so_many_open_invitations_and_takes_none_of_another(cell, caplog):
    server, honest = cell("server"), cell("site-2")
    its = server.invite("site-2")
    first = server.invite("site-1.0")
    for n in range(1, tickets.MAX_INVITATIONS):
        server.invite(f"site-1.{n}")
    assert server.invite("site-1.0") == first
    assert "open invitations" not in caplog.text
    server.invite("site-1.more")
    assert f"site-1 has {tickets.MAX_INVITATIONS} open invitations; the oldest is withdrawn" in caplog.text
    assert server.invite("site-1.0") != first
    honest.dial("server", its)


def test_a_site_has_only_so_many_links(cell, monkeypatch, caplog):
    monkeypatch.setattr(channels_module, "MAX_LINKS", 3)
    server, honest = cell("server"), cell("site-2")
    near, _ = join(server, honest)
    sides = [cell(f"site-1.{n}") for n in range(5)]
    links = [join(server, side)[1] for side in sides]
    eventually(lambda: [link.usable for link in links] == [False, False, True, True, True], DEADLINE)
    assert "site-1 has 3 links, which are the most for one site; the oldest is closed" in caplog.text
    assert_moves(near, honest, server)


def test_who_waits_for_another_to_dial_has_one_deadline_for_both(cell, monkeypatch):
    """Nothing is dialled any more when the wait has taken all of it."""
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    for module in (channels_module, dialling):
        monkeypatch.setattr(module, "time", clock)
    client = cell("site-1", ports=None)
    client._dialling.add("server")

    def waits(_: object, seconds: float) -> None:
        now[0] += seconds
        client._dialling.clear()  # in the last moment

    monkeypatch.setattr(client._opened, "wait_for", waits)
    with pytest.raises(FabricError, match="the others were not tried: 20 s are over"):
        client.dial("server", {**GOOD, "hosts": ["127.0.0.1"]})


def test_who_was_invited_at_the_same_time_gets_the_link_that_the_ticket_has_opened(cell):
    server, client = cell("server"), cell("site-1", ports=None)
    first, second = server.invite("site-1"), server.invite("site-1")
    link = client.dial("server", first)
    assert client.dial("server", second) is link
    link.close(0.0)
    with pytest.raises(FabricError, match="no direct way"):
        client.dial("server", second)


def test_who_dials_a_peer_that_is_being_dialled_gets_that_link(cell):
    server, client = cell("server"), cell("site-1", ports=None)
    invitation, links = server.invite("site-1"), queue.SimpleQueue()
    threads = [threading.Thread(target=lambda: links.put(client.dial("server", invitation))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert len({links.get(timeout=DEADLINE) for _ in threads}) == 1
    for thread in threads:
        thread.join(DEADLINE)
    assert len(client._links["server"]) == 1


GOOD = {"hosts": ["10.0.0.1"], "port": 1, "ticket": bytes(TICKET_BYTES)}


@pytest.mark.parametrize(
    "invitation",
    [
        None,
        [],
        {},
        {**GOOD, "hosts": "10.0.0.1"},
        {**GOOD, "hosts": [1]},
        {**GOOD, "hosts": ["a\0b"]},
        {**GOOD, "hosts": ["fl.example.org"]},
        {**GOOD, "hosts": ["localhost"]},
        {**GOOD, "hosts": ["10.0.0.1"] * (MAX_ADDRESSES + 1)},
        {**GOOD, "port": 0},
        {**GOOD, "port": 65536},
        {**GOOD, "port": "1"},
        {**GOOD, "port": True},
        {**GOOD, "ticket": bytes(TICKET_BYTES - 1)},
        {**GOOD, "ticket": "x" * TICKET_BYTES},
    ],
    ids=str,
)
def test_malformed_invitations(invitation, cell):
    assert parse_invitation(GOOD) == (["10.0.0.1"], 1, bytes(TICKET_BYTES), [])
    with pytest.raises(ProtocolError, match="malformed invitation"):
        cell("site-1").dial("server", invitation)


# -- addresses ---------------------------------------------------------------------------------------------


def test_hosts_are_tried_in_turn(cell):
    server, client = cell("server"), cell("site-1", host="127.0.0.2", ports=None)
    invitation = server.invite("site-1")
    with socket.create_server(("127.0.0.3", invitation["port"])) as wrong:  # leaves at once
        threading.Thread(target=lambda: wrong.accept()[0].close(), daemon=True).start()
        # The first of all is 127.0.0.2, where nobody listens.
        client.dial("server", {**invitation, "hosts": ["127.0.0.3", "127.0.0.1"]})


def test_a_dialling_side_that_finds_nobody_says_where_it_looked(cell):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(FabricError, match=f"127.0.0.1:{port}: .*refused.*; 127.0.0.2:{port}: .*refused"):
        cell("site-1").dial("server", {**GOOD, "hosts": ["127.0.0.2"], "port": port})


def test_a_peer_that_does_not_answer_is_not_dialled_again_for_a_while(cell, monkeypatch):
    monkeypatch.setattr(dialling, "ADDRESS_SECONDS", 0.2)
    site, server = cell("site-1", ports=(0, 0)), cell("server", ports=(0, 0))
    with unanswered() as (host, port):
        invitation = {**GOOD, "hosts": [host], "port": port}
        failures = []

        def dial():
            with pytest.raises(FabricError) as caught:
                site.dial("server", invitation)
            failures.append(str(caught.value))

        threads = [threading.Thread(target=dial) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert len(failures) == 4
        assert all("timed out: nothing answered within 0.2 s" in failure for failure in failures)
        with pytest.raises(FabricUnavailable, match=r"nothing answered.* \(tried \d s ago, and again in \d\d s\)"):
            site.dial("server", invitation)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dialling, "_AVOID_SECONDS", 0.0)
            dial()
        with pytest.raises(FabricUnavailable, match=r"again in 1\d\d s"):
            site.dial("server", invitation)
    server.dial("site-1", site.invite("server"))
    eventually(lambda: site.find("server") is not None)  # so there is a way
    assert site.dial("server", server.invite("site-1")).usable


def test_dialling_has_one_deadline_for_all_addresses(cell, monkeypatch):
    for module in (channels_module, dialling):
        monkeypatch.setattr(module, "DIAL_SECONDS", 0.2)
    hosts = [f"127.0.0.{n}" for n in range(1, 17)]
    with socket.create_server(("0.0.0.0", 0)) as silent, pytest.raises(FabricError) as caught:
        cell("site-1").dial("server", {**GOOD, "hosts": hosts, "port": silent.getsockname()[1]})
    assert "it said nothing in time; the others were not tried: 0.2 s are over" in str(caught.value)


def test_a_server_on_the_loopback_device_of_ipv6(cell):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as sock:
            port = sock.getsockname()[1]
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
    server, client = cell("server", host="::1"), cell("site-1", ports=None, host="::1")
    assert server.invite("x")["hosts"] == ["::1"]
    near, far = join(server, client)
    assert_moves(near, client, server)
    assert_moves(far, server, client)
    with pytest.raises(FabricError, match=rf"no direct way .*: \[::1\]:{port}: .*refused"):
        client.dial("server", {**GOOD, "hosts": [], "port": port})


def test_a_range_of_ports(cell):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FabricUnavailable, match=f"site-1 can't listen .* no port of {port} to {port} .*in use"):
            cell("site-1", ports=(port, port)).invite("server")
        invitation = cell("site-2", ports=(port, min(port + 50, 65535))).invite("server")
        assert port < invitation["port"] <= port + 50
        assert invitation["hosts"] == ["127.0.0.1"]  # FLARE's server is on this host, so is everybody


def test_a_side_with_no_ports_has_no_door(cell):
    with pytest.raises(FabricUnavailable, match="site-1 does not listen for data"):
        cell("site-1", ports=None).invite("server")


def test_own_hosts_are_no_loopback_addresses():
    hosts = own_hosts()
    assert "127.0.0.1" not in hosts  # somebody else's door may be there
    assert len(hosts) == len(set(hosts)) <= MAX_ADDRESSES


@pytest.mark.parametrize(
    ("host", "hosts"),
    [
        ("127.0.0.1", ["127.0.0.1"]),  # its door is there only
        ("10.1.2.3", ["10.9.8.7", "192.168.1.1", "8.8.4.4", "fd00::1"]),
        ("8.8.8.8", ["8.8.4.4"]),
        ("", ["8.8.4.4"]),
        ("no.such.host.invalid", ["8.8.4.4"]),
    ],
)
def test_inner_addresses_are_named_where_the_server_has_one_only(cell, monkeypatch, host, hosts):
    ours = ["10.9.8.7", "192.168.1.1", "8.8.4.4", "fd00::1"]
    monkeypatch.setattr(channels_module, "own_hosts", lambda: ours)
    side = cell("server", host=host)
    assert side.invite("site-1")["hosts"] == hosts
    assert side.invite("server.trainer")["hosts"] == ["127.0.0.1", *ours][: None if host != "127.0.0.1" else 1]


@pytest.mark.parametrize(
    ("server", "named", "kind"),
    [
        ("8.8.8.8", "127.0.0.1", "loopback"),
        ("8.8.8.8", "64:ff9b::a00:1", "private"),
        ("8.8.8.8", "64:ff9b::7f00:1", "loopback"),
        ("8.8.8.8", "2002:a00:1::1", "private"),
        ("8.8.8.8", "::10.0.0.1", "private"),
        ("8.8.8.8", "fec0::1", "private"),
        ("8.8.8.8", "224.0.0.1", "private"),
        ("8.8.8.8", "0.0.0.0", "loopback"),
        ("8.8.8.8", "::ffff:127.0.0.1", "loopback"),
        ("8.8.8.8", "169.254.169.254", "link-local"),
        ("8.8.8.8", "192.168.1.1", "private"),
        ("8.8.8.8", "100.64.0.1", "private"),
        ("8.8.8.8", "fd00::1", "private"),
        ("10.1.2.3", "127.0.0.1", "loopback"),
        ("10.1.2.3", "169.254.169.254", "link-local"),
        ("127.0.0.1", "169.254.169.254", "link-local"),
        ("", "10.1.2.3", "private"),
    ],
)
def test_where_a_peer_points_is_not_dialled_inside_of_this_sides_network(cell, server, named, kind):
    side = cell("site-1", host=server, ports=None)
    with pytest.raises(FabricError, match=f"{named} is not dialled: it is a {kind} address, but the server's is not"):
        side.dial("site-2", {**GOOD, "hosts": [named]})


def test_a_name_that_is_not_known_yet_is_looked_up_again(cell, monkeypatch):
    known: list[Reach] = []

    def reach_of_host(host: str) -> Reach:
        if not known:
            raise OSError("the name server does not answer")
        return known[0]

    monkeypatch.setattr(channels_module, "reach_of_host", reach_of_host)
    monkeypatch.setattr(channels_module, "own_hosts", lambda: ["10.9.8.7"])
    side = cell("server", host="fl.example.org")
    assert side.invite("site-1")["hosts"] == []
    known.append(Reach.SITE)
    assert side.invite("site-1")["hosts"] == ["10.9.8.7"]


def test_a_trainer_dials_its_own_site_wherever_the_server_is(cell):
    site = cell("site-1.job", ports=None, host="8.8.8.8", trainers=True)
    it = cell("site-1.job.trainer", ports=None, host="8.8.8.8")
    it.dial("site-1.job", site.invite(it.name))
    eventually(lambda: site.find(it.name), DEADLINE)


# -- TLS ---------------------------------------------------------------------------------------------------


def test_certificates_of_one_authority_only(cell, authorities, caplog):
    ours, theirs = authorities
    server, client = cell("server", tls=ours), cell("site-1", ports=None, tls=ours)
    for stranger in (cell("site-2", ports=None, tls=theirs), cell("site-3", ports=None)):
        with pytest.raises(FabricError, match="no direct way"):
            stranger.dial("server", server.invite(stranger.name))
    near, far = join(server, client)
    assert_moves(near, client, server)
    assert_moves(far, server, client)
    # The door's threads say so, whom nobody has waited for.
    eventually(lambda: "does not trust this side's certificate" in caplog.text, DEADLINE)
    eventually(lambda: "it does not speak TLS" in caplog.text, DEADLINE)


def test_certificates_that_can_not_be_used_are_no_surprise(cell):
    def unusable(server_side: bool):
        raise TypeError("certfile should be a valid filesystem path")

    site = cell("site-1", tls=unusable)
    with pytest.raises(FabricUnavailable, match="site-1 can't use its certificates: certfile"):
        site.invite("server")
    with pytest.raises(FabricError, match="can't use its certificates"):
        site.dial("server", GOOD)


# -- channels ----------------------------------------------------------------------------------------------


def test_a_message_without_a_label_ends_that_channel_only(cell, caplog):
    server, good, bad = cell("server"), cell("site-1"), cell("site-2")
    near, _ = join(server, good)
    other, _ = join(server, bad)
    other.send(b"hello", DEADLINE)
    eventually(lambda: server.find("site-2") is None and bad.find("server") is None, DEADLINE)
    assert "a message without a label came over a link" in caplog.text
    assert_moves(near, good, server)


def test_a_long_message_without_a_label_is_not_even_received(cell, caplog):
    server, client = cell("server"), cell("site-1")
    near, _ = join(server, client)
    with pytest.raises(TransferError):
        near.send(bytes(SIZE), DEADLINE).wait(DEADLINE)
    eventually(lambda: server.find("site-1") is None, DEADLINE)
    assert "a message without a label is offered over a link that takes none" in caplog.text
    assert server.budget.peak == 0


def test_what_nobody_expects_is_refused_and_the_channel_lives_on(cell):
    server, client = cell("server"), cell("site-1")
    near, _ = join(server, client)
    late = TestSink(SIZE)
    label = server.expected.expect("site-1", [late])
    server.expected.forget("site-1", label, 1)
    others = TestSink(SIZE)
    of_another = server.expected.expect("site-2", [others])
    for unknown in (label, of_another, 7):
        with pytest.raises(TransferError, match="nothing expected"):
            near.offer(BufferSource(memoryview(bytes(SIZE))), unknown).wait(DEADLINE)
    assert not late.ended.is_set()
    assert not others.ended.is_set()
    server.expected.forget("site-2", of_another, 1)
    assert_moves(near, client, server)


def test_a_channel_that_is_replaced_goes_on(cell):
    server, client = cell("server"), cell("site-1")
    old, _ = join(server, client)
    new = client.dial("server", server.invite("site-1"))
    assert client.find("server") is new
    assert_moves(old, client, server)
    assert_moves(new, client, server)
    new.close(0.0)
    assert client.find("server") is old
    eventually(lambda: len(server._links["site-1"]) == 1, DEADLINE)
    assert_moves(old, client, server)


def test_a_side_waits_for_who_has_dialled(cell, monkeypatch):
    server, client, found = cell("server"), cell("site-1", ports=None), queue.SimpleQueue()
    invitation, opened, open_link = server.invite("site-1"), threading.Event(), Link.open

    def slow(link: Link) -> None:
        open_link(link)
        if "server -" in link.name:
            assert opened.wait(DEADLINE)

    monkeypatch.setattr(Link, "open", slow)
    assert server.await_open("site-1") is None  # at once: it has not dialled
    client.dial("server", invitation)
    assert server.find("site-1") is None
    waiting = threading.Thread(target=lambda: found.put(server.await_open("site-1")), daemon=True)
    waiting.start()
    opened.set()
    assert found.get(timeout=DEADLINE) is server.find("site-1") is not None
    waiting.join(DEADLINE)


def test_a_door_that_was_shut_is_opened_anew_for_the_next_invitation(cell, caplog):
    for ports in (ANY_PORT, None):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        server, client = cell("server", ports=ports or (port, port)), cell("site-1", ports=None)
        near, far = join(server, client)
        door = server._door
        door._listener.shutdown(socket.SHUT_RDWR)
        eventually(lambda door=door: door.is_over, DEADLINE)
        assert client.dial("server", server.invite("site-1")) is not near
        assert_moves(far, server, client)  # what came by the old one goes on
        server.close()
        client.close()
    assert caplog.text.count("server's data port listens no more") == 2


# -- the end -----------------------------------------------------------------------------------------------


def assert_dropped(guest: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert guest.recv(1) == b""


def test_a_guest_that_says_nothing_is_dropped(cell, monkeypatch, caplog):
    server, client = cell("server"), cell("site-1")
    monkeypatch.setattr(channels_module, "GREETING_TIMEOUT", 0.1)
    port = server.invite("site-1")["port"]
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as guest:
        guest.sendall(CONTROL_MAGIC)
        assert_dropped(guest)
    eventually(lambda: "it said nothing in time" in caplog.text, DEADLINE)
    join(server, client)


def test_closing_frees_everything_at_once_and_for_good(cell, authorities, monkeypatch):
    monkeypatch.setattr(channels_module, "GREETING_TIMEOUT", FOR_EVER)
    with cells() as warm_up:  # what is made once and kept
        join(warm_up("server-0"), warm_up("site-0"))
    before, threads = descriptors(), set(threading.enumerate())
    for tls in (None, authorities[0]):
        kinds = {} if tls is None else {"tls": tls}
        server, client, third = cell("server", **kinds), cell("site-1", **kinds), cell("site-2", **kinds)
        near, _ = join(server, client)
        client.dial("server", server.invite("site-1"))  # and a channel that was replaced
        invitation = server.invite("site-2")
        in_greeting = socket.create_connection(("127.0.0.1", invitation["port"]), DEADLINE)
        in_greeting.sendall(CONTROL_MAGIC if tls is None else b"\x16")
        stuck = near.offer(BufferSource(memoryview(bytes(SIZE))), client.expected.expect("x", []))
        for side in (server, client, server, client):
            side.close()
        with pytest.raises(TransferError):
            stuck.wait(DEADLINE)
        assert_dropped(in_greeting)
        in_greeting.close()
        with pytest.raises(FabricUnavailable, match="server is ending"):
            server.invite("site-2")
        with pytest.raises(FabricError, match="refused"):
            third.dial("server", invitation)
        with pytest.raises(FabricError, match=r"shuts down|refused"):
            client.dial("site-2", third.invite("site-1"))
        third.close()
        with socket.create_server(("127.0.0.1", invitation["port"])):
            pass  # the port is free
        eventually(lambda: set(threading.enumerate()) <= threads, DEADLINE)
        eventually(lambda: descriptors() == before, DEADLINE)


def test_closing_ends_a_dialling_that_waits(cell, monkeypatch):
    for module in (channels_module, dialling):
        monkeypatch.setattr(module, "ADDRESS_SECONDS", FOR_EVER)
    for module in (channels_module, dialling):
        monkeypatch.setattr(module, "DIAL_SECONDS", FOR_EVER)
    client, errors = cell("site-1"), queue.Queue()

    def try_to_dial() -> None:
        try:
            client.dial("server", {**GOOD, "hosts": ["127.0.0.1"], "port": silent.getsockname()[1]})
        except FabricError as error:
            errors.put(error)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=try_to_dial, daemon=True).start()
        sock, _ = silent.accept()
        with sock:
            while len(sock.recv(100, socket.MSG_PEEK)) < len(CONTROL_MAGIC) + TICKET_BYTES:
                pass
            client.close()
            assert "closed the connection" in str(errors.get(timeout=DEADLINE))
