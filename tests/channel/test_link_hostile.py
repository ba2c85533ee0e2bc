"""A real link against a peer that speaks the wire protocol by hand: whatever it says, nothing is left behind."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol import wire
from nvflare_rdma.channel.protocol.limits import ChannelLimits
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.errors import FabricError, RdmaError, TransferError
from nvflare_rdma.fabric import budget
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.budget import MemoryBudget, Reservation
from nvflare_rdma.fabric.tcp import TcpFabric
from tests.support.tcp_pair import DEADLINE, context
from tests.support.waiting import eventually

LIMITS = ChannelLimits(max_message_bytes=1 << 30, stall_timeout=20.0, handshake_timeout=20.0)
#: Where a deadline is what is looked at.
SHORT = replace(LIMITS, stall_timeout=1.0, handshake_timeout=1.0)
HELLO = wire.Hello({"tcp": ""}, 1 << 30, 64 * 1024, 64)


class Peer:
    """``link`` is passive and runs in a thread; `say` speaks to it."""

    def __init__(self, link_context) -> None:
        self.context = link_context
        near, self.sock = socket.socketpair()
        self.sock.settimeout(DEADLINE)
        self.parser = wire.Parser(1 << 20, 1 << 20)
        self.inbox: queue.Queue = queue.Queue()
        self.error: Exception | None = None
        self.link = Link(ControlStream(near), Role.PASSIVE, {"tcp": TcpFabric(1)}, link_context, self.inbox.put, "link")
        self.opened = threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.link.open()
        except (RdmaError, OSError) as error:
            self.error = error
            return
        finally:
            self.opened.set()
        self.link.run()

    def say(self, *messages: wire.Message | bytes) -> None:
        self.sock.sendall(b"".join(m if isinstance(m, bytes) else wire.encode(m) for m in messages))

    def hear(self) -> list[wire.Message]:
        return list(self.parser.feed(self.sock.recv(65536)))

    def greet(self) -> None:
        self.say(HELLO)
        self.greet_rails()

    def greet_rails(self) -> None:
        for _ in range(2):  # no rail can be opened: the control stream has to do
            while not any(isinstance(message, wire.Open) for message in self.hear()):
                pass
            self.say(wire.Rails(0, "test"))
        assert self.opened.wait(DEADLINE)
        assert self.error is None

    def end(self) -> None:
        """The link must end by itself now; nothing of it may stay."""
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), "the link did not end"
        self.link._writer.thread.join(DEADLINE)  # a send that waits ends when the stream is closed
        assert not self.link._writer.thread.is_alive(), "its writer did not end"
        assert self.context.budget.in_use == 0, "it keeps memory of the budget"
        assert not self.link._inbox._arriving
        assert not self.link._inbox._waiting


@contextlib.contextmanager
def peer(limits=LIMITS, budget=64 << 20):
    made = Peer(context(limits, budget))
    try:
        yield made
    finally:
        made.link.close(0.0)
        made.sock.close()
        made.thread.join(DEADLINE)


BIG = 200 << 20


def hold(budget: MemoryBudget, nbytes: int) -> Reservation:
    """Memory that somebody else has."""
    reservation = Reservation(budget, nbytes, "somebody else", lambda: None, pytest.fail, pytest.fail)
    reservation.request()
    return reservation


def test_an_offer_and_a_goodbye_in_one_piece_keep_no_memory():
    with peer() as it:
        it.greet()
        it.say(wire.Offer(1, BIG), wire.Bye(""))
        it.end()


def test_a_goodbye_while_memory_is_waited_for_keeps_none():
    with peer() as it:
        other = hold(it.context.budget, 1)
        it.greet()
        it.say(wire.Offer(1, BIG), wire.Inline(b"x"))
        assert it.inbox.get(timeout=DEADLINE) == b"x"  # so the offer has been read, and waits
        it.say(wire.Bye(""))
        it.thread.join(DEADLINE)
        other.release()
        it.end()


@pytest.mark.parametrize(
    "broken",
    [wire.Data(999, 0, b"x"), b"\x00\x00\x00\x01\xee", wire.Done(5), wire.Hello({}, 1, 1, 1)],
    ids=["data for no slice", "unknown message", "done of nothing", "second hello"],
)
@pytest.mark.parametrize("more", [b"", wire.Bye("")], ids=["", "and goodbye"])
def test_a_violation_in_the_middle_of_a_batch_keeps_nothing(broken, more):
    with peer() as it:
        it.greet()
        it.say(wire.Offer(1, BIG), wire.Inline(b"x"))
        it.inbox.get(timeout=DEADLINE)
        it.say(wire.Offer(2, BIG), broken, more)
        it.end()


@pytest.mark.parametrize("end", [wire.Bye("no"), wire.RailDown(0, "no"), b""], ids=str)
def test_the_log_has_nothing_of_a_guest_that_is_not_let_in(end, caplog):
    """The door has a line of it, and limits those."""
    caplog.set_level(logging.INFO, "nvflare_rdma")
    with peer() as it:
        it.say(wire.Hello({"tcp": "", "verbs": "A" * 10_000}, 1 << 30, 64 * 1024, 64), end)
        it.sock.shutdown(socket.SHUT_WR)
        it.end()
        assert it.error is not None
    assert not caplog.messages


def test_when_it_is_let_in_the_log_has_all_of_it(caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    with peer() as it:
        it.say(wire.Hello({"tcp": "", "verbs": "A" * 10_000}, 1 << 30, 64 * 1024, 64))
        it.greet_rails()
        it.say(wire.Inline(b"x"))
        it.inbox.get(timeout=DEADLINE)
    first, second, third = caplog.messages[:3]
    assert first.startswith("link: fabric tcp (verbs: ")
    assert second.startswith("link: fabric none")
    assert third.startswith("link: no rail, data goes over the control stream")
    assert max(map(len, caplog.messages)) < 1000


@pytest.mark.parametrize("broken", [b"\x00\x00\x00\x01\xee", wire.Offer(1, 100_000), wire.Bye("no")])
def test_a_violation_right_after_the_greeting_leaves_no_thread(broken):
    with peer() as it:
        it.say(HELLO, broken)
        it.end()
        assert isinstance(it.error, RdmaError)


def test_a_goodbye_ends_the_link_though_the_peer_keeps_its_socket_open():
    with peer() as it:
        it.greet()
        it.say(wire.Bye(""))
        it.end()
        with pytest.raises(TransferError):
            it.link.send(b"x", timeout=1)


def test_a_silent_peer_ends_the_handshake_at_its_deadline():
    with peer(SHORT) as it:
        it.end()
        assert "did not finish the handshake in 1 s" in str(it.error)


def test_a_stalled_transfer_ends_a_link_that_is_busy_otherwise():
    with peer(SHORT) as it:
        it.greet()
        it.say(wire.Offer(1, 100_000))
        deadline = time.monotonic() + DEADLINE
        with contextlib.suppress(OSError):
            while it.thread.is_alive() and time.monotonic() < deadline:
                it.say(wire.Inline(b"tick"))
                it.thread.join(0.1)
        it.end()
        assert "made no progress for 1 s" in str(it.link._failure)


def test_offers_that_are_refused_do_not_fill_the_log(monkeypatch, caplog):
    monkeypatch.setattr(budget, "MAX_WAITING_OF_SITE", 2)
    with peer() as it:
        other = hold(it.context.budget, 1)
        it.greet()
        it.say(*[wire.Offer(n, BIG) for n in range(1, 31)], wire.Inline(b"x"))
        assert it.inbox.get(timeout=DEADLINE) == b"x"
        refused = 0
        while refused < 28:
            refused += sum(isinstance(message, wire.Refuse) for message in it.hear())
        assert it.link.usable
        other.release()
    lines = [line for line in caplog.messages if "no memory for a message of" in line]
    assert len(lines) == 1
    assert "2 messages of link wait for memory already, which is the most for one site" in lines[0]


def test_who_withdraws_and_does_not_answer_a_grant_keeps_no_memory():
    with peer(SHORT) as it:
        it.greet()
        it.say(wire.Offer(1, BIG))
        while not any(isinstance(message, wire.Grant) for message in it.hear()):
            pass
        it.say(wire.Withdraw(1, "I have changed my mind"))
        it.end()
        assert "transfer 1 ended 1 s ago, and the peer has not answered all that was granted" in str(it.link._failure)


def test_a_peer_that_reads_nothing_ends_the_link():
    with peer(SHORT) as it:
        it.greet()
        with contextlib.suppress(RdmaError):
            for _ in range(200):
                it.link.send(bytes(60_000), timeout=DEADLINE)
        it.end()
        assert "has read nothing of the control stream for 1 s" in str(it.link._failure)


def test_waiting_for_memory_is_no_stall():
    with peer(SHORT) as it:
        other = hold(it.context.budget, it.context.budget.limit)
        it.greet()
        it.say(wire.Offer(1, 100_000))
        it.thread.join(2.5)
        assert it.thread.is_alive(), it.link._failure
        it.say(wire.Inline(b"still there"))
        assert it.inbox.get(timeout=DEADLINE) == b"still there"
        other.release()


def test_a_receiver_that_raises_does_not_leave_the_link_half_dead():
    with peer() as it:

        def broken(message) -> None:
            raise KeyError("bug of the application")

        it.link._deferred._deliver = broken
        it.greet()
        it.say(wire.Inline(b"x"))
        it.end()


def test_memory_that_can_not_be_had_refuses_the_message_and_gives_the_budget_back(monkeypatch):
    with peer() as it:

        def none_left(nbytes: int):
            raise MemoryError("no memory")

        monkeypatch.setattr(it.context.pool, "take", none_left)
        it.greet()
        it.say(wire.Offer(1, 100_000))
        (refusal,) = it.hear()
        assert refusal == wire.Refuse(1, "the receiver has no memory for 100000 bytes: no memory")
        assert it.context.budget.in_use == 0
        it.say(wire.Inline(b"it goes on"))
        assert it.inbox.get(timeout=DEADLINE) == b"it goes on"


def test_an_error_while_the_link_ends_does_not_keep_it_half_open(monkeypatch):
    with peer() as it:
        it.greet()
        it.say(wire.Offer(1, 100_000), wire.Inline(b"x"))
        it.inbox.get(timeout=DEADLINE)

        def broken(reason: str) -> None:
            raise KeyError("a bug in the core")

        monkeypatch.setattr(it.link._core, "close", broken)
        with pytest.raises(KeyError):
            it.link._shut_down("test")
        assert it.link._ended.is_set()
        assert not it.link._writer.thread.is_alive()
        assert not it.link._inbox._arriving
        it.link._deferred.run()
        assert it.context.budget.in_use == 0
        monkeypatch.undo()


def test_small_offers_are_charged_what_they_hold():
    """Slots come in steps of 64 KiB, whatever lands in them."""
    with peer(budget=8 * 128 * 1024) as it:
        it.greet()
        it.say(*(wire.Offer(i, 70_000) for i in range(1, 100)), wire.Inline(b"x"))
        it.inbox.get(timeout=DEADLINE)
        eventually(lambda: sum(map(len, it.context.budget._waiting.values())) == 91)
        assert len(it.link._inbox._arriving) == 8


messages = st.one_of(
    st.builds(wire.Inline, st.binary(max_size=50)),
    st.builds(wire.Offer, st.integers(0, 6), st.sampled_from([1, 65_537, 300_000, 1 << 29, 1 << 62])),
    st.builds(
        wire.Grant,
        st.integers(0, 3),
        st.sampled_from([0, 1 << 20]),
        st.sampled_from([0, 1, 100_000]),
        st.builds(RemoteSlice, st.integers(0, 2), st.just(0), st.sampled_from([0, 1, 100_000])),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    st.builds(wire.Data, st.integers(0, 3), st.just(0), st.sampled_from([b"", b"x", bytes(65_537)])),
    st.builds(wire.Withdraw, st.integers(0, 3), st.just("")),
    st.builds(wire.RailDown, st.integers(0, 3), st.just("")),
    st.builds(wire.RailUp, st.integers(0, 3)),
    st.builds(wire.MoreRails, st.integers(0, 65)),
    st.just(wire.Reopen("")),
    st.builds(wire.Done, st.integers(0, 3)),
    st.builds(wire.Refuse, st.integers(0, 3), st.just("")),
    st.builds(wire.Rails, st.integers(0, 3), st.just("")),
    st.just(HELLO),
    st.builds(wire.Open, st.just("tcp"), st.just({})),
    st.binary(min_size=1, max_size=20),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(messages, min_size=1, max_size=5), max_size=4), st.booleans())
def test_no_conversation_leaves_anything_behind(batches, greeted):
    with peer(SHORT) as it:
        if greeted:
            it.greet()
            with contextlib.suppress(RdmaError):
                it.link.send(bytes(100_000), timeout=DEADLINE)
        with contextlib.suppress(OSError):
            for batch in batches:
                it.say(*batch)
            it.sock.shutdown(socket.SHUT_WR)
        it.end()


def test_the_active_side_does_not_dial_twice():
    near, far = socket.socketpair()
    dialled: list[int] = []

    def dial() -> socket.socket:
        dialled.append(1)
        raise ConnectionRefusedError("test")

    link = Link(ControlStream(near), Role.ACTIVE, {"tcp": TcpFabric(1, dial)}, context(LIMITS), print, "link")
    offer = wire.Open("tcp", {"tickets": [bytes(32)]})
    far.sendall(b"".join(map(wire.encode, (HELLO, offer, offer))))
    with far, pytest.raises((RdmaError, FabricError), match="not allowed in state DIALLING"):
        link.open()
    assert not dialled
    assert not link._writer.thread.is_alive()


def test_grants_of_a_peer_that_reads_nothing_do_not_pile_up_chunks():
    """Without rails chunks are copied to the control stream: no faster than it takes them."""
    with peer(SHORT) as it:
        it.greet()
        it.link.send(bytes(32 << 20), timeout=DEADLINE)
        it.say(*(wire.Grant(1, i << 20, 1 << 20, RemoteSlice(1, 0, 1 << 20), i, 0) for i in range(32)))
        it.say(wire.Inline(b"x"))
        assert it.inbox.get(timeout=DEADLINE) == b"x"  # so the grants have been read
        it.thread.join(0.3)
        assert it.link._writer.unsent < 8
        it.end()
