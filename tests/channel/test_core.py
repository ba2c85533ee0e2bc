"""The protocol without I/O: whatever the order, every byte lands once; whatever a peer says, nothing breaks."""

from __future__ import annotations

import pytest
from core_pair import LIMITS, make_pair, open_pair, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.channel import wire
from nvflare_rdma.channel.core import ChannelLimits
from nvflare_rdma.channel.state import Phase
from nvflare_rdma.errors import LocalProtocolError, ProtocolError, TransferError
from nvflare_rdma.fabric.base import RemoteSlice


def message(size: int, seed: int = 0) -> bytes:
    return bytes((i * 7 + seed) & 0xFF for i in range(size))


@pytest.mark.parametrize("size", [1, 100, 101, 999, 1000, 1001, 3000, 12_345])
def test_a_message_of_any_size_arrives(size):
    active, passive = open_pair()
    active.send(message(size))
    run_to_end(active, passive)
    assert passive.received + passive.inline == [message(size)]
    assert bool(active.sent) == (size > LIMITS.inline_bytes)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_interleaving_delivers_every_message_once_and_keeps_to_the_depth(data):
    active, passive = open_pair()
    sides = (active, passive)
    to_send = {
        side: data.draw(st.lists(st.integers(0, 6000), max_size=5), label=name)
        for side, name in ((active, "active sends"), (passive, "passive sends"))
    }
    expected = {side: [message(n, i) for i, n in enumerate(to_send[side.peer])] for side in sides}
    pending = {side: [message(n, i) for i, n in enumerate(to_send[side])] for side in sides}
    for _ in range(400):
        steps = []
        for side in sides:
            if pending[side]:
                steps.append((lambda s: s.send(pending[s].pop(0)), side))
            if side.offered:
                steps.append((lambda s: s.take_memory(), side))
            if side.wire:
                size = data.draw(st.integers(1, 200), label="bytes read")
                steps.append((lambda s, n=size: s.read_wire(n), side))
            if side.writes:
                index = data.draw(st.integers(0, len(side.writes) - 1), label="write that lands")
                steps.append((lambda s, i=index: s.land(i), side))
        if not steps:
            break
        step, side = data.draw(st.sampled_from(steps))
        step(side)
    for side in sides:
        for payload in pending[side]:
            side.send(payload)
    run_to_end(active, passive)
    for side in sides:
        assert sorted(side.received + side.inline) == sorted(expected[side])
        live = len([m for m in expected[side] if len(m) > LIMITS.inline_bytes])
        assert side.peak_granted <= live * LIMITS.depth * LIMITS.chunk_bytes
        assert not side.failed
        assert not side.exposed


def test_no_more_than_depth_chunks_are_granted_before_one_lands():
    active, passive = open_pair()
    active.send(message(10_000))
    passive.read_wire(1 << 20)
    passive.take_memory()
    active.read_wire(1 << 20)
    assert len(active.writes) == LIMITS.depth
    active.land(1)
    active.read_wire(1 << 20)
    assert len(active.writes) == LIMITS.depth


def test_closing_fails_what_is_in_flight_on_both_sides_with_the_reason():
    active, passive = open_pair()
    active.send(message(5000))
    passive.read_wire(1 << 20)
    passive.take_memory()
    passive.core.close("budget withdrawn")
    passive.settle()
    active.read_wire(1 << 20)
    assert passive.failed == ["budget withdrawn"]
    assert active.failed == ["budget withdrawn"]
    assert active.core.state is passive.core.state is Phase.CLOSED
    with pytest.raises(LocalProtocolError):
        active.core.submit(5000, now=0.0)


def test_a_refused_message_fails_on_its_sender_alone():
    active, passive = open_pair()
    active.send(message(5000))
    passive.read_wire(1 << 20)
    passive.core.refuse(passive.offered.popleft().transfer, "no memory")
    passive.settle()
    active.read_wire(1 << 20)
    assert active.failed == ["no memory"]
    active.send(message(2000))
    run_to_end(active, passive)
    assert passive.received == [message(2000)]


def test_deadlines():
    active, _ = make_pair()
    active.settle()
    active.core.check(now=LIMITS.handshake_timeout)
    with pytest.raises(TransferError, match="did not finish the handshake in 30 s"):
        active.core.check(now=LIMITS.handshake_timeout + 1)
    active, _ = open_pair()
    active.send(message(5000))
    active.core.check(now=10 * LIMITS.stall_timeout)  # it waits for the peer's memory: that may take long
    active.core.receive(wire.encode(wire.Grant(1, 0, 0, 1000, RemoteSlice(1, 0, 1000), 1)), now=0.0)
    active.core.check(now=LIMITS.stall_timeout)
    with pytest.raises(TransferError, match=r"sending transfer 1 \(5000 bytes\) made no progress for 120 s"):
        active.core.check(now=LIMITS.stall_timeout + 1)


def test_a_peer_that_trickles_its_bytes_can_not_hold_memory_for_ever():
    active, passive = open_pair()
    active.send(message(100_000))
    passive.read_wire(1 << 20)
    passive.core.check(now=10 * LIMITS.stall_timeout)  # not granted yet
    passive.take_memory()

    def trickle() -> None:
        for step in range(1, 101):
            now = step * (LIMITS.stall_timeout - 1)
            passive.core.landed(next(iter(passive.exposed)), 1000, now=now)
            passive.exposed.pop(next(iter(passive.exposed)))
            passive.settle()
            passive.core.check(now=now)

    with pytest.raises(TransferError, match=r"takes too long: \d+ of 100000 bytes came, at less than 16384 bytes/s"):
        trickle()


def test_a_message_too_large_for_the_peer_is_refused_before_it_is_offered():
    active, _ = open_pair()
    with pytest.raises(TransferError, match="larger than the peer's 1048576"):
        active.core.submit((1 << 20) + 1, now=0.0)


def test_done_of_a_message_that_is_half_granted_is_a_protocol_error():
    active, _ = open_pair()
    active.send(message(5000))
    active.core.receive(wire.encode(wire.Grant(1, 0, 0, 1000, RemoteSlice(1, 0, 1000), 1)), now=0.0)
    with pytest.raises(ProtocolError, match="transfer 1 is done with 1000 bytes granted"):
        active.core.receive(wire.encode(wire.Done(1)), now=0.0)


REMOTE = RemoteSlice(1, 0, 1000)
HOSTILE = {
    "an offer of nothing": wire.Offer(1, 0),
    "an offer of what goes inline": wire.Offer(1, 100),
    "an offer beyond the limit": wire.Offer(1, (1 << 20) + 1),
    "an offer of 2^63 bytes": wire.Offer(1, 1 << 63),
    "a grant of a transfer never offered": wire.Grant(9, 0, 0, 1000, REMOTE, 1),
    "a grant past the end": wire.Grant(1, 0, 0, 6000, RemoteSlice(1, 0, 6000), 1),
    "a grant with a hole": wire.Grant(1, 1, 1000, 1000, REMOTE, 1),
    "a grant of nothing": wire.Grant(1, 0, 0, 0, RemoteSlice(1, 0, 0), 1),
    "a grant of another chunk than the next": wire.Grant(1, 1, 0, 1000, REMOTE, 1),
    "a grant whose slice is too small": wire.Grant(1, 0, 0, 1000, RemoteSlice(1, 0, 999), 1),
    "done before anything was written": wire.Done(1),
    "done of a transfer never offered": wire.Done(7),
    "refusal of a transfer never offered": wire.Refuse(7, ""),
    "a second greeting": wire.Hello({}, 1, 1),
    "an inline message over the limit": wire.Inline(bytes(101)),
    "a choice of fabric when open": wire.Open("tcp", {}),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_message_is_a_protocol_error_and_costs_no_memory(hostile):
    active, _ = open_pair()
    active.send(message(5000))
    with pytest.raises(ProtocolError):
        active.core.receive(wire.encode(hostile), now=0.0)
    assert not active.writes
    assert not active.offered


def test_offers_beyond_the_limit_of_concurrent_ones_are_a_protocol_error():
    _, passive = open_pair(ChannelLimits(max_message_bytes=1000, max_incoming=3, inline_bytes=5))
    passive.core.receive(b"".join(wire.encode(wire.Offer(i, 10)) for i in (1, 2, 3)), now=0.0)
    with pytest.raises(ProtocolError, match="more than 3 messages"):
        passive.core.receive(wire.encode(wire.Offer(4, 10)), now=0.0)


def test_grants_are_bounded_in_number_and_size():
    """Each open grant costs the sender a write, and in secure mode a slot."""
    active, _ = open_pair(ChannelLimits(max_message_bytes=1 << 30, peer_depth=2, peer_chunk_bytes=1000))
    active.sources[active.core.submit(100_000, now=0.0)] = bytes(100_000)
    with pytest.raises(ProtocolError, match="a grant of 999 bytes, 1000 are the least"):
        active.core.receive(wire.encode(wire.Grant(1, 0, 0, 999, RemoteSlice(1, 0, 999), 1)), now=0.0)
    grants = [wire.Grant(1, i, i * 1000, 1000, RemoteSlice(1, i * 1000, 1000), i) for i in range(3)]
    with pytest.raises(ProtocolError, match="more than 2 grants are open"):
        active.core.receive(b"".join(map(wire.encode, grants)), now=0.0)


@pytest.mark.parametrize("extra", [wire.Open("tcp", {}), wire.Hello({}, 1, 1)])
def test_the_handshake_goes_one_step_at_a_time(extra):
    active, passive = make_pair()
    active.settle()
    passive.read_wire(1 << 20)
    data = b"".join(active.wire)
    with pytest.raises(ProtocolError, match="not allowed in state DIALLING"):
        active.core.receive(data + wire.encode(extra), now=0.0)


def test_what_would_start_something_is_dropped_when_the_connection_ends():
    _, passive = open_pair()
    last = [wire.Inline(b"last words"), wire.Offer(1, 5000), wire.Bye("")]
    passive.core.receive(b"".join(map(wire.encode, last)), now=0.0)
    passive.settle()
    assert passive.inline == [b"last words"]
    assert not passive.offered


def test_a_transfer_number_is_offered_once():
    _, passive = open_pair()
    passive.core.receive(wire.encode(wire.Offer(5, 500)), now=0.0)
    with pytest.raises(ProtocolError, match="transfer 5 is offered after 5"):
        passive.core.receive(wire.encode(wire.Offer(5, 500)), now=0.0)


def test_a_write_that_was_not_granted_or_is_short_is_a_protocol_error():
    active, passive = open_pair()
    active.send(message(5000))
    passive.read_wire(1 << 20)
    passive.take_memory()
    with pytest.raises(ProtocolError, match="not exposed"):
        passive.core.landed(999, 1000, now=0.0)
    with pytest.raises(ProtocolError, match="wrote 10 bytes where 1000 were granted"):
        passive.core.landed(next(iter(passive.exposed)), 10, now=0.0)


def test_traffic_before_the_connection_is_open_is_a_protocol_error():
    _, passive = make_pair()
    with pytest.raises(ProtocolError, match="TRAFFIC is not allowed in state GREETING"):
        passive.core.receive(wire.encode(wire.Offer(1, 500)), now=0.0)


def test_a_peer_of_another_version_is_told_what_to_do():
    _, passive = make_pair()
    with pytest.raises(ProtocolError, match="install the same nvflare-rdma release"):
        passive.core.receive(wire.encode(wire.Hello({}, 1, 1, version=2)), now=0.0)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_do_worse_than_a_protocol_error(data):
    _, passive = open_pair()
    try:
        passive.core.receive(data, now=0.0)
    except ProtocolError:
        return
    passive.settle()
