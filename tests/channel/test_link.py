"""Links on real sockets: clear and sealed, with rails and without, and what happens when things break."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import queue
import socket
import ssl
import threading
import time
import weakref

import pytest

from nvflare_rdma.channel.bodies import BufferSource, Source, Take
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol import ChannelLimits, events, wire
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.errors import (
    FabricError,
    FabricUnavailable,
    ProtocolError,
    RdmaError,
    SendTimeoutError,
    TransferError,
    UnrepresentableError,
)
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.budget import Reservation
from nvflare_rdma.fabric.tcp import TcpEndpoint, TcpFabric
from tests.support.bodies import MaskedSource, TestSink
from tests.support.certificates import Authority
from tests.support.recorder import Recorder
from tests.support.tcp_pair import DEADLINE, admitting, context, in_parallel, link_pair
from tests.support.waiting import eventually

SIZES = [0, 1, 65_536, 65_537, 256 * 1024 + 1, 5_000_003]


def pattern(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    authority = Authority(folder)
    contexts = []
    for role, purpose in (("client", ssl.Purpose.SERVER_AUTH), ("server", ssl.Purpose.CLIENT_AUTH)):
        files = authority.issue(role, role)
        made = ssl.create_default_context(purpose)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(files["ca_cert"])
        made.load_cert_chain(files[f"{role}_cert"], files[f"{role}_key"])
        contexts.append(made)
    return tuple(contexts)


def refuse_to_dial() -> socket.socket:
    raise ConnectionRefusedError("blocked by the firewall")


def exchange(pair) -> None:
    for sender, receiver in ((pair.active, pair.passive), (pair.passive, pair.active)):
        for size in SIZES:
            sender.send(pattern(size), timeout=DEADLINE)
        received = [pair.receive(receiver) for _ in SIZES]
        assert sorted(map(bytes, received), key=len) == [pattern(size) for size in SIZES]


def test_messages_of_all_sizes_both_ways_over_rails():
    with link_pair() as pair:
        assert pair.active.fabric == pair.passive.fabric == "tcp"
        exchange(pair)


def test_the_same_with_tls_and_sealed_chunks(tls):
    with link_pair(tls=tls) as pair:
        exchange(pair)


@pytest.mark.parametrize("secure", [False, True])
def test_without_rails_everything_goes_over_the_control_stream_and_says_why(secure, tls, caplog):
    with caplog.at_level(logging.WARNING), link_pair(tls=tls if secure else None, dial=refuse_to_dial) as pair:
        assert pair.active.fabric == pair.passive.fabric == "control"
        exchange(pair)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("no rail" in line and "blocked by the firewall" in line for line in lines) == 2


def test_both_directions_and_several_senders_at_once():
    with link_pair() as pair:
        sizes = [200_000 + i for i in range(16)]
        in_parallel(
            *(
                lambda n=n, link=link: link.send(pattern(n), DEADLINE)
                for n in sizes
                for link in (pair.active, pair.passive)
            )
        )
        for link in (pair.active, pair.passive):
            assert sorted(len(pair.receive(link)) for _ in sizes) == sizes


@pytest.mark.parametrize("secure", [False, True])
def test_what_messages_hold_stays_within_the_budget_and_is_given_back(secure, tls):
    receiving = context(budget=4 << 20)
    held, most, take = [0], [0], receiving.pool.take

    def counted(nbytes: int) -> memoryview:
        view = take(nbytes)
        held[0] += receiving.pool.cost(nbytes)
        most[0] = max(most[0], held[0])
        weakref.finalize(view.obj, lambda: held.__setitem__(0, held[0] - receiving.pool.cost(nbytes)))
        return view

    receiving.pool.take = counted
    with link_pair(passive_context=receiving, tls=tls if secure else None) as pair:
        pair.passive._deferred._deliver = lambda message: pair.inbox[pair.passive].put(bytes(message))
        sizes = [300_000] * 20 + [1_500_000]
        for size in sizes:
            pair.active.send(pattern(size), timeout=DEADLINE)
        assert sorted(len(pair.receive(pair.passive)) for _ in sizes) == sizes
    assert receiving.budget.in_use == 0
    # A delivered message is FLARE's; it may be gone a moment after the next one starts.
    assert 0 < most[0] <= (4 << 20) + 2 * receiving.pool.cost(1_500_000)


def test_a_received_message_stays_intact_while_it_is_held():
    """A slot is re-used only when its last view is gone."""
    with link_pair() as pair:
        held = []
        for i in range(10):
            pair.active.send(bytes([i]) * 100_000, timeout=DEADLINE)
            held.append(pair.receive(pair.passive)[10:20])
        assert [bytes(part) for part in held] == [bytes([i]) * 10 for i in range(10)]
        del held
        gc.collect()
        assert pair.passive_context.pool.idle_bytes > 0


def test_send_fails_with_the_reason_when_the_peer_takes_nothing():
    stuck = threading.Event()
    sending = context(window_bytes=1 << 20)
    with link_pair(active_context=sending) as pair:
        pair.passive._deferred._deliver = lambda message: stuck.wait(DEADLINE)  # the peer's application hangs

        def send_many() -> None:
            for _ in range(40):
                pair.active.send(bytes(1 << 20), timeout=0.2)

        with pytest.raises(SendTimeoutError, match=r"did not make room for \d+ bytes in time"):
            send_many()
        stuck.set()


def test_closing_lets_what_was_sent_arrive():
    with link_pair() as pair:
        pair.active.send(pattern(20_000_000), timeout=DEADLINE)
        pair.active.close()
        assert bytes(pair.receive(pair.passive)) == pattern(20_000_000)
        with pytest.raises(TransferError):
            pair.active.send(b"late", timeout=1)
        pair.join()
        with pytest.raises(TransferError, match="closed"):
            pair.passive.send(b"late", timeout=1)


def test_a_normal_end_logs_no_error(caplog):
    with caplog.at_level(logging.WARNING), link_pair() as pair:
        pair.active.send(pattern(300_000), timeout=DEADLINE)
        pair.receive(pair.passive)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_peer_that_ends_without_a_goodbye_leaves_a_line(caplog):
    with caplog.at_level(logging.WARNING), link_pair() as pair:
        pair.passive._stream._sock.shutdown(socket.SHUT_RDWR)  # as when its process is killed
        pair.runners[0].join(DEADLINE)
        assert "closed the connection without a goodbye" in pair.active._failure
    assert any(line.startswith("active: connection lost: the peer closed the") for line in caplog.messages)


def test_a_control_stream_that_can_not_be_written_is_said_so(caplog):
    with caplog.at_level(logging.WARNING), link_pair() as pair:
        pair.active._stream._sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TransferError):
            pair.active.send(pattern(1000), DEADLINE)
        pair.runners[0].join(DEADLINE)
        assert "closed the connection without a goodbye" in pair.active._failure
    assert "Errno 9" not in caplog.text


def test_both_sides_say_why_there_is_no_better_fabric(caplog):
    with caplog.at_level(logging.INFO), link_pair():
        pass
    assert "passive: fabric tcp (verbs: no device in this test)" in caplog.messages
    assert "active: data goes over tcp, 2 rails (verbs: no device in this test)" in caplog.messages


def test_an_active_side_says_that_the_peer_has_chosen_another_fabric_than_it_would(caplog):
    ours = context(order=("shm", "tcp"), unavailable={"shm": "", "tcp": ""}, host="here")
    theirs = context(order=("tcp", "shm"), unavailable={"shm": "", "tcp": ""}, host="here")
    with caplog.at_level(logging.INFO), link_pair(ours, theirs, other_fabrics=("shm",)):
        pass
    said = "active: data goes over tcp, 2 rails (the peer has chosen so, and its log says why; here it would be shm)"
    assert said in caplog.messages


@pytest.mark.parametrize("guarded_by", ["seal", "checksum"])
def test_a_chunk_that_was_altered_on_the_way_is_asked_for_again_alone(guarded_by, tls, caplog):
    size = 20 * 256 * 1024
    with link_pair(tls=tls if guarded_by == "seal" else None) as pair:
        endpoint, write = pair.active._rails.endpoint, pair.active._rails.endpoint.write
        written = []

        def flip_one_bit(rail, source, remote, notification, digest):
            damaged = bytearray(source)
            if len(written) == 7:
                damaged[len(damaged) // 2] ^= 1
            written.append(notification)
            write(rail, memoryview(damaged), remote, notification, digest)

        endpoint.write = flip_one_bit
        pair.active.send(pattern(size), timeout=DEADLINE).wait(DEADLINE)
        assert bytes(pair.receive(pair.passive)) == pattern(size)
        assert len(written) == 20  # the last chunk is two in one, and one was sent twice
    assert "arrived damaged; asking for it again" in caplog.text
    assert pair.passive_context.budget.in_use == 0


def test_who_sits_in_between_and_speaks_tls_with_both_ends_opens_no_chunk(tls, caplog):
    """It has certificates that both trust, passes every message on, and so knows both keys as they are sent."""
    client_tls, server_tls = tls
    ends = {"active": socket.socketpair(), "passive": socket.socketpair()}
    streams: dict[str, ControlStream] = {}

    def greet(name: str, sock: socket.socket, context: ssl.SSLContext, server_side: bool) -> None:
        streams[name] = ControlStream(sock, context, server_side)
        streams[name].handshake(DEADLINE)

    in_parallel(
        lambda: greet("active", ends["active"][0], client_tls, False),
        lambda: greet("its server", ends["active"][1], server_tls, True),
        lambda: greet("passive", ends["passive"][0], server_tls, True),
        lambda: greet("its client", ends["passive"][1], client_tls, False),
    )

    def pass_on(source: ControlStream, target: ControlStream) -> None:
        with contextlib.suppress(OSError):
            while (data := source.receive(DEADLINE)) is not None and data:
                target.send(target.protect([data]))
        target.close()

    between = [
        threading.Thread(target=pass_on, args=(streams[a], streams[b]), daemon=True)
        for a, b in (("its server", "its client"), ("its client", "its server"))
    ]
    for thread in between:
        thread.start()
    received, listening = [], TcpFabric(2)
    with admitting(listening) as dial:
        active = Link(streams["active"], Role.ACTIVE, {"tcp": TcpFabric(2, dial)}, context(), print, "active")
        passive = Link(streams["passive"], Role.PASSIVE, {"tcp": listening}, context(), received.append, "passive")
        in_parallel(active.open, passive.open)
        runners = [threading.Thread(target=link.run, daemon=True) for link in (active, passive)]
        for runner in runners:
            runner.start()
        with pytest.raises(TransferError):
            active.send(pattern(3_000_000), timeout=DEADLINE).wait(DEADLINE)
        for runner in runners:
            runner.join(DEADLINE)
            assert not runner.is_alive()
    assert received == []
    assert "chunks in a row arrived damaged" in caplog.text
    for thread in between:
        thread.join(DEADLINE)


def test_a_chunk_that_its_peer_does_not_take_breaks_its_rail_and_goes_over_another(caplog):
    sending = context(ChannelLimits(max_message_bytes=1 << 30, stall_timeout=2.0), depth=2)
    with link_pair(active_context=sending) as pair:
        endpoint, write, drop = pair.active._rails.endpoint, pair.active._rails.endpoint.write, threading.Event()

        def write_or_wait(rail, *chunk):
            if rail == 0:  # as on a connection that its peer does not read, or reads byte by byte
                assert drop.wait(DEADLINE)
            write(rail, *chunk)

        def dropped(rail):
            TcpEndpoint.drop(endpoint, rail)
            drop.set()

        endpoint.write, endpoint.drop = write_or_wait, dropped
        first = pair.active.send(pattern(3_000_000), timeout=DEADLINE)
        while not drop.is_set():  # so that the other rail is never idle: the link makes progress
            pair.active.send(pattern(100_000), timeout=DEADLINE).wait(DEADLINE)
        first.wait(DEADLINE)
        received = [bytes(pair.receive(pair.passive)) for _ in range(2)]
        assert pattern(3_000_000) in received or pattern(100_000) in received
        assert pair.active.usable
    assert "active: a chunk takes more than 1 s on rail 0, which is broken off" in caplog.text


def test_without_the_checksum_an_altered_chunk_is_not_noticed():
    """What `rdma_integrity=off` means: so that the test above proves the checksum."""
    off = [context(integrity="off") for _ in range(2)]
    with link_pair(*off) as pair:
        write = pair.active._rails.endpoint.write

        def flip_one_bit(rail, source, remote, notification, digest):
            write(rail, memoryview(b"x" + bytes(source[1:])), remote, notification, digest)

        pair.active._rails.endpoint.write = flip_one_bit
        pair.active.send(bytes(100_000), timeout=DEADLINE)
        assert pair.receive(pair.passive)[:2] == b"x\0"


@pytest.mark.parametrize("guarded_by", ["seal", "checksum"])
def test_what_is_on_its_way_when_a_message_is_refused_is_no_damage(guarded_by, tls, caplog):
    receiving = context(chunk_bytes=64 * 1024, depth=64)
    with link_pair(context(window_bytes=1 << 30), receiving, tls if guarded_by == "seal" else None) as pair:
        for _ in range(5):
            sending = pair.active.send(bytes(256 << 20), timeout=DEADLINE)
            incoming = eventually(lambda: [t for t, (landed, _) in pair.passive.incoming().items() if landed])
            pair.passive.refuse(incoming[0], "disk full")
            with pytest.raises(TransferError, match="disk full"):
                sending.wait(DEADLINE)
        pair.active.send(pattern(300_000), timeout=DEADLINE).wait(DEADLINE)
        assert bytes(pair.receive(pair.passive)) == pattern(300_000)
    assert "damaged" not in caplog.text


def test_giving_up_a_message_ends_it_on_both_sides_and_harms_no_other():
    receiving = context(chunk_bytes=64 * 1024, depth=1)
    with link_pair(context(window_bytes=1 << 30), receiving) as pair:
        first = pair.active.send(bytes(64 << 20), timeout=DEADLINE)
        second = pair.active.send(pattern(300_000), timeout=DEADLINE)
        pair.active.withdraw(first, "changed its mind")
        with pytest.raises(TransferError, match="changed its mind"):
            first.wait(DEADLINE)
        second.wait(DEADLINE)
        assert bytes(pair.receive(pair.passive)) == pattern(300_000)
        assert pair.passive.incoming() == {}
        third = pair.active.send(bytes(64 << 20), timeout=DEADLINE)
        incoming = eventually(pair.passive.incoming)
        pair.passive.refuse(next(iter(incoming)), "disk full")
        with pytest.raises(TransferError, match="disk full"):
            third.wait(DEADLINE)
        pair.active.send(pattern(300_001), timeout=DEADLINE).wait(DEADLINE)
        assert bytes(pair.receive(pair.passive)) == pattern(300_001)
    assert receiving.budget.in_use == 0


def test_a_peer_that_breaks_the_protocol_is_disconnected_and_told_why(caplog):
    with link_pair() as pair:
        pair.active._stream.send(b"\x00\x00\x00\x01\xee")
        pair.join()
    assert "passive: disconnected, the peer broke the protocol: control message of unknown type 238" in caplog.text
    assert "active: the peer disconnected: control message of unknown type 238" in caplog.text


def test_no_common_fabric_is_an_error_on_both_sides_that_names_the_setting():
    only_verbs = context(order=("verbs",))
    with pytest.raises(RdmaError, match="rdma_fabrics=verbs"), link_pair(only_verbs, only_verbs):
        pass


def test_a_chunk_of_rails_that_are_replaced_is_not_sent_as_the_new_ones_would(tls):
    """Rails over the control stream need no seal; the tcp rail that is about to be closed does."""
    holding = context(budget=1 << 20)
    with link_pair(active_context=holding, tls=tls) as pair:
        everything = Reservation(holding.budget, 1 << 20, "somebody else", lambda: None, pytest.fail, pytest.fail)
        everything.request()  # so that nothing is granted
        link, secret = pair.passive, pattern(100_000)
        link.send(secret, timeout=DEADLINE)
        rails, written = link._rails, []
        rails.endpoint.write = lambda rail, source, *_: written.append(bytes(source))
        link._opener._chooser._failures["tcp"] = 2
        chunk = events.WriteChunk(1, 0, 65_536, RemoteSlice(1, 0, 65_552), 1, 0)
        with link._lock:
            make = link._outbox.make_chunk(rails, chunk)
            writer = threading.Thread(target=rails.write, args=(chunk, make), daemon=True)
            writer.start()  # and waits for the lock
            threading.Event().wait(0.05)
            link._core.receive(wire.encode(wire.Reopen("test")), time.monotonic())
            link._pump_locked()
            assert link.fabric == "control"
        writer.join(DEADLINE)
        assert written in ([], [b""]), "a chunk went out in clear"
        everything.release()


@pytest.mark.parametrize("ended_by", ["close", "a fabric"])
def test_a_link_that_ends_while_it_dials_closes_the_rails_that_it_opens(ended_by):
    """A peer can have it so: by a bad header on its first rail while the second is dialled."""
    listening = TcpFabric(2)
    with admitting(listening) as dial:
        events_there = Recorder()
        endpoint, offer = listening.offer(events_there)
        near, far = socket.socketpair()

        def dial_and_end() -> socket.socket:
            if dialled:
                if ended_by == "close":
                    link.close(0.0)
                else:
                    link.failed(ProtocolError("the peer wrote where nothing is exposed"))
            dialled.append(dial())
            return dialled[-1]

        dialled: list[socket.socket] = []
        link = Link(ControlStream(near), Role.ACTIVE, {"tcp": TcpFabric(2, dial_and_end)}, context(), print, "link")
        hello = wire.Hello({"tcp": ""}, 1 << 30, 64 * 1024, 64)
        far.sendall(wire.encode(hello) + wire.encode(wire.Open("tcp", offer)))
        with far, pytest.raises((RdmaError, OSError)):
            link.open()
        assert len(dialled) == 2
        for _ in dialled:
            events_there.down.get(timeout=DEADLINE)
        assert not [thread for thread in threading.enumerate() if thread.name in ("rdma-rail-0", "rdma-rail-1")]
        endpoint.close()


def open_in_vain(link: Link) -> None:
    with pytest.raises(RdmaError):
        link.open()


def test_a_fabric_that_can_not_even_be_offered_is_passed_over(caplog):
    class OutOfDescriptors(TcpFabric):
        name = "shm"

        def offer(self, handler):
            raise FabricError("can't listen: too many open files")

    near, far = socket.socketpair()
    both = context(order=("shm", "tcp"), unavailable={"shm": "", "tcp": ""}, host="here")
    fabrics = {"shm": OutOfDescriptors(1), "tcp": TcpFabric(1)}
    link = Link(ControlStream(near), Role.PASSIVE, fabrics, both, print, "link")
    far.sendall(wire.encode(wire.Hello({"shm": "", "tcp": ""}, 1 << 30, 64 * 1024, 64, host="here")))
    far.settimeout(DEADLINE)
    opening = threading.Thread(target=open_in_vain, args=(link,), daemon=True)
    opening.start()
    parser, heard = wire.Parser(1, 1), []
    while not heard or not isinstance(heard[-1], wire.Open):
        data = far.recv(65536)
        assert data, link._failure
        heard += parser.feed(data)
    assert heard[-1].fabric == "tcp"
    assert "shm: can't listen: too many open files" in link._opener.passed_over
    far.close()
    opening.join(DEADLINE)


def test_the_control_stream_is_no_way_out_where_the_setting_leaves_tcp_out():
    """Also if the peer's setting does not: `rdma_fabrics=verbs` means verbs or an error."""
    near, far = socket.socketpair()
    only_verbs = context(order=("verbs",), unavailable={"verbs": ""})
    link = Link(ControlStream(near), Role.ACTIVE, {"verbs": TcpFabric(1)}, only_verbs, print, "link")
    far.sendall(wire.encode(wire.Hello({"verbs": "", "tcp": ""}, 1 << 30, 64 * 1024, 64)))
    far.sendall(wire.encode(wire.Open("", {})))
    with far, pytest.raises(FabricUnavailable, match="rdma_fabrics=verbs"):
        link.open()


def test_a_message_that_is_given_up_while_it_is_written_arrives_as_it_was_or_not_at_all():
    off = [context(integrity="off") for _ in range(2)]
    with link_pair(*off) as pair:
        reading, go_on, blocked, busy = (threading.Event() for _ in range(4))
        write = pair.active._rails.endpoint.write

        def late(*arguments):
            reading.set()
            go_on.wait(DEADLINE)
            write(*arguments)

        def deliver(message):
            if bytes(message) == b"busy":
                blocked.set()
                busy.wait(DEADLINE)  # so that the passive side reads no WITHDRAW
            else:
                pair.inbox[pair.passive].put(bytes(message))

        pair.passive._deferred._deliver = deliver
        pair.active._rails.endpoint.write = late
        source = bytearray(b"a" * 100_000)
        sending = pair.active.send(source, timeout=DEADLINE)
        assert reading.wait(DEADLINE)
        pair.active.send(b"busy", timeout=DEADLINE)
        assert blocked.wait(DEADLINE)
        pair.active.withdraw(sending, "changed its mind")
        try:
            with pytest.raises(TransferError):
                sending.wait(0.5)
            source[:] = b"b" * 100_000  # `wait` has returned: it is the sender's again
        finally:
            go_on.set()
        try:
            assert pair.inbox[pair.passive].get(timeout=1.0) == b"a" * 100_000
        except queue.Empty:
            pass
        finally:
            busy.set()


def test_a_message_is_not_sent_before_the_writes_over_old_rails_have_ended():
    with link_pair() as pair:
        reading, go_on = threading.Event(), threading.Event()
        write = pair.active._rails.endpoint.write
        old = pair.active._rails.endpoint

        def late(*arguments):
            if not reading.is_set():
                reading.set()
                go_on.wait(DEADLINE)
            write(*arguments)

        old.write = late
        sending = pair.active.send(pattern(600_000), timeout=DEADLINE)
        assert reading.wait(DEADLINE)
        for rail in range(2):
            old._sockets[rail].shutdown(socket.SHUT_RDWR)
        try:
            with pytest.raises(SendTimeoutError):  # a write still reads the source
                sending.wait(2.0)
        finally:
            go_on.set()
        sending.wait(DEADLINE)


def test_inline_messages_are_delivered_in_order():
    with link_pair() as pair:
        received, first = [], threading.Event()

        def deliver(message):
            if bytes(message) == b"1":
                first.wait(1.0)  # the thread that took it is slow
            received.append(bytes(message))

        link = pair.passive
        link._deferred._deliver = deliver
        with link._lock:
            link._handle_locked(events.InlineReceived(b"1"))  # by the reader, which has not come to it yet
        thief = threading.Thread(target=link._deferred.run, daemon=True)  # a rail's thread, after a landing
        thief.start()
        threading.Event().wait(0.1)
        pair.active.send(b"2", timeout=DEADLINE)
        pair.active.send(b"3", timeout=DEADLINE)
        threading.Event().wait(0.2)
        first.set()
        thief.join(DEADLINE)
        eventually(lambda: len(received) == 3)
        assert received == [b"1", b"2", b"3"]


class Unreadable(Source):
    nbytes = 5 << 20
    ready = False

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        if offset >= 2 << 20:
            raise self._error
        return take(length)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), UnrepresentableError("it can't carry NaN")])
def test_a_source_that_can_not_be_read_fails_its_message_and_no_other(secure, tls, error):
    sinks = {1: TestSink(5 << 20, unit=1), 2: TestSink(3 << 20)}
    with link_pair(tls=tls if secure else None, sinks=sinks) as pair:
        broken = pair.active.offer(Unreadable(error), 1)
        with pytest.raises(TransferError, match=f"can't read it: .*{error.args[-1]}"):
            broken.wait(DEADLINE)
        assert sinks[1].ended.wait(DEADLINE)
        assert str(error.args[-1]) in sinks[1].reason
        pair.active.offer(BufferSource(memoryview(bytes(3 << 20))), 2).wait(DEADLINE)
        assert sinks[2].ended.wait(DEADLINE)
        assert sinks[2].reason == ""
        eventually(lambda: not pair.passive_context.budget.in_use)


def test_a_message_is_done_when_no_thread_consumes_a_chunk_of_it_any_more():
    """A rail breaks while its chunk is consumed, and the chunk comes again over the other."""
    stuck, go_on = threading.Event(), threading.Event()

    class SlowSink(TestSink):
        stuck_at = -1

        def put(self, offset: int, chunk: memoryview) -> None:
            if not stuck.is_set():
                self.stuck_at = offset
                stuck.set()
                assert go_on.wait(DEADLINE)
            super().put(offset, chunk)

    sink = SlowSink(3 << 20, unit=1)
    with link_pair(sinks={1: sink}) as pair:
        sending = pair.active.offer(MaskedSource(memoryview(pattern(3 << 20)), 1), 1)
        assert stuck.wait(DEADLINE)
        with pair.passive._lock:  # other chunks land meanwhile
            exposures = pair.passive._core._incoming._exposures.values()
            (rail,) = {exposure.rail for exposure in exposures if exposure.offset == sink.stuck_at}
        pair.passive.rail_down(pair.passive._rails, rail, FabricError("it broke"))
        sending.wait(DEADLINE)
        assert not sink.ended.is_set()
        assert pair.passive_context.budget.in_use
        go_on.set()
        assert sink.ended.wait(DEADLINE)
        assert (sink.reason, bytes(sink.memory)) == ("", pattern(3 << 20))


@pytest.mark.parametrize(("error", "ends"), [(MemoryError("no room"), False), (RuntimeError("a bug"), True)])
def test_a_sink_that_fails_leaves_nothing_of_the_budget_taken(error, ends):
    class BrokenSink(TestSink):
        def put(self, offset: int, chunk: memoryview) -> None:
            raise error

    sink = BrokenSink(3 << 20, unit=1)
    with link_pair(sinks={1: sink}) as pair:
        sending = pair.active.offer(BufferSource(memoryview(pattern(3 << 20))), 1)
        with pytest.raises(TransferError):
            sending.wait(DEADLINE)
        assert sink.ended.wait(DEADLINE)
        eventually(lambda: not pair.passive_context.budget.in_use)
        assert pair.passive.usable is not ends
