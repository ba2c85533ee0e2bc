"""The tcp fabric on real sockets."""

from __future__ import annotations

import contextlib
import itertools
import socket
import types

import pytest

from nvflare_rdma.errors import ConfigError, FabricError, ProtocolError
from nvflare_rdma.fabric import tcp
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.sockets import acknowledged
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
