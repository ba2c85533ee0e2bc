from __future__ import annotations

import copy
import ipaddress

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric.base import MAX_RAILS
from nvflare_rdma.fabric.verbs.description import MIN_MESSAGE, TICKET_BYTES, RemotePort, RemoteRail, describe, parse
from nvflare_rdma.fabric.verbs.devices import Gid

KINDS = [("InfiniBand", "IB"), ("RoCE", "RoCE v1"), ("RoCE", "RoCE v2"), ("iWARP", "iWARP")]
numbers24 = st.integers(0, (1 << 24) - 1)


@st.composite
def remote_ports(draw):
    transport, kind = draw(st.sampled_from(KINDS))
    gid = Gid(0, ipaddress.IPv6Address(draw(st.binary(min_size=16, max_size=16))), kind, "")
    return RemotePort(
        transport,
        gid,
        draw(st.integers(0, 0xFFFF)),
        draw(st.integers(1, 5)),
        draw(st.integers(MIN_MESSAGE, 1 << 31)),
        draw(st.integers(0, 0xFFFF if transport == "iWARP" else 0)),
    )


@st.composite
def sides(draw):
    ports = draw(st.lists(remote_ports(), min_size=1, max_size=4))
    rail = st.tuples(st.integers(0, len(ports) - 1), numbers24, numbers24)
    rails = draw(st.lists(rail, min_size=1, max_size=MAX_RAILS))
    ticket = st.binary(min_size=TICKET_BYTES, max_size=TICKET_BYTES)
    return ports, [(*rail, draw(ticket) if ports[rail[0]].transport == "iWARP" else b"") for rail in rails]


def over_the_wire(description):
    return msgpack.unpackb(msgpack.packb(description))


@given(sides())
def test_what_one_side_describes_the_other_side_reads(side):
    ports, rails = side
    assert parse(over_the_wire(describe(ports, rails))) == [
        RemoteRail(ports[port], number, packet, ticket) for port, number, packet, ticket in rails
    ]


def good():
    gid = Gid(3, ipaddress.IPv6Address("::ffff:192.0.2.7"), "RoCE v2", "eth0")
    port = RemotePort("RoCE", gid, 0, 5, 1 << 30)
    return over_the_wire(describe([port, port], [(0, 17, 1, b""), (1, 18, 2, b"")]))


ALIEN = [None, True, -1, 1.5, "", "x", b"", [], {}, [[]], {"port": 0}, 1 << 40, "9" * 5000, b"\0" * 16, float("nan")]
PLACES = [
    ("ports",),
    ("rails",),
    ("ports", 1),
    ("rails", 1),
    *(("ports", 1, key) for key in ("transport", "kind", "gid", "lid", "mtu", "max_message", "service")),
    *(("rails", 1, key) for key in ("port", "number", "packet")),
]


def changed(place, value, drop=False):
    description = copy.deepcopy(good())
    *path, last = place
    target = description
    for step in path:
        target = target[step]
    if drop:
        del target[last]
    else:
        target[last] = value
    return description


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("value", ALIEN, ids=lambda value: repr(value)[:20])
def test_what_is_of_another_type_is_refused(place, value):
    if value == b"\0" * 16 and place[-1] == "gid":
        return  # that one could be
    with pytest.raises(ProtocolError, match="the peer describes its verbs rails in a way that can't be") as refusal:
        parse(changed(place, value))
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("place", [place for place in PLACES if place[-1] != 1], ids=str)
def test_what_is_missing_is_refused(place):
    with pytest.raises(ProtocolError):
        parse(changed(place, None, drop=True))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rails", 0, "port"), 2),
        (("rails", 0, "number"), 1 << 24),
        (("rails", 0, "packet"), 1 << 24),
        (("ports", 0, "lid"), 1 << 16),
        (("ports", 0, "mtu"), 0),
        (("ports", 0, "mtu"), 6),
        (("ports", 0, "max_message"), MIN_MESSAGE - 1),
        (("ports", 0, "max_message"), (1 << 31) + 1),
        (("ports", 0, "gid"), b"\0" * 15),
        (("ports", 0, "gid"), bytearray(16)),
        (("ports", 0, "kind"), "IB"),
        (("ports", 0, "kind"), "iWARP"),
        (("ports", 0, "transport"), "InfiniBand"),
        (("ports", 0, "transport"), "unspecified"),
        (("ports",), [good()["ports"][0]] * (MAX_RAILS + 1)),
        (("rails",), [good()["rails"][0]] * (MAX_RAILS + 1)),
        (("rails",), [None] * 1_000_000),
    ],
)
def test_what_is_out_of_range_is_refused(place, value):
    with pytest.raises(ProtocolError):
        parse(changed(place, value))


@pytest.mark.parametrize(
    "description", [None, 1, "ports", b"ports", [], {}, [("ports", [])], {b"ports": [], b"rails": []}]
)
def test_what_is_no_description_is_refused(description):
    with pytest.raises(ProtocolError):
        parse(description)


def test_what_a_later_version_adds_is_ignored():
    description = good()
    for target in (description, description["ports"][0], description["rails"][0]):
        target["new"] = "thing"
    assert parse(description) == parse(good())


wire_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.sampled_from(PLACES), wire_values)
def test_nothing_but_a_protocol_error_comes_of_it(place, value):
    try:
        rails = parse(changed(place, value))
    except ProtocolError:
        return
    assert all(isinstance(rail, RemoteRail) for rail in rails)


@settings(max_examples=300)
@given(wire_values)
def test_nothing_but_a_protocol_error_comes_of_anything(value):
    with pytest.raises(ProtocolError):
        parse(value)


def test_what_is_nested_as_deep_as_msgpack_allows_is_malformed():
    """It is deeper than Python shows."""
    nested = msgpack.unpackb(b"\x91" * 1015 + b"\x01")
    with pytest.raises(ProtocolError, match="RecursionError"):
        parse({"ports": [{"transport": "RoCE", "kind": nested, "gid": b""}]})
