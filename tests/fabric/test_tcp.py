"""The tcp fabric on real sockets."""

from __future__ import annotations

import contextlib
import socket

import pytest
from tcp_pair import DEADLINE, Recorder, admitting

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.tcp import TcpFabric


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
        remote = far.register(memoryview(target)).expose(7, 10, size)
        near.write(memoryview(data), remote, 7)
        assert far_events.landings.get(timeout=DEADLINE) == (7, size)
        assert near_events.writes.get(timeout=DEADLINE) == 7
    assert target == b"\xaa" * 10 + data + b"\xaa" * 10


def test_both_directions_and_many_writes_at_once():
    with endpoints(rails=3) as (near, near_events, far, far_events):
        buffers = {}
        for end, peer, name in ((near, far, 0), (far, near, 1)):
            buffers[name] = bytearray(100 * 5000)
            region = peer.register(memoryview(buffers[name]))
            for i in range(100):
                remote = region.expose(name * 1000 + i, i * 5000, 5000)
                end.write(memoryview(bytes([i]) * 5000), remote, name * 1000 + i)
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
    ],
    ids=["unknown slice", "other region", "other address", "too long"],
)
def test_a_write_outside_what_is_exposed_is_refused(remote, notification):
    target = bytearray(100)
    with endpoints() as (near, _, far, far_events):
        assert far.register(memoryview(target)).expose(7, 0, 10) == RemoteSlice(1, 0, 10)
        near.write(memoryview(b"x" * remote.length), remote, notification)
        assert isinstance(far_events.failures.get(timeout=DEADLINE), ProtocolError)
    assert target == bytes(100)


def test_a_slice_takes_one_write():
    with endpoints(rails=1) as (near, _, far, far_events):
        remote = far.register(memoryview(bytearray(10))).expose(7, 0, 10)
        near.write(memoryview(b"0123456789"), remote, 7)
        near.write(memoryview(b"xxxxxxxxxx"), remote, 7)
        assert far_events.landings.get(timeout=DEADLINE) == (7, 10)
        assert "not exposed" in str(far_events.failures.get(timeout=DEADLINE))


def test_a_revoked_slice_takes_none():
    with endpoints() as (near, _, far, far_events):
        region = far.register(memoryview(bytearray(10)))
        remote = region.expose(7, 0, 10)
        region.revoke(7)
        near.write(memoryview(b"0123456789"), remote, 7)
        assert "not exposed" in str(far_events.failures.get(timeout=DEADLINE))


def test_a_broken_rail_is_reported_to_both_sides():
    with endpoints() as (near, near_events, _, far_events):
        near._sockets[1].shutdown(socket.SHUT_RDWR)
        assert "a tcp rail broke" in str(far_events.failures.get(timeout=DEADLINE))
        assert "a tcp rail broke" in str(near_events.failures.get(timeout=DEADLINE))


def test_a_closed_endpoint_refuses_writes():
    with endpoints() as (near, _, far, _):
        remote = far.register(memoryview(bytearray(10))).expose(7, 0, 10)
        near.close()
        near.close()
        with pytest.raises(FabricError, match="closed"):
            near.write(memoryview(b"x"), remote, 7)


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


@pytest.mark.parametrize(
    "offer", [{}, {"tickets": []}, {"tickets": [b"short"]}, {"tickets": [bytes(32)] * 65}, {"tickets": "x"}]
)
def test_a_malformed_offer_is_a_protocol_error(offer):
    with pytest.raises(ProtocolError, match="no list of rail tickets"):
        TcpFabric(1, lambda: pytest.fail("dialled")).connect(offer, Recorder())
