"""What several writes that are read at once have to keep."""

from __future__ import annotations

import queue
import socket
import threading

from hypothesis import given
from hypothesis import strategies as st

from nvflare_rdma.errors import FabricError
from nvflare_rdma.fabric.shm.exposures import Exposures
from nvflare_rdma.fabric.shm.process_memory import address_of
from nvflare_rdma.fabric.shm.reads import LARGE_BYTES, Reads
from nvflare_rdma.fabric.shm.wire import WRITE, Message
from tests.support.recorder import Recorder
from tests.support.shm_liar import liar, message
from tests.support.shm_peer import DEADLINE, Peer, RemotePeer, digest, pattern
from tests.support.waiting import eventually


@st.composite
def orders(draw):
    """Sizes, and the order in which their reads end."""
    sizes = draw(st.lists(st.sampled_from([0, 1, LARGE_BYTES // 3, LARGE_BYTES]), max_size=60))
    return sizes, draw(st.permutations(range(len(sizes))))


@given(orders())
def test_reads_are_acknowledged_in_the_order_in_which_they_came(order):
    sizes, ends = order
    said, over, told = [], set(), 0

    def acknowledge(count, last):
        nonlocal told
        told += count
        assert last == told - 1
        assert over >= set(range(told))
        said.append(count)

    reads = Reads(acknowledge)
    begun = [reads.begin(number, nbytes) for number, nbytes in enumerate(sizes)]
    for number in ends:
        over.add(number)
        reads.end(begun[number])
        first = next((n for n in range(len(sizes)) if n not in over), len(sizes))
        # Whoever waits may be another thread, that does not know of this: a large one does not wait for company.
        assert all(nbytes < LARGE_BYTES for nbytes in sizes[told:first])
        assert first - told < 16
    reads.flush()
    assert told == len(sizes)


def test_a_revoked_slice_is_waited_for_and_others_are_not():
    exposures = Exposures()
    regions = [exposures.register(memoryview(bytearray(10))) for _ in range(2)]
    remotes = [region.expose(number, 0, 10, 0) for number, region in enumerate(regions)]
    copying, go_on, revoked = threading.Event(), threading.Event(), threading.Event()

    def read(address, target):
        copying.set()
        assert go_on.wait(DEADLINE)

    landed = threading.Event()

    def land():
        exposures.land(Message(WRITE, 0, remotes[0].key, remotes[0].address, 10), read)
        landed.set()

    def revoke():
        regions[0].revoke(0)
        revoked.set()

    threads = [threading.Thread(target=land), threading.Thread(target=revoke)]
    threads[0].start()
    assert copying.wait(DEADLINE)
    threads[1].start()
    exposures.land(Message(WRITE, 1, remotes[1].key, remotes[1].address, 10), lambda address, target: None)
    regions[1].close()  # neither waits for the copy
    assert not revoked.is_set()
    go_on.set()
    assert revoked.wait(DEADLINE)
    assert landed.wait(DEADLINE)
    for thread in threads:
        thread.join(DEADLINE)


class Slow(Recorder):
    """Takes its time with the landing of notification 1."""

    def __init__(self):
        super().__init__()
        self.in_it, self.go_on = threading.Event(), threading.Event()

    def landed(self, notification, length, digest):
        if notification == 1:
            self.in_it.set()
            assert self.go_on.wait(DEADLINE)
        super().landed(notification, length, digest)


class SlowPeer(Peer):
    def __init__(self):
        super().__init__()
        self.events = Slow()


def test_a_large_write_lands_while_another_is_worked_on():
    near, far = SlowPeer(), RemotePeer()
    try:
        far.connect(near.offer("direct"), "direct")
        for number in (1, 2, 3):
            near.buffer(number, 1 << 20)
            far.write(number, near.expose(number, number, 0, 1 << 20), number, 1 << 20)
        assert near.events.in_it.wait(DEADLINE)
        assert [near.landed()[0] for _ in range(2)] == [2, 3]
        assert sorted(far.written() for _ in range(3)) == [1, 2, 3]  # read, though not worked on to the end
        near.events.go_on.set()
        assert near.landed() == [1, 1 << 20, 1]
        assert [near.digest(number) for number in (1, 2, 3)] == [digest(pattern(n, 1 << 20)) for n in (1, 2, 3)]
    finally:
        near.events.go_on.set()
        far.end()
        near.close()


def test_a_rail_is_down_when_nobody_is_at_it_any_more():
    """After that nothing may land: what was worked on has to be over."""
    near, far = SlowPeer(), RemotePeer()
    try:
        far.connect(near.offer("direct"), "direct")
        near.buffer(1, 1 << 20)
        far.write(1, near.expose(1, 1, 0, 1 << 20), 1, 1 << 20)
        assert near.events.in_it.wait(DEADLINE)
        far.close()
        eventually(lambda: not near.endpoint._up, DEADLINE)  # the other receiver has seen it
        assert near.events.down.empty()
        near.events.go_on.set()
        assert near.landed()[0] == 1
        assert near.down().startswith(FabricError.__name__)
    finally:
        near.events.go_on.set()
        far.end()
        near.close()


class Closing(Recorder):
    """Closes its endpoint when something small lands, as a link does that finds an error then."""

    def __init__(self):
        super().__init__()
        self.endpoint = None
        self.left = queue.Queue()

    def landed(self, notification, length, digest):
        if length < LARGE_BYTES:
            self.endpoint.close()
            others = [thread for thread in self.endpoint._receivers if thread is not threading.current_thread()]
            self.left.put([thread.is_alive() for thread in others])
        super().landed(notification, length, digest)


def test_a_receiver_that_closes_the_rail_sees_the_other_one_end():
    near, far = Peer(), RemotePeer()
    near.events = Closing()
    try:
        far.connect(near.offer("direct"), "direct")
        near.events.endpoint = near.endpoint
        for number, size in ((1, 1 << 20), (2, 10)):
            near.buffer(number, size)
            far.write(number, near.expose(number, number, 0, size), number, size)
            near.landed()
        assert near.events.left.get(timeout=DEADLINE) == [False]
    finally:
        far.end()
        near.close()


def test_a_broken_rule_counts_though_the_peer_leaves_at_once():
    with liar("direct", "direct") as (sock, endpoint, events):
        region = endpoint.register(memoryview(bytearray(LARGE_BYTES)))
        remote, source = region.expose(1, 0, LARGE_BYTES, 0), bytearray(LARGE_BYTES)
        # So that there are two receivers; then one finds the end before the other lands what breaks the rule.
        sock.send(message(WRITE, 1, remote.key, remote.address, LARGE_BYTES, address_of(memoryview(source))))
        sock.recv(64)
        endpoint._share_work = lambda: eventually(lambda: endpoint._broken is not None, DEADLINE)
        sock.send(message(WRITE, 2, remote.key, remote.address, LARGE_BYTES, address_of(memoryview(source))))
        sock.shutdown(socket.SHUT_RDWR)
        assert "not exposed" in str(events.failures.get(timeout=DEADLINE))
        assert events.down.empty()


def test_a_single_large_write_is_acknowledged_while_the_other_receiver_waits():
    with liar("direct", "direct") as (sock, endpoint, events):
        source, target = bytearray(b"x" * LARGE_BYTES), bytearray(LARGE_BYTES)
        region = endpoint.register(memoryview(target))
        for number in range(4):
            remote = region.expose(number, 0, LARGE_BYTES, 0)
            address = address_of(memoryview(source))
            sock.send(message(WRITE, number, remote.key, remote.address, LARGE_BYTES, address))
            assert sock.recv(64)[4:8] == number.to_bytes(4, "little")
            assert events.landings.get(timeout=DEADLINE)[0] == number
