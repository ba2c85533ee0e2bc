"""The tcp fabric on real sockets."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import types

import pytest

from nvflare_rdma.errors import ConfigError, FabricError, ProtocolError
from nvflare_rdma.fabric import rail_count, tcp
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.rail_count import rails_for_round_trip
from nvflare_rdma.fabric.sockets import TcpTold, acknowledged
from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TcpFabric, congestion_controls, pack_header
from tests.support.recorder import Recorder
from tests.support.tcp_pair import DEADLINE, admitting
from tests.support.waiting import eventually


@contextlib.contextmanager
def endpoints(rails=2):
    listening = TcpFabric(rails)
    near_events, far_events = Recorder(), Recorder()
    with admitting(listening) as dial:
        far, offer = listening.offer(far_events)
        near = TcpFabric(rails, dial).connect(offer, near_events)
        near.grow(rails)
        assert {near_events.up.get(timeout=DEADLINE) for _ in range(2, rails)} == set(range(2, rails))
        try:
            yield near, near_events, far, far_events
        finally:
            near.close()
            far.close()


@pytest.mark.parametrize("size", [0, 1, 65_535, 3_000_001])
def test_a_write_lands_in_the_exposed_slice_and_nowhere_else(size):
    data = bytes(i & 0xFF for i in range(size))
    target = bytearray(b"\xaa" * (size + 20))
    with endpoints() as (near, near_events, far, far_events):
        assert near.rails == 2
        remote = far.register(memoryview(target)).expose(7, 10, size, 1)
        near.write(1, memoryview(data), remote, 7, 99)
        assert far_events.landings.get(timeout=DEADLINE) == (7, size, 99)
        assert near_events.writes.get(timeout=DEADLINE) == 7
    assert target == b"\xaa" * 10 + data + b"\xaa" * 10


def test_all_rails_of_a_peer_are_opened_within_one_deadline(monkeypatch):
    """A peer that takes nearly as long as it may for each of them."""
    clock = itertools.count(0.0, 6.0)  # seconds, of which each rail takes 6 at least
    now = [next(clock)]
    listening = TcpFabric(8)
    with admitting(listening) as dial:

        def slow() -> socket.socket:
            now[0] = next(clock)
            return dial()

        far, offer = listening.offer(Recorder())
        monkeypatch.setattr(tcp, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
        near = TcpFabric(8, slow).connect(offer, Recorder())
        assert near.rails == 1
        near.close()
        far.close()


def test_few_rails_are_opened_at_first_and_others_when_they_are_wanted():
    listening, near_events = TcpFabric(8), Recorder()
    with admitting(listening) as dial:
        far, offer = listening.offer(Recorder())
        near = TcpFabric(6, dial).connect(offer, near_events)
        assert near.rails == near.wanted() == 2  # there is no way to speak of to the other side
        far.grow(8)  # which has not dialled
        near.grow(4)
        near.grow(3)
        near.grow(100)
        assert {near_events.up.get(timeout=DEADLINE) for _ in range(4)} == {2, 3, 4, 5}
        assert near.rails == far.rails == 6  # the most of the side that has less
        assert all(end.has_joined(rail) == (rail < 6) for end in (near, far) for rail in range(8))
        assert near_events.up.empty()
        near.close()
        far.close()


def test_a_rail_that_can_not_be_opened_is_the_last_that_is_tried(caplog):
    listening, events = TcpFabric(8), Recorder()
    dialled = itertools.count()
    with admitting(listening) as dial, caplog.at_level("INFO"):

        def refusing() -> socket.socket:
            if next(dialled) >= 2:
                raise ConnectionRefusedError("one connection too many")
            return dial()

        far, offer = listening.offer(Recorder())
        near = TcpFabric(8, refusing).connect(offer, events)
        near.grow(3)
        text = "tcp rail 2 can't be opened, data goes over the others: one connection too many"
        eventually(lambda: text in caplog.messages, DEADLINE)
        near.grow(8)
        assert next(dialled) == 3
        assert near.wanted() == 2
        assert events.up.empty()
        near.close()
        far.close()


def test_no_more_rails_join_than_there_are_tickets():
    listening = TcpFabric(3)
    with admitting(listening) as dial:
        far, offer = listening.offer(Recorder())
        near = TcpFabric(64, dial).connect({"tickets": offer["tickets"] + [bytes(32)] * 5}, Recorder())
        near.grow(64)
        eventually(lambda: far.rails == near.rails == 3 and near._refused, DEADLINE)
        assert near.wanted() == 3
        near.close()
        far.close()


def test_rails_that_are_dialled_when_their_endpoint_is_closed_are_closed_too():
    listening, events, dialling, go_on = TcpFabric(3), Recorder(), threading.Event(), threading.Event()
    made = []
    with admitting(listening) as dial:

        def slow() -> socket.socket:
            if len(made) == 2:
                dialling.set()
                go_on.wait(DEADLINE)
            made.append(dial())
            return made[-1]

        far, offer = listening.offer(Recorder())
        near = TcpFabric(3, slow).connect(offer, events)
        near.grow(3)
        assert dialling.wait(DEADLINE)
        near.close()
        go_on.set()
        eventually(lambda: len(made) == 3 and made[2].fileno() < 0, DEADLINE)
        assert events.up.empty()
        far.close()


def test_tickets_for_later_do_not_expire(monkeypatch):
    monkeypatch.setattr(tcp, "TICKET_LIFETIME", -1.0)
    listening = TcpFabric(3)
    with admitting(listening) as dial:
        far, offer = listening.offer(Recorder())
        for number, answer in ((0, b"\x00"), (2, b"\x01")):
            with dial() as sock:
                sock.sendall(RAIL_MAGIC + offer["tickets"][number])
                assert sock.recv(1) == answer
        far.close()


@pytest.mark.parametrize(("milliseconds", "rails"), [(0, 2), (0.05, 2), (2, 2), (10, 5), (20, 9), (40, 18), (200, 86)])
def test_the_longer_the_path_the_more_rails_fill_it_soon(milliseconds, rails):
    assert rails_for_round_trip(milliseconds / 1000) == rails


def test_rails_become_more_while_packets_are_lost(monkeypatch):
    told = {}
    monkeypatch.setattr(rail_count, "tcp_told", lambda sock: told[sock])
    sockets = {0: "a", 1: "b"}

    def look(first: tuple[int, int], second: tuple[int, int]) -> bool:
        told.update(a=TcpTold(0.001, *first), b=TcpTold(0.001, *second))
        return watch.is_lossy(sockets)

    watch = rail_count.LossWatch()
    assert not look((10, 2), (10, 0))  # too few to tell
    assert look((1000, 4), (1000, 2))
    assert not look((9000, 4), (9000, 4))  # it is what came since
    assert not look((9000, 4), (9000, 4))
    assert look((10_000, 5), (10_000, 8))


def test_both_directions_and_many_writes_at_once():
    with endpoints(rails=3) as (near, near_events, far, far_events):
        buffers = {}
        for end, peer, name in ((near, far, 0), (far, near, 1)):
            buffers[name] = bytearray(100 * 5000)
            region = peer.register(memoryview(buffers[name]))
            for i in range(100):
                remote = region.expose(name * 1000 + i, i * 5000, 5000, i % 3)
                end.write(i % 3, memoryview(bytes([i]) * 5000), remote, name * 1000 + i, 0)
        for events in (near_events, far_events):
            assert len({events.landings.get(timeout=DEADLINE) for _ in range(100)}) == 100
    for buffer in buffers.values():
        assert buffer == b"".join(bytes([i]) * 5000 for i in range(100))


@pytest.mark.parametrize(
    ("remote", "notification"),
    [
        (RemoteSlice(1, 0, 10), 8),
        (RemoteSlice(2, 0, 10), 7),
        (RemoteSlice(1, 1, 10), 7),
        (RemoteSlice(1, 0, 11), 7),
        (RemoteSlice(1, 0, 10), 5),
    ],
    ids=["unknown slice", "other region", "other address", "too long", "over another rail"],
)
def test_a_write_outside_what_is_exposed_is_refused(remote, notification):
    target = bytearray(100)
    with endpoints() as (near, _, far, far_events):
        region = far.register(memoryview(target))
        assert region.expose(7, 0, 10, 0) == RemoteSlice(1, 0, 10)
        region.expose(5, 0, 10, 1)
        near.write(0, memoryview(b"x" * remote.length), remote, notification, 0)
        assert isinstance(far_events.failures.get(timeout=DEADLINE), ProtocolError)
    assert target == bytes(100)


def test_a_slice_takes_one_write():
    with endpoints(rails=1) as (near, _, far, far_events):
        remote = far.register(memoryview(bytearray(10))).expose(7, 0, 10, 0)
        near.write(0, memoryview(b"0123456789"), remote, 7, 0)
        near.write(0, memoryview(b"xxxxxxxxxx"), remote, 7, 0)
        assert far_events.landings.get(timeout=DEADLINE) == (7, 10, 0)
        assert "not exposed" in str(far_events.failures.get(timeout=DEADLINE))


@pytest.mark.parametrize("size", [0, 10, 200_000])
def test_what_is_written_to_a_revoked_slice_is_discarded_and_reported(size):
    target = bytearray(size)
    with endpoints(rails=1) as (near, _, far, far_events):
        region = far.register(memoryview(target))
        remote = region.expose(7, 0, size, 0)
        region.revoke(7)
        after = region.expose(8, 0, 0, 0)
        near.write(0, memoryview(b"x" * size), remote, 7, 0)
        near.write(0, memoryview(b""), after, 8, 0)
        assert far_events.landings.get(timeout=DEADLINE) == (7, size, 0)
        assert far_events.landings.get(timeout=DEADLINE) == (8, 0, 0)  # the rail is in step
    assert target == bytes(size)


def test_a_write_that_is_too_long_for_its_slice_is_this_sides_mistake():
    with endpoints() as (near, _, far, _):
        remote = far.register(memoryview(bytearray(10))).expose(7, 0, 10, 0)
        with pytest.raises(ValueError, match="11 bytes does not fit a slice of 10"):
            near.write(0, memoryview(bytes(11)), remote, 7, 0)


def test_a_broken_rail_is_reported_to_both_sides_and_the_others_go_on():
    with endpoints() as (near, near_events, far, far_events):
        near._sockets[1].shutdown(socket.SHUT_RDWR)
        for events in (near_events, far_events):
            rail, error = events.down.get(timeout=DEADLINE)
            assert rail == 1
            assert "tcp rail 1 broke" in str(error)
        region = far.register(memoryview(bytearray(10)))
        near.write(1, memoryview(b"x"), region.expose(6, 0, 1, 1), 6, 0)
        near.write(0, memoryview(b"x"), region.expose(7, 0, 1, 0), 7, 0)
        assert far_events.landings.get(timeout=DEADLINE) == (7, 1, 0)
        assert [near_events.writes.get(timeout=DEADLINE) for _ in range(2)] == [6, 7]
        region.revoke(6)
        assert not far.exposed


def test_a_rail_whose_thread_dies_of_anything_is_reported():
    class Broken(Recorder):
        def landed(self, notification, length, digest):
            if notification == 7:
                raise RuntimeError("a bug")
            super().landed(notification, length, digest)

    listening, near_events, far_events = TcpFabric(2), Recorder(), Broken()
    with admitting(listening) as dial:
        far, offer = listening.offer(far_events)
        near = TcpFabric(2, dial).connect(offer, near_events)
        region = far.register(memoryview(bytearray(10)))
        near.write(1, memoryview(b"x"), region.expose(7, 0, 1, 1), 7, 0)
        rail, error = far_events.down.get(timeout=DEADLINE)
        assert (rail, str(error)) == (1, "tcp rail 1 broke: RuntimeError('a bug')")
        assert near_events.down.get(timeout=DEADLINE)[0] == 1
        near.write(0, memoryview(b"x"), region.expose(8, 0, 1, 0), 8, 0)
        assert far_events.landings.get(timeout=DEADLINE) == (8, 1, 0)
        near.close()
        far.close()


def test_rails_in_use_or_idle_that_live_are_left_alone(monkeypatch):
    monkeypatch.setattr(tcp, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(tcp, "_PROOF_SECONDS", 0.0)
    with endpoints() as (near, near_events, far, far_events):
        region = far.register(memoryview(bytearray(10)))
        for number in range(1, 9):
            near.write(number % 2, memoryview(b"x"), region.expose(number, 0, 1, number % 2), number, 0)
            assert far_events.landings.get(timeout=DEADLINE) == (number, 1, 0)
            assert set(near._doubted) == {number % 2}
            eventually(lambda: acknowledged(near._sockets[number % 2]) > near._doubted[number % 2][2], DEADLINE)  # noqa: B023
            near.check()
            assert not near._doubted
        assert near_events.down.empty()


def test_a_rail_that_this_side_drops_is_reported_too():
    with endpoints() as (near, near_events, _, far_events):
        near.drop(0)
        near.drop(0)
        assert near_events.down.get(timeout=DEADLINE)[0] == far_events.down.get(timeout=DEADLINE)[0] == 0


def test_an_altered_header_breaks_the_rail_and_nothing_else():
    with endpoints() as (near, near_events, far, far_events):
        remote = far.register(memoryview(bytearray(10))).expose(7, 0, 10, 1)
        header = bytearray(pack_header(remote, 10, 7, 0))
        header[3] ^= 4
        near._sockets[1].sendall(header + b"0123456789")
        assert "a header was altered on the way" in str(far_events.down.get(timeout=DEADLINE)[1])
        assert near_events.down.get(timeout=DEADLINE)[0] == 1
        assert far_events.failures.empty()


def test_a_closed_endpoint_writes_nothing():
    with endpoints() as (near, near_events, far, _):
        remote = far.register(memoryview(bytearray(10))).expose(7, 0, 10, 0)
        near.close()
        near.close()
        near.write(0, memoryview(b"x"), remote, 7, 0)
        assert near_events.writes.get(timeout=DEADLINE) == 7


def test_both_ends_of_a_rail_use_the_congestion_control_that_was_asked_for():
    name = next(name for name in congestion_controls() if name != "cubic")
    listening = TcpFabric(1, congestion=name)
    with admitting(listening) as dial:
        far, offer = listening.offer(Recorder())
        near = TcpFabric(1, dial, name).connect(offer, Recorder())
        for end in (near, far):
            used = end._sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            assert used.rstrip(b"\0").decode() == name
        near.close()
        far.close()


def test_an_unknown_congestion_control_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"rdma_tcp_congestion='warp': .* Allowed: .*cubic"):
        TcpFabric(1, congestion="warp")
    assert "cubic" in congestion_controls()


def test_tickets_work_once_and_only_if_given_out():
    listening = TcpFabric(rails=1)
    with admitting(listening) as dial:
        endpoint, offer = listening.offer(Recorder())
        first = TcpFabric(1, dial).connect(offer, Recorder())
        with pytest.raises(FabricError, match="refused the rail's ticket"):
            TcpFabric(1, dial).connect(offer, Recorder())
        with pytest.raises(FabricError, match="refused the rail's ticket"):
            TcpFabric(1, dial).connect({"tickets": [bytes(32)]}, Recorder())
        first.close()
        endpoint.close()


def test_tickets_end_with_their_endpoint():
    listening = TcpFabric(rails=2)
    with admitting(listening) as dial:
        endpoint, offer = listening.offer(Recorder())
        endpoint.close()
        with pytest.raises(FabricError, match="refused the rail's ticket"):
            TcpFabric(1, dial).connect(offer, Recorder())
        endpoint, _ = listening.offer(Recorder())
        assert len(listening._tickets) == 2  # nothing is kept of the first
        endpoint.close()


@pytest.mark.parametrize(
    "offer", [{}, {"tickets": []}, {"tickets": [b"short"]}, {"tickets": [bytes(32)] * 65}, {"tickets": "x"}]
)
def test_a_malformed_offer_is_a_protocol_error(offer):
    with pytest.raises(ProtocolError, match="no list of rail tickets"):
        TcpFabric(1, lambda: pytest.fail("dialled")).connect(offer, Recorder())


def test_an_endpoint_whose_first_rail_was_never_opened_closes_the_others():
    listening = TcpFabric(2)
    with admitting(listening) as dial:
        endpoint, offer = listening.offer(Recorder())
        with dial() as sock:
            sock.sendall(RAIL_MAGIC + offer["tickets"][1])
            assert sock.recv(1) == b"\x01"
            endpoint.close()
            assert sock.recv(1) == b""
        assert not any(thread.is_alive() for thread in endpoint._threads)
