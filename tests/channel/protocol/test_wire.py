from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_rdma.channel.protocol import wire
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric.base import RemoteSlice

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
reasons = st.text(st.characters(categories=("L", "N", "P")), max_size=100)
messages = st.one_of(
    st.builds(
        wire.Hello,
        st.dictionaries(st.text(max_size=10), reasons, max_size=4),
        u32,
        u32,
        st.integers(1, 2**16),
        st.sampled_from([b"", bytes(32)]),
        st.text(max_size=20),
        st.sampled_from(wire.INTEGRITY),
    ),
    st.builds(
        wire.Open,
        st.text(max_size=10),
        st.dictionaries(st.text(max_size=5), st.binary(max_size=40), max_size=3),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(wire.Rails, u32, reasons),
    st.builds(wire.RailDown, u32, reasons),
    st.builds(wire.RailUp, u32),
    st.builds(wire.MoreRails, u32),
    st.builds(wire.Reopen, reasons),
    st.builds(wire.Inline, st.binary(max_size=500)),
    st.builds(wire.Offer, u64, u64),
    st.builds(wire.Grant, u64, u64, u32, st.builds(RemoteSlice, u64, u64, u32), u32, st.integers(0, 255)),
    st.builds(wire.Data, u32, u64, st.binary(max_size=500)),
    st.builds(wire.Done, u64),
    st.builds(wire.Refuse, u64, reasons),
    st.builds(wire.Withdraw, u64, reasons),
    st.builds(wire.Ping),
    st.builds(wire.Pong),
    st.builds(wire.Bye, reasons),
)


@given(st.lists(messages, max_size=6), st.integers(1, 50))
def test_messages_survive_any_fragmentation(sent, step):
    data = b"".join(map(wire.encode, sent))
    parser = wire.Parser(500, 500)
    received = [m for i in range(0, len(data), step) for m in parser.feed(data[i : i + step])]
    assert received == sent


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x00\x00\x00\x01\xee", "unknown type 238"),
        (b"\x00\x00\x00\x00\x04", "Inline message of 0 bytes"),
        (b"\xff\xff\xff\xff\x04", "at most 101 are allowed"),
        (b"\xff\xff\xff\xff\x05", "Offer message of 4294967295 bytes"),
        (b"\x00\x00\x00\x03\x05ab", "malformed Offer"),
        (b"\x00\x00\x00\x02\x0ex", "malformed Ping message: 1 bytes where there are none"),
        (b"\x00\x00\x00\x02\x01\xc1", "malformed Hello"),
        (b"\x00\x00\x00\x02\x01\x80", "field 'version' should be int"),
        (b"\x00\x00\x00\x02\x01\x05", "should be a map"),
    ],
)
def test_bad_bytes_are_named(data, reason):
    with pytest.raises(ProtocolError, match=reason):
        list(wire.Parser(100, 100).feed(data))


def test_an_announced_length_is_not_allocated():
    """Nothing is set aside for a message before its bytes are there."""
    parser = wire.Parser(2**31, 2**31)
    assert list(parser.feed(b"\x7f\xff\xff\xff\x04")) == []
    assert parser._buffer.__sizeof__() < 1000


def test_a_peers_words_fit_one_line_of_a_log():
    long = "\u00e9" * wire.MAX_REASON_BYTES  # two bytes each: cut in the middle of one
    (bye,) = wire.Parser(100, 100).feed(wire.encode(wire.Bye("x" + long)))
    assert bye.reason.startswith("x\u00e9")
    (bye,) = wire.Parser(100, 100).feed(wire.encode(wire.Bye("fine\nERROR forged \x1b[31m")))
    assert bye.reason == "fine?ERROR forged ?[31m"


def test_a_peers_words_are_few():
    """Whatever their message may hold besides."""
    said = msgpack.packb({"count": 0, "reason": "x" * 10_000, "answer": {}})
    parser = wire.Parser(100, 100)
    (rails,) = parser.feed(struct.pack("!IB", len(said) + 1, wire._TYPES[wire.Rails]) + said)
    assert len(rails.reason) == wire.MAX_REASON_BYTES
    (hello,) = parser.feed(wire.encode(wire.Hello({"tcp": "", "shm": "x" * 10_000}, 1, 1, 1)))
    assert {name: len(reason) for name, reason in hello.fabrics.items()} == {"tcp": 0, "shm": 200}
