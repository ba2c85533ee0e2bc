"""How iWARP rails are connected: who is let in, who is not, and what that does to the others."""

from __future__ import annotations

import queue
import re
import socket
import struct
import subprocess
import threading

import pytest

pytest.importorskip("pyverbs.device", reason="pyverbs is not installed for this Python")

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.verbs import endpoint, iwarp_connect, iwarp_listen
from nvflare_rdma.fabric.verbs.description import TICKET_BYTES
from nvflare_rdma.fabric.verbs.devices import list_ports
from nvflare_rdma.fabric.verbs.rail import VerbsRail
from nvflare_rdma.logs import Seldom
from tests.support.crowded_ports import crowded_ports
from tests.support.recorder import Recorder
from tests.support.verbs_pair import DEADLINE, VerbsPair, buffer, fabric, held, numbered, verbs_pair
from tests.support.waiting import eventually

REFUSED = "refused the rail's ticket"


class Offered:
    """A passive side that waits for its peer."""

    def __init__(self, devices, active="", rails=1):
        self.heard, self.said = Recorder(), Recorder()
        self.device = active or devices[1]
        self.rails = rails
        self.passive, self.offer = fabric(devices[0], rails).offer(self.heard)
        self.active = None

    @property
    def address(self):
        port = self.offer["ports"][0]
        return ".".join(map(str, port["gid"][12:])), port["service"]

    @property
    def near(self):
        """The active side's."""
        return next(str(port.gids[0].address) for port in list_ports() if port.device == self.device)

    def dial(self, offer=None):
        return fabric(self.device, self.rails).connect(offer or self.offer, self.said)

    def check(self):
        """The peer that the offer is for gets in, and writes."""
        self.active = self.dial()
        self.passive.accept(self.active.answer)
        target = buffer(4096)
        self.active.write(0, numbered(4096), self.passive.register(target).expose(7, 0, 4096, 0), 7, 0)
        assert self.heard.landings.get(timeout=DEADLINE) == (7, 4096, 0)
        assert target == numbered(4096)


@pytest.fixture
def offered(iwarp_devices, monkeypatch):
    """Makes an `Offered`; when the test is over, nothing of it is left in the kernel."""
    monkeypatch.setattr(iwarp_listen, "_strangers", Seldom(600.0))
    with verbs_pair(iwarp_devices, rails=1):
        pass  # what is made once in a process
    before = held()
    made = []

    def make(devices=iwarp_devices, **options):
        made.append(Offered(devices, **options))
        return made[-1]

    yield make
    for each in made:
        if each.active is not None:
            each.active.close()
        each.passive.close()
    eventually(lambda: held() == before, DEADLINE)


def with_tickets(offer, *tickets):
    rails = [{**rail, "ticket": ticket} for rail, ticket in zip(offer["rails"], tickets, strict=True)]
    return {**offer, "rails": rails}


# -- tickets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ticket", [bytes(TICKET_BYTES), b"\xff" * TICKET_BYTES], ids=["zeros", "ones"])
def test_an_unknown_ticket_is_refused_and_the_right_one_is_taken_afterwards(offered, ticket, caplog):
    passive = offered()
    for _ in range(2):
        with pytest.raises(FabricError, match=REFUSED):
            passive.dial(with_tickets(passive.offer, ticket))
    passive.check()
    assert caplog.text.count("its ticket is none that waits here") == 1  # strangers do not fill the log


def test_a_ticket_is_good_for_one_rail(offered, caplog):
    passive = offered(rails=2)
    ticket = passive.offer["rails"][0]["ticket"]
    passive.active = passive.dial(with_tickets(passive.offer, ticket, ticket))
    assert passive.active.rails == 1
    assert "its ticket is none that waits here" in caplog.text  # the device would refuse the second one too, here
    passive.passive.accept(passive.active.answer)
    assert passive.passive.rails == 1
    passive.active.write(0, numbered(64), passive.passive.register(buffer(64)).expose(7, 0, 64, 0), 7, 0)
    assert passive.heard.landings.get(timeout=DEADLINE) == (7, 64, 0)


def test_a_ticket_is_good_for_one_device(offered, iwarp_devices):
    """The number of a queue pair means another one on another device."""
    first, second = iwarp_devices
    if first == second:
        pytest.skip("takes two iWARP devices")
    passive = offered((f"{first},{second}", ""), active=f"{second},{first}", rails=2)
    tickets = [rail["ticket"] for rail in passive.offer["rails"]]
    with pytest.raises(FabricError, match=REFUSED):
        passive.dial(with_tickets(passive.offer, *reversed(tickets)))
    passive.check()
    assert passive.active.rails == 2


def test_after_their_time_tickets_are_void(offered, monkeypatch):
    monkeypatch.setattr(iwarp_listen, "TICKET_LIFETIME", 0.3)
    passive = offered()
    eventually(lambda: not passive.passive._listener._thread.is_alive(), DEADLINE)
    with pytest.raises(FabricError, match=r"\d port \d+ does not answer: .*refused"):
        passive.dial()


def test_who_says_that_it_has_come_but_has_not_gets_no_rail(offered):
    passive = offered()
    with pytest.raises(FabricError, match="it has not come"):
        passive.passive.accept(passive.offer)


def test_who_says_that_it_came_with_a_ticket_of_others_is_a_violation(offered):
    passive = offered(rails=2)
    tickets = [rail["ticket"] for rail in passive.offer["rails"]]
    with pytest.raises(ProtocolError, match="a ticket, which it was not given"):
        passive.passive.accept(with_tickets(passive.offer, *reversed(tickets)))


# -- strangers ---------------------------------------------------------------------------------------------

MPA = struct.Struct("!16sBBH")  # key, flags, revision, bytes of private data (RFC 5044, 7.1.1)
REQUEST, REJECTED = b"MPA ID Req Frame", 0x20
STRANGERS = {
    "nothing": b"",
    "noise": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "half of a request": MPA.pack(REQUEST, 0, 1, 64)[:10],
    "no private data": MPA.pack(REQUEST, 0, 1, 0),
    "little private data": MPA.pack(REQUEST, 0, 1, 1) + b"x",
    "much private data": MPA.pack(REQUEST, 0, 1, 256) + bytes(256),
    "more than there is": MPA.pack(REQUEST, 0, 1, 65535) + bytes(64),
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_gets_nowhere_and_stops_nobody(offered, said):
    passive = offered()
    with socket.create_connection(passive.address, DEADLINE, (passive.near, 0)) as stranger:
        stranger.sendall(said)
        if said.startswith(REQUEST) and len(said) == MPA.size + MPA.unpack_from(said)[3] <= 256 + MPA.size:
            reply = stranger.recv(MPA.size)
            assert not reply or MPA.unpack(reply)[1] & REJECTED
        passive.check()


# -- connecting --------------------------------------------------------------------------------------------


def test_the_passive_side_holds_its_writes_until_the_active_side_has_spoken(iwarp_devices, monkeypatch):
    """The initiator of an MPA connection has to be the first to send (RFC 5044, 7.1)."""
    start = VerbsRail.start

    def without_greeting(self, connect, max_message, greet, wait=False):
        start(self, connect, max_message, False, wait)

    monkeypatch.setattr(VerbsRail, "start", without_greeting)
    with verbs_pair(iwarp_devices, rails=1) as pair:
        target = buffer(64)
        remote = pair.active.register(target).expose(7, 0, 64, 0)
        writer = threading.Thread(target=pair.passive.write, args=(0, numbered(64), remote, 7, 0), daemon=True)
        writer.start()
        with pytest.raises(queue.Empty):
            pair.said.landings.get(timeout=1.0)
        assert writer.is_alive()
        pair.active._rails[0]._greet()
        assert pair.said.landings.get(timeout=DEADLINE) == (7, 64, 0)
        writer.join(DEADLINE)


def test_an_address_that_does_not_answer_stops_no_other_thread(offered, network, monkeypatch):
    """What a firewall looks like that lets the control stream through, and nothing else."""
    seconds = 3.0
    monkeypatch.setattr(endpoint, "CONNECT_TIMEOUT", seconds)
    passive = offered()
    turns, over = [], threading.Event()

    def watch():
        while not over.wait(seconds / 150):
            turns.append(True)

    watcher = threading.Thread(target=watch, daemon=True)
    subprocess.run(
        ["tc", "qdisc", "replace", "dev", "vd", "root", "netem", "loss", "100%"], check=True, timeout=DEADLINE
    )
    try:
        watcher.start()
        with pytest.raises(FabricError, match=r"\d port \d+ does not answer: timed out"):
            passive.dial()
        taken = len(turns)
    finally:
        over.set()
        subprocess.run(["sh", network, "up"], check=True, timeout=DEADLINE)
    watcher.join(DEADLINE)
    assert taken > 10  # of 150: a thread that waited with the GIL would leave it one or two
    passive.check()


def test_a_source_port_that_is_in_use_is_passed_over(offered, network, monkeypatch):
    """siw has to bind it for TCP, of which rdma_cm, that chooses it, knows nothing."""
    passive, make, made = offered(), iwarp_connect.make_identifier, []
    with crowded_ports(passive.near) as others:

        def make_identifier(*arguments):
            if made:
                others.close()
            made.append(make(*arguments))
            return made[-1]

        monkeypatch.setattr(iwarp_connect, "make_identifier", make_identifier)
        passive.check()
    assert len(made) > 1
    assert held()[f"{passive.device}: cm_id"] == 1


def test_source_ports_that_are_all_in_use_are_an_error(offered, network):
    passive = offered()
    with crowded_ports(passive.near), pytest.raises(FabricError, match="Address already in use"):
        passive.dial()
    passive.check()


def test_an_offer_without_a_listener_is_a_violation(offered):
    passive = offered()
    offer = {**passive.offer, "ports": [{**passive.offer["ports"][0], "service": 0}]}
    with pytest.raises(ProtocolError, match="not where it listens"):
        passive.dial(offer)


def test_rails_over_several_devices(iwarp_devices):
    first, second = iwarp_devices
    pair = VerbsPair((f"{first},{second}", f"{second},{first}"), rails=4)
    try:
        assert (pair.active.rails, pair.passive.rails) == (4, 4)
        assert re.findall(r"verbs rail \d \((\w+),", " ".join(map(str, pair.passive._rails))) == [first, second] * 2
        region = pair.passive.register(buffer(4 * 64))
        for rail in range(4):
            pair.active.write(rail, numbered(64), region.expose(rail, rail * 64, 64, rail), rail, 0)
        assert {pair.heard.landings.get(timeout=DEADLINE) for _ in range(4)} == {(n, 64, 0) for n in range(4)}
    finally:
        pair.close()


@pytest.mark.parametrize("leaver", ["passive", "active"])
def test_the_end_of_an_idle_rail_is_noticed(iwarp_devices, leaver):
    """By a receive that is flushed, although nothing is granted."""
    with verbs_pair(iwarp_devices) as pair:
        eventually(lambda: not any(rail._silent for rail in pair.passive._rails), DEADLINE)
        getattr(pair, leaver).drop(1)
        other = pair.said if leaver == "passive" else pair.heard
        rail, error = other.down.get(timeout=DEADLINE)
        assert (rail, type(error)) == (1, FabricError)
