"""The shm fabric between this process and a second one."""

from __future__ import annotations

import contextlib
import gc
import os
import threading

import pytest

from tests.support.shm_peer import Peer, RemotePeer, digest, pattern

DIRECT, MEMFD = ("direct",), ("memfd",)
# How this process receives, and how the other one does.
BOTH_WAYS = pytest.mark.parametrize(
    ("near_paths", "far_paths"),
    [(DIRECT, DIRECT), (MEMFD, MEMFD), (DIRECT, MEMFD), (MEMFD, DIRECT)],
    ids=["direct", "memfd", "direct-memfd", "memfd-direct"],
)
EACH_PATH = pytest.mark.parametrize("paths", [DIRECT, MEMFD], ids=["direct", "memfd"])
MIB = 1 << 20


@contextlib.contextmanager
def pair(near_paths=DIRECT, far_paths=DIRECT):
    near, far = Peer(), RemotePeer()
    try:
        offer = near.offer(*near_paths)
        assert far.connect(offer, *far_paths) == {"receive": far_paths[0], "send": near_paths[0]}
        assert near.paths() == {"receive": near_paths[0], "send": far_paths[0]}
        assert near.endpoint.rails == 1
        yield near, far
    finally:
        far.end()
        near.close()


def descriptors() -> set[tuple[str, str]]:
    """This process's: the number of each, and what it is."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # as that of the listing
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def threads() -> set[threading.Thread]:
    """The fabric's of this process."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("rdma-shm")}


@EACH_PATH
@pytest.mark.parametrize("allocate", [True, False], ids=["allocated", "other memory"])
def test_a_write_lands_in_the_exposed_slice_and_nowhere_else(paths, allocate):
    with pair(paths, paths) as (near, far):
        for number, size in enumerate([0, 1, 777, 65_535, 65_536, 65_537, 40 * MIB + 1]):
            for receiver, sender in ((near, far), (far, near)):
                receiver.buffer(number, size + 20, allocate)
                remote = receiver.expose(number, 7, 10, size)
                sender.write(7, remote, number, size)
                assert receiver.landed() == [7, size, number]
                assert sender.written() == 7
                assert receiver.digest(number) == digest(b"\xaa" * 10 + pattern(number, size) + b"\xaa" * 10)
                receiver.free(number)
        assert near.unread() == far.unread() == [0, 0, 0, 0]


@BOTH_WAYS
def test_both_directions_at_once(near_paths, far_paths):
    count, size = 64, MIB + 1
    with pair(near_paths, far_paths) as (near, far):
        slices = []
        for peer, base in ((near, 1000), (far, 0)):
            peer.buffer(1, count * size)
            slices.append([peer.expose(1, base + i, i * size, size) for i in range(count)])
        far.start("exchange_chunks", count, 1, slices[0], 1000, size)
        assert near.exchange_chunks(count, 1, slices[1], 0, size) == [
            digest(pattern(1000 + i, size)) for i in range(count)
        ]
        assert far.result() == [digest(pattern(i, size)) for i in range(count)]


@BOTH_WAYS
def test_a_thousand_writes_wait_in_full_sockets_without_a_deadlock(near_paths, far_paths):
    """More messages than a socket holds, in both directions, before either side takes a landing."""
    count = 1024
    with pair(near_paths, far_paths) as (near, far):
        slices = []
        for peer, base in ((near, 5000), (far, 0)):
            peer.buffer(1, count * 10)
            slices.append([peer.expose(1, base + i, i * 10, 10) for i in range(count)])
        far.start("exchange_chunks", count, 1, slices[0], 5000, 10)
        near.exchange_chunks(count, 1, slices[1], 0, 10)
        far.result()
        assert near.digest(1) == digest(b"".join(pattern(5000 + i, 10) for i in range(count)))
        assert far.digest(1) == digest(b"".join(pattern(i, 10) for i in range(count)))


@EACH_PATH
@pytest.mark.parametrize("allocate", [True, False], ids=["allocated", "other memory"])
def test_a_thousand_messages_leave_no_descriptors_or_mappings(paths, allocate):
    with pair(paths, paths) as (near, far):

        def messages(count):
            for i in range(count):
                size = (i % 7 + 1) * 100_000
                near.buffer(1, size, allocate)
                far.write(i, near.expose(1, i, 0, size), i, size)
                assert near.landed() == [i, size, i]
                assert far.written() == i
                near.free(1)
            return near.counts(), far.counts()

        empty = near.counts(), far.counts()
        before = messages(50)
        after = messages(1000)
        for side in (0, 1):
            assert after[side][0] == before[side][0] == empty[side][0]
            assert after[side][1] <= before[side][1]


@BOTH_WAYS
def test_connections_that_come_and_go_leave_no_descriptors_mappings_or_threads(near_paths, far_paths):
    gc.collect()
    gc.disable()
    try:
        with RemotePeer() as far:
            counts, others = set(), (descriptors(), threads())  # those that tests before have left may end at any time
            for _ in range(20):
                near = Peer()
                far.connect(near.offer(*near_paths), *far_paths)
                near.buffer(1, 100)
                far.write(7, near.expose(1, 7, 0, 100), 1, 100)
                near.landed()
                near.free(1)
                far.close()
                near.down()
                near.close()
                counts.add((len(descriptors() - others[0]), near.counts()[1], len(threads() - others[1])))
                del near
            assert len(counts) == 1
    finally:
        gc.enable()


def test_slots_that_are_too_many_are_unmapped_on_both_sides():
    with pair(MEMFD, MEMFD) as (near, far):
        for name in range(40):  # 160 MiB at once: more than is kept
            near.buffer(name, 4 * MIB)
            far.write(name, near.expose(name, name, 0, 4 * MIB), name, 4 * MIB)
            near.landed()
            far.written()
        assert near.counts()[1] == far.counts()[1] == 40
        for name in range(40):
            near.free(name)
        # The answer to a later write comes after what the receiving threads did about the slots.
        for name in range(2):
            near.buffer(name, 10)
            far.write(name, near.expose(name, name, 0, 10), 1, 10)
            near.landed()
        assert near.counts()[1] <= 16 + 2
        assert far.counts()[1] <= 16 + 2


@EACH_PATH
def test_a_revoked_slice_takes_no_bytes_and_still_reports_the_answer(paths):
    with pair(paths, paths) as (near, far):
        near.buffer(1, 10, allocate=False)
        near.buffer(2, 10, allocate=False)
        first, second = near.expose(1, 7, 0, 10), near.expose(2, 8, 0, 10)
        near.revoke(1, 7)
        near.regions[2].close()
        far.write(7, first, 3, 10)
        far.write(8, second, 3, 10)
        assert [near.landed(), near.landed()] == [[7, 10, 3], [8, 10, 3]]
        assert [far.written(), far.written()] == [7, 8]
        assert near.digest(1) == near.digest(2) == digest(b"\xaa" * 10)
        assert near.unread() == far.unread() == [0, 0, 0, 0]


def test_a_revoked_slot_is_recycled_only_when_the_peer_has_answered():
    with pair(MEMFD, MEMFD) as (near, far):
        near.buffer(1, 100)
        late = near.expose(1, 7, 0, 100)
        near.revoke(1, 7)
        near.free(1)
        near.buffer(2, 100)
        other = near.expose(2, 8, 0, 100)
        assert other[0] != late[0], "the peer may still write into the revoked slot"
        far.write(7, late, 1, 100)
        assert near.landed() == [7, 100, 1]
        assert near.digest(2) == digest(b"\xaa" * 100)
        near.buffer(3, 100)
        assert near.expose(3, 9, 0, 100)[0] == late[0], "a slot that is answered and unused was not recycled"


def test_an_empty_write_answers_an_exposure():
    for paths in (DIRECT, MEMFD):
        with pair(paths, paths) as (near, far):
            near.buffer(1, 100)
            far.write(7, near.expose(1, 7, 0, 100), 5, 0)
            assert near.landed() == [7, 0, 5]
            assert far.written() == 7
            assert near.digest(1) == digest(b"\xaa" * 100)


@EACH_PATH
@pytest.mark.parametrize(
    ("key", "address", "length", "notification"),
    [(0, 0, 0, 8), (1, 0, 0, 7), (0, 1, 0, 7), (0, 0, 1, 7)],
    ids=["unknown slice", "other key", "other address", "too long"],
)
def test_a_write_outside_what_is_exposed_is_refused(paths, key, address, length, notification):
    with pair(paths, paths) as (near, far):
        near.buffer(0, 1000)
        near.buffer(1, 200_000)  # makes another key exist
        near.expose(1, 6, 0, 10)
        right = near.expose(0, 7, 0, 10)
        wrong = [right[0] + key, right[1] + address, right[2] + length]
        far.write(notification, wrong, 1, wrong[2])
        assert "ProtocolError" in near.failed()
        assert "broke" in far.down()
        assert far.written() == notification
        if paths == DIRECT:  # a writer of shared memory can't be kept from writing, only be told apart
            assert near.digest(0) == digest(b"\xaa" * 1000)


@EACH_PATH
def test_a_slice_takes_one_write(paths):
    with pair(paths, paths) as (near, far):
        near.buffer(1, 10)
        remote = near.expose(1, 7, 0, 10)
        far.write(7, remote, 1, 10)
        far.write(7, remote, 2, 10)
        assert near.landed() == [7, 10, 1]
        assert "not exposed" in near.failed()
        assert [far.written(), far.written()] == [7, 7]


def test_a_source_larger_than_its_slice_and_a_second_rail_are_refused():
    with pair() as (near, far):
        far.buffer(1, 10)
        remote = far.expose(1, 7, 0, 10)
        with pytest.raises(ValueError, match="does not fit"):
            near.write(7, remote, 1, 11)
        with pytest.raises(ValueError, match="one rail"):
            near.endpoint.drop(1)
        near.buffer(1, 10)
        with pytest.raises(ValueError, match="one rail"):
            near.regions[1].expose(7, 0, 10, 1)
        with pytest.raises(ValueError, match="outside a region"):
            near.expose(1, 7, 1, 10)
        with pytest.raises(ValueError, match="writable"):
            near.endpoint.register(memoryview(b"constant"))


@EACH_PATH
def test_dropping_the_rail_is_reported_once_on_both_sides(paths):
    with pair(paths, paths) as (near, far):
        far.buffer(1, 10)
        remote = far.expose(1, 7, 0, 10)
        near.endpoint.drop(0)
        near.endpoint.drop(0)
        assert "gave it up" in near.down()
        assert "broke" in far.down()
        near.write(7, remote, 1, 10)
        assert near.written() == 7
        assert near.unread() == far.unread() == [0, 0, 0, 0]


@EACH_PATH
def test_closing_is_idempotent_and_reported_to_the_peer_only(paths):
    with pair(paths, paths) as (near, far):
        near.buffer(1, 10)
        view = near.buffers[1]
        near.close()
        near.close()
        assert "broke" in far.down()
        assert near.unread() == [0, 0, 0, 0]
        assert near.endpoint.allocate(10) is None
        view[:] = b"0123456789"  # what was handed out stays usable
        assert bytes(view) == b"0123456789"


def test_a_view_of_received_memory_outlives_the_endpoint():
    with pair(MEMFD, MEMFD) as (near, far):
        near.buffer(1, 3 * MIB)
        far.write(7, near.expose(1, 7, 0, 3 * MIB), 1, 3 * MIB)
        near.landed()
    assert near.digest(1) == digest(pattern(1, 3 * MIB))
    before = near.counts()[1]
    near.free(1)
    assert near.counts()[1] == before - 1
