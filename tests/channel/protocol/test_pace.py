"""The protocol and time: what a peer may take how long for, and what shows that it is there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nvflare_rdma.channel import MAX_UNIT_BYTES
from nvflare_rdma.channel.controllers import make_controller
from nvflare_rdma.channel.protocol import wire
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.fabric.base import RemoteSlice
from tests.support.core_pair import LIMITS, make_pair, message, open_pair, run_to_end


def test_deadlines():
    active, _ = make_pair()
    active.settle()
    active.core.check(now=LIMITS.handshake_timeout)
    with pytest.raises(TransferError, match="did not finish the handshake in 30 s"):
        active.core.check(now=LIMITS.handshake_timeout + 1)
    active, _ = open_pair()
    active.send(message(5000))
    active.core.check(now=10 * LIMITS.stall_timeout)  # it waits for the peer's memory: that may take long
    active.core.receive(wire.encode(wire.Grant(1, 0, 1000, RemoteSlice(1, 0, 1000), 1, 0)), now=0.0)
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

    with pytest.raises(TransferError, match=r"is too slow: \d+ of 100000 bytes came, at less than 16384 bytes/s"):
        trickle()


def test_a_long_message_that_trickles_is_judged_while_it_comes():
    """Not when all of it would have to be there, which is hours later."""
    limits = replace(LIMITS, max_message_bytes=1 << 30)
    active, passive = open_pair(limits=limits)
    active.sources[active.core.submit(1 << 30, 0.0)] = b""
    active.settle()
    passive.read_wire(1 << 20)
    passive.take_memory()
    for now in (100.0, limits.stall_timeout):
        notification = next(iter(passive.exposed))
        passive.exposed.pop(notification)
        passive.core.landed(notification, 1000, now=now)
        passive.settle()
        passive.core.check(now)
    with pytest.raises(TransferError, match="is too slow: 2000 of 1073741824 bytes came"):
        passive.core.check(limits.stall_timeout + 1.0)


def test_a_peer_that_grants_and_lets_nothing_be_written_makes_no_progress():
    active, _ = open_pair()
    active.send(message(5000))
    for number in range(1, 5):
        grant = wire.Grant(1, (number - 1) * 1000, 1000, RemoteSlice(1, 0, 1000), number, 0)
        active.core.receive(wire.encode(grant), now=number * 40.0)
    active.core.check(now=40.0 + LIMITS.stall_timeout)
    with pytest.raises(TransferError, match="made no progress for 120 s"):
        active.core.check(now=41.0 + LIMITS.stall_timeout)


@pytest.mark.parametrize("staged", [False, True])
def test_what_the_sender_makes_in_its_own_memory_is_granted_in_chunks_that_fit_there(staged):
    limits, most = replace(LIMITS, max_message_bytes=1 << 30), MAX_UNIT_BYTES
    active, passive = open_pair(limits=limits, max_staged_bytes=most)
    passive.core.set_controller(make_controller("fixed", 4 * most, 4, 1 << 30))
    active.sources[active.core.submit(16 * most, 0.0, staged=staged)] = bytes(16 * most)
    active.settle()
    run_to_end(active, passive)
    assert passive.received == [bytes(16 * most)]
    assert passive.longest_granted == (most if staged else 8 * most)  # the last chunk is two in one


def test_more_than_fits_there_is_a_protocol_error():
    limits, most = replace(LIMITS, max_message_bytes=1 << 30), MAX_UNIT_BYTES
    active, _ = open_pair(limits=limits, max_staged_bytes=most)
    grant = wire.Grant(1, 0, 64 * most, RemoteSlice(1, 0, 64 * most), 1, 0)
    active.core.submit(64 * most, 0.0, staged=True)
    with pytest.raises(ProtocolError, match="a grant of 67108864 bytes for what is made here, 1048576 are the most"):
        active.core.receive(wire.encode(grant), now=0.0)


def test_rails_that_do_not_come_back_end_the_connection():
    active, passive = open_pair(rails=1)
    active.break_rail(0)
    active.tick(0.0)
    passive.read_wire(1 << 20)  # asks for new rails and offers some, but nobody dials
    for side in (active, passive):
        side.tick(LIMITS.stall_timeout)
        with pytest.raises(TransferError, match="no rail came up again in 120 s: broken by the test"):
            side.tick(1.0)


def test_a_sender_that_answers_grants_with_nothing_can_not_hold_memory_for_long():
    active, passive = open_pair()
    active.send(message(100_000))
    passive.read_wire(1 << 20)
    passive.take_memory()
    while passive.exposed:
        passive.core.landed(passive.exposed.popitem()[0], 0, now=0.0)
        passive.settle()
    with pytest.raises(TransferError, match="made no progress for 120 s: 0 of 100000 bytes came"):
        passive.core.check(now=LIMITS.stall_timeout + 1)


def test_a_message_that_waits_for_its_turn_has_no_deadline_yet():
    active, passive = open_pair()
    for size in (1 << 20, 5000):
        active.send(message(size))
    passive.read_wire(1 << 20)
    passive.take_memory()
    passive.take_memory()
    active.read_wire(1 << 20)
    passive.now = 100.0
    active.land(0)
    later = LIMITS.stall_timeout + 0.05  # the first has come fast enough for that, and nothing of the second
    passive.core.check(later)
    passive.now = active.now = later
    run_to_end(active, passive)
    assert sorted(passive.received) == sorted([message(1 << 20), message(5000)])


def test_a_peer_that_is_asked_answers_once_for_all_that_came():
    """A peer that asks without end and reads nothing makes no answers pile up."""
    active, passive = open_pair()
    passive.core.receive(wire.encode(wire.Ping()) * 1000, now=7.0)
    assert passive.core.data_to_send() == [wire.encode(wire.Pong())]
    assert passive.core.data_to_send() == []
    assert passive.core.heard_at == 7.0
    assert active.core.heard_at == 0.0


def test_no_more_than_one_answer_is_waited_for():
    active, passive = open_pair()
    for _ in range(2):
        for _ in range(3):
            active.core.ask()
        active.settle()
        assert list(passive.wire) == [wire.encode(wire.Ping())]
        active.now = passive.now = active.now + 1
        passive.read_wire(1 << 20)
        active.read_wire(1 << 20)
        assert active.core.heard_at == active.now  # and it may ask again
    with pytest.raises(ProtocolError, match="answers what it was not asked"):
        active.core.receive(wire.encode(wire.Pong()), now=0.0)


@pytest.mark.parametrize("what", [wire.Ping(), wire.Pong()])
def test_signs_of_life_are_for_open_connections(what):
    _, passive = make_pair()
    with pytest.raises(ProtocolError, match="TRAFFIC is not allowed in state GREETING"):
        passive.core.receive(wire.encode(what), now=0.0)
    active, _ = open_pair()
    active.core.receive(wire.encode(wire.Ping()), now=0.0)
    active.core.close()
    assert active.core.data_to_send() == [wire.encode(wire.Bye())]
