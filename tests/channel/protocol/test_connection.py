"""The protocol without I/O: whatever the order, every byte lands once; whatever a peer says, nothing breaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.channel import MAX_UNIT_BYTES
from nvflare_rdma.channel.controllers import make_controller
from nvflare_rdma.channel.protocol import events, wire
from nvflare_rdma.channel.protocol.limits import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, ChannelLimits
from nvflare_rdma.channel.protocol.state import Phase, RailState
from nvflare_rdma.errors import LocalProtocolError, ProtocolError, TransferError
from nvflare_rdma.fabric.base import RemoteSlice
from tests.support.core_pair import (
    CHUNK,
    DEPTH,
    LIMITS,
    MOST_RAILS,
    hello,
    make_pair,
    message,
    open_pair,
    run_to_end,
    take_step,
)


@pytest.mark.parametrize("size", [1, 100, 101, 999, 1000, 1001, 3000, 12_345])
def test_a_message_of_any_size_arrives(size):
    active, passive = open_pair()
    active.send(message(size))
    run_to_end(active, passive)
    assert passive.received + passive.inline == [message(size)]
    assert bool(active.sent) == (size > LIMITS.inline_bytes)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_the_order_and_the_losses_every_message_arrives_exactly_once(data):
    """Control bytes come in any pieces, writes land in any order or damaged, rails break, come back and become more."""
    active, passive = sides = open_pair(rails=data.draw(st.integers(0, 3), label="rails"))
    to_send = {
        side: data.draw(st.lists(st.integers(0, 6000), max_size=5), label=name)
        for side, name in ((active, "active sends"), (passive, "passive sends"))
    }
    expected = {side: [message(n, i) for i, n in enumerate(to_send[side.peer])] for side in sides}
    pending = {side: [message(n, i) for i, n in enumerate(to_send[side])] for side in sides}
    cuts = data.draw(st.integers(0, 6), label="rails that are cut")
    damages = data.draw(st.integers(0, 6), label="chunks that are damaged")
    wishes = data.draw(st.integers(0, 4), label="wishes for more rails")
    for _ in range(300):
        steps = []
        for name, side in (("active", active), ("passive", passive)):
            ready = {
                "send": pending[side],
                "take memory": side.offered,
                "dial": side.to_dial,
                "report a broken rail": side.can_break,
                "read": side.wire,
                "wait": side.core.timeout(side.now) is not None,
                "land": side.writes,
                "damage": side.writes and damages,
                "cut": side.rails and cuts,
                "want": wishes,
                "join": side.to_join,
            }
            steps += [(what, name) for what, possible in ready.items() if possible]
        if not steps:
            break
        what, name = data.draw(st.sampled_from(steps))
        side = active if name == "active" else passive
        match what:
            case "send":
                side.send(pending[side].pop(0))
            case "take memory":
                side.take_memory()
            case "dial":
                side.dial(data.draw(st.integers(0, side.rails), label="rails dialled"))
            case "report a broken rail":
                side.break_rail(side.to_break.popleft())
            case "read":
                side.read_wire(data.draw(st.integers(1, 200), label="bytes read"))
            case "wait":
                side.tick(1.0)
            case "land" | "damage":
                side.land(data.draw(st.integers(0, len(side.writes) - 1)), damaged=what == "damage")
                damages -= what == "damage"
            case "cut":
                side.cut(data.draw(st.integers(0, MOST_RAILS - 1), label="rail"))
                cuts -= 1
            case "want":
                side.want(data.draw(st.integers(1, MOST_RAILS), label="rails wanted"))
                wishes -= 1
            case "join":
                side.join(data.draw(st.integers(0, len(side.to_join) - 1)))
    for side in sides:
        for payload in pending[side]:
            side.send(payload)
    run_to_end(active, passive)
    for side in sides:
        assert sorted(side.received + side.inline) == sorted(expected[side])
        assert side.peak_granted <= DEPTH * CHUNK
        assert set(side.landed.values()) <= {1}, "a chunk that had landed was written again"
        assert not side.failed
        assert not side.exposed
        assert sorted(side.sent) == sorted(side.sources)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_messages_that_either_side_gives_up_end_on_both_and_harm_no_other(data):
    active, passive = open_pair()
    for size in (5000, 3000, 4000):
        active.send(message(size))
    given_up = data.draw(st.sampled_from([1, 2, 3]))
    steps_before = data.draw(st.integers(0, 25))
    by_sender = data.draw(st.booleans())
    for _ in range(steps_before):
        side = data.draw(st.sampled_from([active, passive]))
        if side.wire:
            side.read_wire(1 << 20)
        elif side.offered:
            side.take_memory()
        elif side.writes:
            side.land(data.draw(st.integers(0, len(side.writes) - 1)))
    finished = given_up in active.sent or len(passive.received) == 3 or given_up not in passive.core.progress()
    if by_sender:
        active.core.withdraw(given_up, "changed its mind")
        active.settle()
    else:
        passive.core.refuse(given_up, "disk full")
        passive.settle()
    run_to_end(active, passive)
    survivors = [message(size) for n, size in enumerate((5000, 3000, 4000), 1) if n != given_up]
    assert sorted(m for m in passive.received if m != message((5000, 3000, 4000)[given_up - 1])) == sorted(survivors)
    assert not passive.exposed
    assert not passive.core.progress()
    if not finished:
        reason = "changed its mind" if by_sender else "disk full"
        assert set(active.failed + passive.failed) <= {reason}
        assert given_up in active.sent or active.failed == [reason]
    # The connection serves on.
    active.send(message(2500, 9))
    run_to_end(active, passive)
    assert message(2500, 9) in passive.received


@settings(max_examples=100, deadline=None)
@given(
    unit=st.sampled_from([MIN_CHUNK_BYTES, MIN_CHUNK_BYTES + 77, MAX_UNIT_BYTES]),
    size=st.integers(101, 1 << 20),
    rails=st.integers(0, 2),
    mishaps=st.dictionaries(st.integers(0, 20), st.sampled_from(["damage", "cut"]), max_size=5),
)
def test_chunks_begin_at_multiples_of_the_unit_whatever_breaks(unit, size, rails, mishaps):
    active, passive = open_pair(rails=rails)
    passive.unit = unit
    passive.core.set_controller(make_controller("fixed", 150_000, DEPTH, 1 << 30))  # no multiple of a unit
    active.send(message(size))
    for moment in range(max(mishaps, default=0) + 1):
        if mishaps.get(moment) == "damage" and active.writes:
            active.land(0, damaged=True)
        elif mishaps.get(moment) == "cut":
            active.cut(0)
        elif not take_step(active):
            take_step(passive)
    run_to_end(active, passive)
    assert passive.received == [message(size)]


@pytest.mark.parametrize("unit", [0, -1, 2, MIN_CHUNK_BYTES - 1, MAX_UNIT_BYTES + 1])
def test_a_unit_that_chunks_can_not_have_is_refused(unit):
    active, passive = open_pair()
    active.send(message(5000))
    passive.read_wire(1 << 20)
    with pytest.raises(LocalProtocolError, match=f"not {unit}"):
        passive.core.accept(1, 0.0, unit)


def test_a_label_goes_with_its_message_and_makes_any_length_an_offer():
    active, passive = open_pair()
    active.sources[active.core.submit(7, 0.0, label=1 << 63)] = b"7 bytes"
    active.settle()
    passive.read_wire(1 << 20)
    assert passive.offered[0].label == 1 << 63
    run_to_end(active, passive)
    assert passive.received == [b"7 bytes"]


def test_a_broken_rail_costs_its_unfinished_chunks_only():
    active, passive = open_pair()
    active.send(message(8000))
    passive.read_wire(1 << 20)
    passive.take_memory()
    active.read_wire(1 << 20)
    assert [write.rail for write, _ in active.writes] == [0, 1, 0]
    active.land(0)
    passive.break_rail(1)
    run_to_end(active, passive)
    assert passive.received == [message(8000)]
    assert passive.landed == {(1, offset): 1 for offset in range(0, 7000, CHUNK)}  # the last one is twice as long
    assert active.core.rail_state is RailState.UP  # one is left


def test_rails_that_join_carry_chunks_of_both_directions_at_once():
    active, passive = open_pair(rails=1)
    passive.want(3)
    active.read_wire(1 << 20)
    assert list(active.to_join) == [1, 2]
    active.join(1)  # the last is the first to be open
    for side in (active, passive):
        side.send(message(8000))
        side.peer.read_wire(1 << 20)
        side.peer.take_memory()
        side.read_wire(1 << 20)
        assert [write.rail for write, _ in side.writes] == [0, 2, 0]
    run_to_end(active, passive)
    assert active.received == passive.received == [message(8000)]


def test_more_rails_than_may_be_are_neither_dialled_nor_asked_for_in_vain():
    active, passive = open_pair(rails=1)
    passive.want(MOST_RAILS)
    active.want(MOST_RAILS)
    active.read_wire(1 << 20)
    assert list(active.to_join) == list(range(1, MOST_RAILS))


def test_a_rail_that_joins_when_the_others_are_gone_is_of_no_use():
    active, passive = open_pair(rails=1)
    active.want(2)
    active.join()
    passive.break_rail(0)  # before it reads of the other
    passive.read_wire(1 << 20)
    assert passive.core.rail_state is RailState.DOWN
    active.send(message(8000))
    run_to_end(active, passive)
    assert passive.received == [message(8000)]
    assert active.core.rail_state is passive.core.rail_state is RailState.UP


def test_a_wish_for_rails_that_are_gone_is_forgotten():
    active, passive = open_pair(rails=1)
    passive.want(3)
    active.break_rail(0)
    active.read_wire(1 << 20)
    assert not active.to_join
    run_to_end(active, passive)
    assert active.core.rail_state is passive.core.rail_state is RailState.UP


@pytest.mark.parametrize("rail", [0, 1, 64])
def test_a_rail_that_can_not_join_is_a_protocol_error(rail):
    _, passive = open_pair(rails=2)
    with pytest.raises(ProtocolError, match=f"rail {rail}, which can't be"):
        passive.core.receive(wire.encode(wire.RailUp(rail)), now=0.0)


def test_no_rail_joins_where_there_is_only_the_control_stream():
    _, passive = open_pair(rails=0)
    with pytest.raises(ProtocolError, match="rail 1, which can't be"):
        passive.core.receive(wire.encode(wire.RailUp(1)), now=0.0)


@pytest.mark.parametrize("count", [0, 65])
def test_a_wish_for_no_rail_or_too_many_is_a_protocol_error(count):
    active, _ = open_pair()
    with pytest.raises(ProtocolError, match=f"the peer wants {count} rails, at most 64 are allowed"):
        active.core.receive(wire.encode(wire.MoreRails(count)), now=0.0)


def test_a_wish_for_more_rails_that_is_said_again_changes_nothing():
    active, _ = open_pair()
    wishes = []
    for count in (4, 4, 3, 5):
        active.core.receive(wire.encode(wire.MoreRails(count)), now=0.0)
        wishes += [event.count for event in active.core.next_events() if isinstance(event, events.GrowRails)]
    assert wishes == [4, 5]


def test_when_no_rail_is_left_the_active_side_waits_longer_and_longer():
    active, passive = open_pair(rails=1)
    waits = []
    for _ in range(5):
        active.break_rail(0)
        waits.append(active.core.timeout(active.now))
        active.tick(waits[-1])
        passive.read_wire(1 << 20)
        active.read_wire(1 << 20)
        active.dial()
        passive.read_wire(1 << 20)
    assert waits == pytest.approx([0.0, 0.1, 0.3, 1.0, 3.0])


def test_rails_that_never_last_end_the_connection():
    active, passive = open_pair(rails=1)

    def flap() -> None:
        for _ in range(100):
            active.break_rail(0)
            active.tick(active.core.timeout(active.now))
            passive.read_wire(1 << 20)
            active.read_wire(1 << 20)
            active.dial()
            passive.now = active.now
            passive.read_wire(1 << 20)
            active.now += 0.1

    with pytest.raises(TransferError, match="rails broke 64 times"):
        flap()


def test_chunks_that_are_always_damaged_end_the_connection():
    active, passive = open_pair()
    active.send(message(5000))
    passive.read_wire(1 << 20)
    passive.take_memory()

    def damage_all() -> None:
        for _ in range(100):
            active.read_wire(1 << 20)
            active.land(0, damaged=True)

    with pytest.raises(TransferError, match="17 chunks in a row arrived damaged"):
        damage_all()


def test_no_more_than_the_window_is_granted_before_a_chunk_lands():
    active, passive = open_pair()
    for size in (2000, 10_000):
        active.send(message(size))
    passive.read_wire(1 << 20)
    passive.take_memory()
    passive.take_memory()
    active.read_wire(1 << 20)
    assert [(write.transfer, write.length) for write, _ in active.writes] == [(1, 2000), (2, 1000)]  # the oldest first
    active.land(0)
    active.read_wire(1 << 20)
    assert sum(write.length for write, _ in active.writes) == DEPTH * CHUNK


def test_no_more_chunks_are_granted_than_the_peer_works_on():
    active, passive = open_pair(ChannelLimits(max_message_bytes=1 << 20, max_writes=2, peer_chunk_bytes=1))
    active.send(message(100_000))
    passive.read_wire(1 << 20)
    passive.take_memory()
    active.read_wire(1 << 20)
    assert len(active.writes) == 2


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


def test_a_message_too_large_for_the_peer_is_refused_before_it_is_offered():
    active, _ = open_pair()
    with pytest.raises(TransferError, match="larger than the peer's 1048576"):
        active.core.submit((1 << 20) + 1, now=0.0)


def test_done_of_a_message_that_is_half_granted_is_a_protocol_error():
    active, _ = open_pair()
    active.send(message(5000))
    active.core.receive(wire.encode(wire.Grant(1, 0, 1000, RemoteSlice(1, 0, 1000), 1, 0)), now=0.0)
    with pytest.raises(ProtocolError, match="transfer 1 is done with 1000 bytes granted"):
        active.core.receive(wire.encode(wire.Done(1)), now=0.0)


REMOTE = RemoteSlice(1, 0, 1000)
HOSTILE = {
    "an offer of nothing": wire.Offer(1, 0),
    "an offer of what goes inline": wire.Offer(1, 100),
    "an offer beyond the limit": wire.Offer(1, (1 << 20) + 1),
    "an offer of 2^63 bytes": wire.Offer(1, 1 << 63),
    "a grant of a transfer never offered": wire.Grant(9, 0, 1000, REMOTE, 1, 0),
    "a grant past the end": wire.Grant(1, 0, 6000, RemoteSlice(1, 0, 6000), 1, 0),
    "a grant with a hole": wire.Grant(1, 1000, 1000, REMOTE, 1, 0),
    "a grant of nothing": wire.Grant(1, 0, 0, RemoteSlice(1, 0, 0), 1, 0),
    "a grant over a rail that is not open": wire.Grant(1, 0, 1000, REMOTE, 1, 2),
    "a grant whose slice is too small": wire.Grant(1, 0, 1000, RemoteSlice(1, 0, 999), 1, 0),
    "a withdrawal of what was never offered": wire.Withdraw(7, ""),
    "rails when they are up": wire.Rails(2),
    "a wish for new rails from the passive side": wire.Reopen(""),
    "a rail that the passive side opened": wire.RailUp(2),
    "done before anything was written": wire.Done(1),
    "done of a transfer never offered": wire.Done(7),
    "refusal of a transfer never offered": wire.Refuse(7, ""),
    "a second greeting": hello(),
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


def test_grants_are_bounded_in_number_size_and_repetition():
    """Each open grant costs the sender a write, and in secure mode a slot."""

    def grants(*ranges, first=1):
        made = [wire.Grant(1, o, n, RemoteSlice(1, o, n), i, 0) for i, (o, n) in enumerate(ranges, first)]
        return b"".join(map(wire.encode, made))

    def offering():
        active, _ = open_pair(ChannelLimits(max_message_bytes=1 << 30, max_writes=2, peer_chunk_bytes=1000))
        active.sources[active.core.submit(100_000, now=0.0)] = bytes(100_000)
        return active

    with pytest.raises(ProtocolError, match="a grant of 999 bytes, 1000 are the least"):
        offering().core.receive(grants((0, 999)), now=0.0)
    with pytest.raises(ProtocolError, match="more than 2 grants are open"):
        offering().core.receive(grants((0, 1000), (1000, 1000), (2000, 1000)), now=0.0)
    with pytest.raises(ProtocolError, match=r"grant of 2000 bytes at 0 .* 1000 are granted"):
        offering().core.receive(grants((0, 1000), (0, 2000)), now=0.0)
    active = offering()
    active.core.receive(grants((0, 100_000)), now=0.0)

    def ask_again() -> None:
        for i in range(1, 10_000):
            active.settle()
            active.writes.clear()
            active.core.written(i, now=0.0)
            active.core.receive(grants((0, 1000), first=i + 1), now=0.0)

    with pytest.raises(ProtocolError, match="asked for more than 16 times over"):
        ask_again()


@pytest.mark.parametrize("extra", [wire.Open("tcp", {}), hello(), wire.Offer(1, 500)])
def test_the_handshake_goes_one_step_at_a_time(extra):
    active, passive = make_pair()
    active.settle()
    passive.read_wire(1 << 20)
    data = b"".join(active.wire)
    with pytest.raises(ProtocolError, match=r"not allowed in state (DIALLING|OPENING)"):
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
        passive.core.receive(wire.encode(hello(version=1)), now=0.0)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_do_worse_than_a_protocol_error(data):
    _, passive = open_pair()
    try:
        passive.core.receive(data, now=0.0)
    except ProtocolError:
        return
    passive.settle()


def test_rails_beyond_the_limit_are_a_protocol_error():
    """Each costs a thread; 2^32 - 1 of them were believed."""
    active, passive = make_pair()
    active.settle()
    passive.read_wire(1 << 20)
    with pytest.raises(ProtocolError, match="the peer says that it opened 65 rails, at most 64 are allowed"):
        passive.core.receive(wire.encode(wire.Rails(65)), now=0.0)


def test_rails_beyond_what_was_offered_are_a_protocol_error():
    active, passive = make_pair()
    active.settle()
    passive.core.receive(b"".join(passive.wire), now=0.0)
    passive.core.next_events()
    passive.core.choose("tcp", {}, False, False, most_rails=2)
    with pytest.raises(ProtocolError, match="the peer says that it opened 3 rails, at most 2 are allowed"):
        passive.core.receive(wire.encode(wire.Rails(3)), now=0.0)


def test_rails_where_there_is_only_the_control_stream_are_a_protocol_error():
    active, passive = make_pair(rails=0)
    active.settle()
    passive.read_wire(1 << 20)
    with pytest.raises(ProtocolError, match="opened 1 rails, at most 0 are allowed"):
        passive.core.receive(wire.encode(wire.Rails(1)), now=0.0)


@pytest.mark.parametrize("rails", [1, 0], ids=["rails", "control stream"])
def test_a_grant_larger_than_a_chunk_may_be_is_a_protocol_error(rails):
    """In secure mode a slot of its size would be taken."""
    active, _ = open_pair(ChannelLimits(max_message_bytes=1 << 30), rails)
    active.core.submit(1 << 30, now=0.0)
    length = (MAX_CHUNK_BYTES if rails else wire.MAX_DATA_BYTES) + 1
    with pytest.raises(ProtocolError, match=f"a grant of {length} bytes, {length - 1} are the most"):
        active.core.receive(wire.encode(wire.Grant(1, 0, length, RemoteSlice(1, 0, length), 1, 0)), now=0.0)


def test_the_controller_is_told_that_grants_of_a_message_that_is_given_up_are_over():
    active, passive = open_pair()
    controller = make_controller("adaptive", 64 * 1024, DEPTH, 1 << 30)
    passive.core.set_controller(controller)
    active.send(message(500_000))
    passive.read_wire(1 << 20)
    passive.take_memory()
    active.read_wire(1 << 20)
    assert controller._rate.in_flight > 0
    active.core.withdraw(1, "not wanted")
    active.settle()
    passive.read_wire(1 << 20)
    while active.writes:
        active.land(0)
    assert not passive.core._incoming._exposures
    assert controller._rate.in_flight == 0
    assert controller._rate.in_order


def test_offers_that_are_withdrawn_leave_nothing_behind():
    _, passive = open_pair()
    passive.core.receive(wire.encode(wire.Offer(1, 100_000)), now=0.0)
    passive.settle()
    passive.take_memory()  # fills the window
    for number in range(2, 100):
        passive.core.receive(wire.encode(wire.Offer(number, 1000)), now=0.0)
        passive.settle()
        passive.take_memory()
        passive.core.receive(wire.encode(wire.Withdraw(number, "")), now=0.0)
        passive.settle()
    assert list(passive.core._incoming._grantable) == [1]


def test_no_more_of_a_message_is_granted_than_there_is_room_for_and_the_next_one_goes_on():
    active, passive = open_pair()
    for _ in range(2):
        active.send(message(10 * CHUNK))
    passive.read_wire(1 << 20)
    first, second = [offered.transfer for offered in passive.offered]
    passive.core.accept(first, 0.0, 1, CHUNK)
    passive.core.accept(second, 0.0)
    granted = [event for event in passive.core.next_events() if isinstance(event, events.ExposeChunk)]
    assert [event.length for event in granted if event.transfer == first] == [CHUNK]
    assert len(granted) == DEPTH


def test_a_chunk_is_no_longer_than_its_slot_not_even_the_last():
    active, passive = open_pair()
    active.send(message(3 * CHUNK + CHUNK // 2))
    passive.read_wire(1 << 20)
    passive.core.accept(passive.offered[0].transfer, 0.0, 1, 0, CHUNK)
    granted = [event for event in passive.core.next_events() if isinstance(event, events.ExposeChunk)]
    assert max(event.length for event in granted) == CHUNK
    assert len(granted) == DEPTH


# -- signs of life -----------------------------------------------------------------------------------------
