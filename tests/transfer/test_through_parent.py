"""Links between processes that can't reach each other straight, through a parent's port."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from nvflare_rdma.channel import Door
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, UnreachableError
from nvflare_rdma.fabric import TcpFabric, listen_tcp
from nvflare_rdma.transfer import dialling
from nvflare_rdma.transfer.addresses import TICKET_BYTES, own_hosts, parse_invitation
from nvflare_rdma.transfer.junction import Junction
from nvflare_rdma.transfer.meetings import Place
from nvflare_rdma.transfer.routes import TOKEN_BYTES
from tests.support.certificates import Authority
from tests.support.link_process import tls_context
from tests.support.tcp_pair import DEADLINE
from tests.support.unanswered import unanswered
from tests.support.waiting import eventually
from tests.transfer.test_peers import assert_moves, join

NO_PORT = None


@pytest.fixture(autouse=True)
def log_lines(caplog) -> None:
    caplog.set_level(logging.INFO, "nvflare_rdma")


class Parents:
    """Parents of sites that join connections, and what their job processes ask them by."""

    def __init__(self, *sites: str) -> None:
        self.asked: list[str] = []
        self.junctions = {site: Junction(site, f"the data port of {site}") for site in sites}
        self.doors = {site: self._door(junction) for site, junction in self.junctions.items()}

    @staticmethod
    def _door(junction: Junction) -> Door:
        door = Door(listen_tcp("127.0.0.1", 0), None, TcpFabric(1), junction.refuse, "a parent's data port")
        door.takers = dict(junction.takers)
        threading.Thread(target=door.serve, name="rdma-parent", daemon=True).start()
        return door

    def port(self, site: str = "server") -> int:
        return self.doors[site].address[1]

    def meet(self, cell: str):
        """How that cell asks."""

        def ask(parent: str) -> Place:
            self.asked.append(parent)
            if parent not in self.junctions:
                raise FabricUnavailable(f"{parent} joins no connections")
            key, address = self.junctions[parent].open(cell), self.doors[parent].address
            return Place(key, address, ["127.0.0.1"], address[1])

        return ask

    def close(self) -> None:
        for site, junction in self.junctions.items():
            junction.close()
            self.doors[site].close()


@contextlib.contextmanager
def _parents(*sites: str) -> Iterator[Parents]:
    made = Parents(*sites)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def parent() -> Iterator[Parents]:
    """The server's."""
    with _parents("server") as made:
        yield made


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("pki"))
    files = {**authority.issue("server", "server"), **authority.issue("client", "client")}
    return lambda server_side: tls_context(files, server_side)


def behind(cell, parent, name="server.job", **others):
    """A job process that nobody reaches but through its parent."""
    return cell(name, ports=NO_PORT, meet=parent.meet(name), port=parent.port(), **others)


def seconds_without(what: str, caplog) -> float:
    """How long that was waited for, as the log has it; the machine may have been busy meanwhile."""
    (seconds,) = re.findall(rf"{what} in (\d+\.\d) s", caplog.text)
    return float(seconds)


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "TLS"])
def test_a_link_and_its_rails_go_through_the_parent(secure, cell, parent, certificates, caplog):
    tls = {"tls": certificates} if secure else {}
    server, site = behind(cell, parent, **tls), cell("site-1.job", ports=NO_PORT, **tls)
    near, far = join(server, site)
    assert near.fabric == "tcp"
    eventually(lambda: parent.junctions["server"].pairs == 3, DEADLINE)  # the control stream and two rails
    assert_moves(near, site, server)
    assert_moves(far, server, site)
    said = "TLS" if secure else "no TLS"
    assert near.way == f"tcp, {said}, through the server"
    assert far.way == f"tcp, {said}, through server.job's way through server"
    port = parent.port()
    assert f"site-1.job reaches server.job through the server at 127.0.0.1:{port}: it names no other way" in caplog.text


def test_many_sites_and_jobs_go_through_one_port(cell, parent):
    servers = [behind(cell, parent, f"server.{job}") for job in range(3)]
    sites = [cell(f"site-{n}.job", ports=NO_PORT) for n in range(3)]
    for server in servers:
        for site in sites:
            near, far = join(server, site)
            assert_moves(near, site, server)
            assert_moves(far, server, site)
    assert parent.asked == ["server"] * 3


def test_who_can_be_reached_straight_is(cell, parent, caplog):
    server, site = cell("server.job", meet=parent.meet("server.job")), cell("site-1.job", ports=NO_PORT)
    near, _ = join(server, site)
    assert "through" not in near.way
    assert parent.junctions["server"].pairs == 0
    assert "reaches" not in caplog.text


def test_a_port_that_answers_nothing_costs_a_moment_once(cell, parent, monkeypatch, caplog):
    monkeypatch.setattr(dialling, "ADDRESS_SECONDS", 600.0)
    server, site = behind(cell, parent), cell("site-1.job", ports=NO_PORT)
    with unanswered() as (host, port):
        site._dialler._server = (host, parent.port())
        monkeypatch.setattr(dialling, "DIAL_SECONDS", DEADLINE)

        def dial():
            invitation = {**server.invite("site-1.job"), "hosts": [], "port": port}
            # The server's host is the one that does not answer; its parent's port is forwarded elsewhere.
            with monkeypatch.context() as patch:
                patch.setattr(site._dialler, "_ways_through", ways_through)
                return site.dial("server.job", invitation)

        def ways_through(way, whose, failures):
            yield dialling.Attempt("127.0.0.1", "127.0.0.1", parent.port(), dialling.dialling(way.token), whose)

        dial()
        assert seconds_without("straight, nothing answered", caplog) < DEADLINE
        caplog.clear()
        dial()
        assert seconds_without("straight, nothing answered", caplog) < DEADLINE
        assert "s ago, and again in" in caplog.text


def test_who_answers_and_is_at_work_is_waited_for(cell, parent, certificates, monkeypatch):
    """The kernel takes a connection at once, whatever the process behind it does."""
    monkeypatch.setattr(dialling, "_HEAD_START_SECONDS", 2.0)  # in which this machine surely connects
    monkeypatch.setattr(dialling, "_GREETING_SECONDS", DEADLINE)
    head_start_is_over, greets_late = threading.Event(), []
    look = dialling._Race.greeting

    def looked(race):
        """It is asked for at the end of a head start that brought nothing."""
        head_start_is_over.set()
        return look(race)

    monkeypatch.setattr(dialling._Race, "greeting", looked)

    def late(server_side):
        if server_side and greets_late:
            greets_late.clear()
            head_start_is_over.wait(DEADLINE)
        return certificates(server_side)

    server = cell("server.job", meet=parent.meet("server.job"), port=parent.port(), tls=late)
    site = cell("site-1.job", ports=NO_PORT, tls=certificates)
    invitation = server.invite("site-1.job")
    assert invitation["port"]
    assert invitation["through"]
    greets_late.append(True)
    site.dial("server.job", invitation)
    assert not greets_late
    assert head_start_is_over.is_set()
    assert parent.junctions["server"].pairs == 0


def test_who_answers_and_never_greets_is_waited_for_a_moment(cell, parent, certificates, monkeypatch, caplog):
    monkeypatch.setattr(dialling, "_HEAD_START_SECONDS", 2.0)
    monkeypatch.setattr(dialling, "_GREETING_SECONDS", 0.1)
    monkeypatch.setattr(dialling, "ADDRESS_SECONDS", 600.0)
    monkeypatch.setattr(dialling, "DIAL_SECONDS", DEADLINE)
    server, site = behind(cell, parent, tls=certificates), cell("site-1.job", ports=NO_PORT, tls=certificates)
    site._dialler._server = ("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        invitation = {**server.invite("site-1.job"), "port": mute.getsockname()[1]}
        assert site.dial("server.job", invitation).usable
        assert 2.0 <= seconds_without("straight, its host answered, and its process did not", caplog) < DEADLINE


def test_who_answered_and_was_given_up_is_said_to_have_answered(cell, parent, certificates, monkeypatch, caplog):
    """All of its time is over before the other way leads there."""
    given_up, dial, add = threading.Event(), dialling.dial, dialling.Failures.add

    def added(failures, attempt, error):
        add(failures, attempt, error)
        given_up.set()

    def late(server_side):
        if server_side:
            given_up.wait(DEADLINE)
        return certificates(server_side)

    monkeypatch.setattr(dialling.Failures, "add", added)
    server = cell("server.job", meet=parent.meet("server.job"), port=parent.port(), tls=late)
    site = cell("site-1.job", ports=NO_PORT, tls=certificates)
    site._dialler._server = ("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]

        def soon_over(address, tls, pending, timeout, *more):
            return dial(address, tls, pending, 0.1 if address[1] == port else DEADLINE, *more)

        monkeypatch.setattr(dialling, "dial", soon_over)
        monkeypatch.setattr(dialling, "_HEAD_START_SECONDS", 0.01)
        monkeypatch.setattr(dialling, "_GREETING_SECONDS", 0.01)
        given_up.clear()
        assert site.dial("server.job", {**server.invite("site-1.job"), "port": port}).usable
    assert given_up.is_set()
    assert "straight, its host answered, and its process did not in " in caplog.text
    assert "nothing answered" not in caplog.text


def test_a_host_has_answered_if_one_of_its_addresses_has():
    failures = dialling.Failures()
    for host, error in (("a", UnreachableError("nothing")), ("b", TimeoutError("late")), ("c", UnreachableError("no"))):
        failures.add(dialling.Attempt(host, "192.0.2.1", 1), error)
    assert failures.silent_ways == {"straight": True}


def test_who_answers_and_refuses_gets_no_more_time(monkeypatch):
    """The next address of that kind says nothing."""
    monkeypatch.setattr(dialling, "_HEAD_START_SECONDS", 0.1)
    monkeypatch.setattr(dialling, "_GREETING_SECONDS", 600.0)
    over = threading.Event()

    def each(ways, greets):
        for way in ways:
            if way == "through":
                yield "opened"
            greets(True)
            greets(False)  # it was somebody else
            over.wait(DEADLINE)

    race = dialling._Race(each, {"straight": iter(["address"]), "through the server": iter(["through"])})
    with contextlib.closing(race.run()) as found:
        assert next(found) == ("through the server", "opened")
        assert race.going() == {"straight"}
        assert race.greeting() == set()
    over.set()


def test_a_port_where_nobody_listens_costs_nothing(cell, parent, caplog):
    server, site = behind(cell, parent), cell("site-1.job", ports=NO_PORT)
    site._dialler._server = ("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    near = site.dial("server.job", {**server.invite("site-1.job"), "port": port})
    assert near.usable
    assert f"through the server at 127.0.0.1:{parent.port()}: 127.0.0.1:{port}: [Errno 111]" in caplog.text


def test_somebody_else_at_the_straight_address_is_no_harm(cell, parent, certificates, tmp_path, caplog):
    files = Authority(tmp_path).issue("server", "server")
    stranger = cell("site-9", tls=lambda server_side: tls_context(files, server_side))
    its = stranger.invite("site-1.job")
    server, site = behind(cell, parent, tls=certificates), cell("site-1.job", ports=NO_PORT, tls=certificates)
    assert site.dial("server.job", {**server.invite("site-1.job"), "port": its["port"]}).usable
    assert "site-1.job reached server.job elsewhere; 127.0.0.1" in caplog.text


def test_the_parent_can_t_stand_in_for_who_waits(cell, parent, certificates, tmp_path):
    """Whoever has its port, and all that was told it."""
    files = Authority(tmp_path).issue("server", "server")
    server, site = behind(cell, parent, tls=certificates), cell("site-1.job", ports=NO_PORT, tls=certificates)
    thief = behind(cell, parent, "server.thief", tls=lambda server_side: tls_context(files, server_side))
    its, wanted = thief.invite("site-1.job"), server.invite("site-1.job")
    with pytest.raises(FabricError, match="not trusted here"):
        site.dial("server.job", {**wanted, "through": its["through"]})


def test_a_ticket_for_the_one_port_is_one_use_and_one_site_s(cell, parent):
    server, site, thief = behind(cell, parent), cell("site-1.job", ports=NO_PORT), cell("site-2.job", ports=NO_PORT)
    invitation = server.invite("site-1.job")
    site.dial("server.job", invitation)
    with pytest.raises(FabricError, match=r"no direct way from site-2.job to server.job: through the server at"):
        thief.dial("server.job", invitation)


def test_a_parent_that_begins_anew_is_asked_again(cell, parent, monkeypatch):
    server, site = behind(cell, parent), cell("site-1.job", ports=NO_PORT)
    join(server, site)
    parent.junctions["server"].close_routes("job")
    eventually(lambda: server._meetings._places["server"][1].is_over, DEADLINE)
    join(server, site)
    assert parent.asked == ["server"] * 2


def test_a_parent_that_joins_nothing_is_not_asked_each_time(cell):
    with _parents() as none:
        server = cell("server.job", ports=NO_PORT, meet=none.meet("server.job"))
        for _ in range(3):
            with pytest.raises(FabricUnavailable, match="as rdma_data_ports says there; server joins no"):
                server.invite("site-1.job")
        assert none.asked == ["server"]


def test_the_one_port_is_the_parent_s(cell, parent, caplog):
    port = parent.port()
    server = cell("server.job", ports=(port, port), meet=parent.meet("server.job"), host="8.8.8.8")
    invitation = server.invite("site-1.job")
    assert (invitation["port"], invitation["hosts"], len(invitation["through"])) == (0, [], 1)
    assert f"server.job has no data port: port {port} is its parent's, and peers come through it" in caplog.text
    assert not server.has_door_for("site-1.job")
    assert cell("site-1.job", ports=NO_PORT).dial("server.job", invitation).usable


def test_a_trainer_still_finds_a_door_of_its_own(cell, parent):
    port = parent.port()
    server = cell("server.job", ports=(port, port), meet=parent.meet("server.job"))
    invitation = server.invite("server.job.trainer")
    assert invitation["port"] not in (0, port)
    assert "through" not in invitation


# -- two sites -----------------------------------------------------------------------------------------------


def test_two_sites_without_ports_meet_at_the_server(cell, parent):
    first = behind(cell, parent, "site-1.job", host="8.8.8.8")
    second = cell("site-2.job", ports=NO_PORT)
    near, far = join(first, second)
    assert parent.asked == ["site-1", "server"]
    assert_moves(near, second, first)
    assert_moves(far, first, second)


def test_a_site_s_parent_is_used_before_the_server_s(cell):
    with _parents("server", "site-1") as parents:
        first = behind(cell, parents, "site-1.job", host="8.8.8.8")
        first._dialler._server = ("127.0.0.1", parents.port())
        second = cell("site-2.job", ports=NO_PORT)
        invitation = first.invite("site-2.job")
        assert [(way["at_server"], way["hosts"]) for way in invitation["through"]] == [(False, []), (True, [])]
        invitation["through"][0]["hosts"] = ["127.0.0.1"]  # which nobody is told if the server is far away
        assert second.dial("site-1.job", invitation).way.endswith("through the parent of site-1")


def test_a_site_s_parent_that_answers_nothing_costs_a_moment(cell, monkeypatch, caplog):
    monkeypatch.setattr(dialling, "ADDRESS_SECONDS", DEADLINE)
    with _parents("server") as parents, unanswered() as (host, port):
        first = behind(cell, parents, "site-1.job", host="8.8.8.8")
        second = cell("site-2.job", ports=NO_PORT, port=parents.port())
        invitation = first.invite("site-2.job")
        (at_server,) = invitation["through"]
        theirs = {**at_server, "at_server": False, "hosts": [host], "port": port}
        link = second.dial("site-1.job", {**invitation, "through": [theirs, {**at_server, "port": 0}]})
        assert link.way.endswith("through the server")
        assert "through the parent of site-1, nothing answered in" in caplog.text


def test_a_site_that_has_a_port_is_dialled_rather_than_met_at_the_server(cell, parent):
    first, second = behind(cell, parent, "site-1.job", host="8.8.8.8"), cell("site-2.job")
    theirs = first.invite("site-2.job")
    assert theirs["port"] == 0
    own = second.dial_or_invite("site-1.job", theirs)
    assert own is not None
    assert own["port"] == second._door.address[1]
    assert cell("site-3.job", ports=NO_PORT).dial_or_invite("site-1.job", first.invite("site-3.job")) is None


def test_two_sites_on_the_server_s_host_need_no_parent(cell):
    first, second = (cell(f"site-{n}.job", ports=NO_PORT, trainers=True) for n in (1, 2))
    near, _ = join(first, second)
    assert_moves(near, second, first)
    assert first._door.address[0] == "127.0.0.1"
    with pytest.raises(FabricUnavailable, match="does not listen for data"):
        first.invite("server.job")


def test_two_sites_elsewhere_do(cell):
    site = cell("site-1.job", ports=NO_PORT, trainers=True, host="8.8.8.8")
    with pytest.raises(FabricUnavailable, match="does not listen for data"):
        site.invite("site-2.job")


def test_no_address_but_the_server_s_own_is_dialled_for_a_server_s_parent(cell, parent):
    """Whatever the invitation says."""
    server, site = behind(cell, parent), cell("site-1.job", ports=NO_PORT, host="", port=parent.port())
    invitation = server.invite("site-1.job")
    invitation["through"][0]["hosts"] = ["127.0.0.1"]
    with pytest.raises(FabricError, match="through the server: it is unknown here where that is"):
        site.dial("server.job", invitation)


@pytest.mark.parametrize("inner", ["127.0.0.1", "169.254.1.1", "192.168.3.4"])
def test_no_inner_address_of_a_site_s_parent_is_dialled(inner, cell):
    site = cell("site-1.job", ports=NO_PORT, host="8.8.8.8")
    way = {"at_server": False, "hosts": [inner], "port": 1, "token": bytes(TOKEN_BYTES)}
    with pytest.raises(FabricError, match=f"{inner} is not dialled"):
        site.dial("site-2.job", {"hosts": [], "port": 0, "ticket": bytes(TICKET_BYTES), "through": [way]})


# -- invitations ---------------------------------------------------------------------------------------------

WAY = {"at_server": True, "hosts": [], "port": 0, "token": bytes(TOKEN_BYTES)}
GOOD = {"hosts": ["10.0.0.1"], "port": 1, "ticket": bytes(TICKET_BYTES)}


def test_invitations_with_ways_through_parents():
    assert parse_invitation({**GOOD, "port": 0, "through": [WAY]}).through == [(True, [], 0, bytes(TOKEN_BYTES))]
    assert parse_invitation(GOOD).through == []
    assert parse_invitation({**GOOD, "later": 1}).pack() == GOOD


@pytest.mark.parametrize(
    "through",
    [
        None,
        "x",
        {},
        [WAY] * 3,
        [None],
        [{**WAY, "at_server": 1}],
        [{**WAY, "hosts": ["fl.example.org"]}],
        [{**WAY, "hosts": own_hosts}],
        [{**WAY, "port": -1}],
        [{**WAY, "port": 65536}],
        [{**WAY, "port": "1"}],
        [{**WAY, "at_server": False}],
        [{**WAY, "token": bytes(TOKEN_BYTES - 1)}],
        [{key: value for key, value in WAY.items() if key != "token"}],
    ],
)
def test_malformed_ways_through_parents(through):
    with pytest.raises(ProtocolError, match="malformed invitation"):
        parse_invitation({**GOOD, "through": through})
