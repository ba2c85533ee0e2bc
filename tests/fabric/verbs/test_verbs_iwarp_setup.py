"""What the two sides of iWARP rails tell each other: where one listens, and what the other presents."""

from __future__ import annotations

import copy
import ipaddress

import msgpack
import pytest

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric.verbs.description import TICKET_BYTES, RemotePort, RemoteRail, describe, parse
from nvflare_rdma.fabric.verbs.devices import Gid

TICKETS = [bytes([n]) * TICKET_BYTES for n in (1, 2)]
IWARP = RemotePort(
    "iWARP", Gid(0, ipaddress.IPv6Address("::ffff:192.0.2.7"), "iWARP", ""), 0, 3, 1 << 30, service=40_001
)
ROCE = RemotePort("RoCE", Gid(0, ipaddress.IPv6Address("::ffff:192.0.2.8"), "RoCE v2", ""), 0, 5, 1 << 30)


def over_the_wire(description):
    return msgpack.unpackb(msgpack.packb(description))


def iwarp():
    return over_the_wire(describe([IWARP], [(0, 17, 0, TICKETS[0]), (0, 18, 0, TICKETS[1])]))


def test_services_and_tickets_arrive():
    described = describe([ROCE, IWARP], [(0, 16, 5, b""), (1, 17, 0, TICKETS[0]), (1, 18, 0, TICKETS[1])])
    assert parse(over_the_wire(described)) == [
        RemoteRail(ROCE, 16, 5),
        RemoteRail(IWARP, 17, 0, TICKETS[0]),
        RemoteRail(IWARP, 18, 0, TICKETS[1]),
    ]


def test_an_answer_has_no_service():
    """The active side listens to nobody."""
    answer = over_the_wire(describe([RemotePort("iWARP", IWARP.gid, 0, 3, 1 << 30)], [(0, 17, 0, TICKETS[0])]))
    assert parse(answer)[0].port.service == 0


@pytest.mark.parametrize("service", [-1, 65_536, "4000", 4000.0, None, True, b"", []])
def test_a_service_is_the_number_of_a_tcp_port(service):
    description = iwarp()
    description["ports"][0]["service"] = service
    with pytest.raises(ProtocolError, match="service="):
        parse(description)


@pytest.mark.parametrize(
    "ticket", [b"", TICKETS[0][1:], TICKETS[0] + b"x", TICKETS[0].hex(), None, 7, [1] * TICKET_BYTES]
)
def test_a_ticket_is_so_many_bytes(ticket):
    description = iwarp()
    description["rails"][1]["ticket"] = ticket
    with pytest.raises(ProtocolError, match="ticket"):
        parse(description)


@pytest.mark.parametrize(("what", "key"), [("ports", "service"), ("rails", "ticket")])
def test_neither_may_lack(what, key):
    description = iwarp()
    del description[what][0][key]
    with pytest.raises(ProtocolError, match=key):
        parse(description)


@pytest.mark.parametrize(
    "change",
    [lambda d: d["ports"][0].update(service=4000), lambda d: d["rails"][0].update(ticket=TICKETS[0])],
    ids=["service", "ticket"],
)
def test_a_device_that_is_no_iwarp_device_has_neither(change):
    description = over_the_wire(describe([ROCE], [(0, 16, 5, b"")]))
    parse(copy.deepcopy(description))
    change(description)
    with pytest.raises(ProtocolError, match="in a way that can't be"):
        parse(description)
