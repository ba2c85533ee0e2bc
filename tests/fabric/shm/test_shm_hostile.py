"""Peers that die, lie, or break the rules of the shm fabric's socket."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

import pytest

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.shm import endpoint as shm_endpoint
from nvflare_rdma.fabric.shm import slots
from nvflare_rdma.fabric.shm.exposures import Exposures
from nvflare_rdma.fabric.shm.process_memory import SIZE_SEALS, sealed_memory
from nvflare_rdma.fabric.shm.wire import ACKNOWLEDGE, FORGET, MAP, WRITE
from tests.support.shm_liar import liar, message
from tests.support.shm_peer import DEADLINE, Peer, RemotePeer, digest, mappings, pattern

EACH_PATH = pytest.mark.parametrize("path", ["direct", "memfd"])
MIB = 1 << 20


@contextlib.contextmanager
def pair(path):
    near, far = Peer(), RemotePeer()
    try:
        offer = near.offer(path)
        far.connect(offer, path)
        yield near, far, offer
    finally:
        far.end()
        near.close()


def send_fds(sock, data, *fds):
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)


# -- death ---------------------------------------------------------------------------------------------------------


@EACH_PATH
def test_a_killed_peer_is_a_rail_that_is_down_and_leaves_nothing_behind(path):
    def named(process):
        """What a process has mapped that would be left in /dev/shm; others on this machine have their own there."""
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
        return {line for line in lines if "/dev/shm/" in line}

    before = named("self")
    with pair(path) as (near, far, offer):
        near.buffer(1, 64 * MIB)
        slices = [near.expose(1, i, i * MIB, MIB) for i in range(64)]
        far.buffer(1, MIB)
        back = far.expose(1, 7, 0, MIB)
        far.start("exchange_chunks", 64, 1, slices, 0, MIB)  # it will wait for more than it gets
        near.landed()
        assert named("self") == before
        assert not named(far.process.pid)
        far.signal(signal.SIGKILL)
        assert "FabricError: the shm rail to process" in near.down()
        near.write(8, back, 1, MIB)
        assert near.written() == 8
        far.process.wait(DEADLINE)
        assert offer["name"] not in Path("/proc/net/unix").read_text()
        near.close()
        assert near.unread()[2:] == [0, 0]


def test_writes_that_a_stopped_peer_has_not_read_end_when_it_is_killed():
    with pair("direct") as (near, far, _):
        far.buffer(1, 10 * 100)
        slices = [far.expose(1, i, i * 10, 10) for i in range(100)]
        far.signal(signal.SIGSTOP)
        for i, remote in enumerate(slices):
            near.write(i, remote, i, 10)
        far.signal(signal.SIGKILL)
        assert sorted(near.written() for _ in range(100)) == list(range(100))
        near.down()
        assert near.unread() == [0, 0, 0, 0]


def test_a_write_that_waits_in_a_full_socket_ends_with_the_endpoint():
    with liar("direct", "memfd") as (_, endpoint, events):
        done = threading.Event()

        def fill():
            for i in range(5000):
                endpoint.write(0, memoryview(b""), RemoteSlice(1, i, 1), i, 0)
            done.set()

        writer = threading.Thread(target=fill, daemon=True)
        writer.start()
        assert not done.wait(0.2), "the socket holds everything: write more"
        endpoint.drop(0)
        writer.join(DEADLINE)
        assert not writer.is_alive()
        assert sorted(events.writes.get(timeout=DEADLINE) for _ in range(5000)) == list(range(5000))


def test_a_prompt_write_never_waits_for_a_peer_that_reads_nothing():
    """It is made in the thread that has the deadlines, or in one that the peer's writes wait for."""
    with liar("direct", "direct") as (sock, endpoint, events):
        assert endpoint.write_is_nonblocking

        def fill():
            for i in range(5000):
                endpoint.write(0, memoryview(b"x"), RemoteSlice(1, i, 1), i, 0)

        writer = threading.Thread(target=fill, daemon=True)
        writer.start()
        writer.join(DEADLINE / 4)
        assert not writer.is_alive(), "it waits for the peer"
        for i in range(5000):
            assert struct.unpack("=IIQQQQQ", sock.recv(64))[:2] == (WRITE, i)
        endpoint.drop(0)
        assert [events.writes.get(timeout=DEADLINE) for _ in range(5000)] == list(range(5000))


def test_prompt_writes_of_several_threads_are_acknowledged_in_the_order_of_their_messages():
    """Grants are read by one thread, but any that comes by carries them out."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with liar("direct", "direct") as (sock, endpoint, events):

            def write(numbers):
                for i in numbers:
                    endpoint.write(0, memoryview(b""), RemoteSlice(1, i, 1), i, 0)

            writers = [threading.Thread(target=write, args=(range(n * 500, n * 500 + 500),)) for n in range(4)]
            for writer in writers:
                writer.start()
            for _ in range(2000):
                notification = struct.unpack("=IIQQQQQ", sock.recv(64))[1]
                sock.send(message(ACKNOWLEDGE, notification, length=1))
            for writer in writers:
                writer.join(DEADLINE)
            assert sorted(events.writes.get(timeout=DEADLINE) for _ in range(2000)) == list(range(2000))
            assert events.failures.empty()
    finally:
        sys.setswitchinterval(interval)


def test_a_chunk_of_a_sender_that_has_left_is_not_taken_for_good(monkeypatch):
    """The sender frees its memory after it has closed the rail, so a copy that ends later may be garbage."""
    with liar("direct", "direct") as (sock, endpoint, events):
        target = bytearray(10)
        remote = endpoint.register(memoryview(target)).expose(7, 0, 10, 0)
        source = bytearray(b"0123456789")

        def read_into(pid, address, target):
            sock.shutdown(socket.SHUT_RDWR)

        monkeypatch.setattr(shm_endpoint, "read_into", read_into)
        sock.send(message(WRITE, 7, remote.key, remote.address, 10, id(source)))
        assert "left while its memory was read" in str(events.down.get(timeout=DEADLINE)[1])
        assert events.landings.empty()


def test_memory_that_can_no_longer_be_read_is_a_rail_that_is_down():
    with liar("direct", "direct") as (sock, endpoint, events):
        remote = endpoint.register(memoryview(bytearray(10))).expose(7, 0, 10, 0)
        sock.send(message(WRITE, 7, remote.key, remote.address, 10, source=4096))
        assert "process_vm_readv: Bad address" in str(events.down.get(timeout=DEADLINE)[1])
        assert events.landings.empty()


def test_acknowledgements_wait_for_a_peer_that_does_not_read_and_then_all_go_out():
    with liar("direct", "direct") as (sock, endpoint, events):
        region = endpoint.register(memoryview(bytearray(10)))
        for i in range(3000):
            sock.send(message(WRITE, i, region.key, region.expose(i, 0, 10, 0).address))
            assert events.landings.get(timeout=DEADLINE) == (i, 0, 0)
        done = 0
        while done < 3000:
            _, last, _, _, count, _, _ = struct.unpack("=IIQQQQQ", sock.recv(64))
            done += count
            assert last == done - 1


def test_revoking_waits_for_a_copy_that_is_under_way(monkeypatch):
    copying, go_on, revoked = threading.Event(), threading.Event(), threading.Event()

    def read_into(pid, address, target):
        copying.set()
        assert go_on.wait(DEADLINE)

    monkeypatch.setattr(shm_endpoint, "read_into", read_into)
    with liar("direct", "direct") as (sock, endpoint, events):
        region = endpoint.register(memoryview(bytearray(10)))
        remote = region.expose(7, 0, 10, 0)
        sock.send(message(WRITE, 7, remote.key, remote.address, 10))
        assert copying.wait(DEADLINE)
        revoker = threading.Thread(target=lambda: (region.revoke(7), revoked.set()), daemon=True)
        revoker.start()
        assert not revoked.wait(0.1)
        go_on.set()
        assert revoked.wait(DEADLINE)
        assert events.landings.get(timeout=DEADLINE) == (7, 10, 0)


# -- lies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        bytes(47),
        bytes(49),
        message(0),
        message(9),
        message(ACKNOWLEDGE, 7, length=1),
        message(ACKNOWLEDGE, 7, length=1 << 63),
        message(ACKNOWLEDGE),
        message(MAP, key=1, length=4096),
        message(FORGET, key=1),
        message(WRITE, 7),
    ],
    ids=[
        "tiny",
        "short",
        "long",
        "zero",
        "unknown",
        "ack of nothing",
        "ack of much",
        "empty ack",
        "no fd",
        "forget nothing",
        "not exposed",
    ],
)
def test_a_broken_message_ends_the_endpoint(data):
    with liar("direct", "direct") as (sock, _, events):
        sock.send(data)
        assert isinstance(events.failures.get(timeout=DEADLINE), ProtocolError)
        assert sock.recv(64) == b""
        assert events.down.empty()


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("op", [WRITE, MAP])
def test_descriptors_that_do_not_belong_are_closed(op, count):
    with liar("memfd", "memfd") as (sock, _, events):
        before = set(os.listdir("/proc/self/fd"))
        send_fds(sock, message(op, length=4096), *(os.open("/dev/null", os.O_RDONLY) for _ in range(count)))
        assert isinstance(events.failures.get(timeout=DEADLINE), ProtocolError)
        assert set(os.listdir("/proc/self/fd")) <= before


def unsealed(nbytes):
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    return fd


def growable(nbytes):
    fd = unsealed(nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS & ~fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (unsealed, "not sealed"),
        (growable, "not sealed"),
        (lambda n: sealed_memory(n - 4096), "holds 61440 bytes, not 65536"),
        (lambda n: sealed_memory(2 * n), "holds 131072 bytes, not 65536"),
        (lambda n: os.open(__file__, os.O_RDONLY), "no memfd"),
    ],
    ids=["unsealed", "can be shrunk", "too small", "too large", "a file"],
)
def test_memory_that_is_not_safe_to_write_is_refused(make, reason):
    with liar("direct", "memfd") as (sock, _, events):
        mapped = mappings()
        send_fds(sock, message(MAP, key=1, length=65536), make(65536))
        assert reason in str(events.failures.get(timeout=DEADLINE))
        assert mappings() == mapped


def test_a_slot_shared_twice_is_refused():
    with liar("direct", "memfd") as (sock, _, events):
        for _ in range(2):
            send_fds(sock, message(MAP, key=1, length=65536), sealed_memory(65536))
        assert "shares slot 1 after 1" in str(events.failures.get(timeout=DEADLINE))


def test_more_slots_than_allowed_are_refused(monkeypatch):
    monkeypatch.setattr(slots, "MAX_SLOTS", 3)
    with liar("direct", "memfd") as (sock, _, events):
        mapped = mappings()
        for key in range(1, 5):
            send_fds(sock, message(MAP, key=key, length=65536), sealed_memory(65536))
        assert "with 3 mapped" in str(events.failures.get(timeout=DEADLINE))
        assert mappings() == mapped


@pytest.mark.parametrize("remote", [RemoteSlice(1, 65527, 10), RemoteSlice(1, 1 << 63, 10), RemoteSlice(1, -1, 10)])
def test_a_slice_outside_of_its_slot_is_refused_by_the_writer(remote):
    with liar("direct", "memfd") as (sock, endpoint, events):
        send_fds(sock, message(MAP, key=1, length=65536), sealed_memory(65536))
        endpoint.write(0, memoryview(b"0123456789"), remote, 7, 0)
        assert isinstance(events.failures.get(timeout=DEADLINE), ProtocolError)
        assert events.writes.get(timeout=DEADLINE) == 7
        assert sock.recv(64) == b""


def test_a_slice_whose_numbers_fit_no_message_is_refused_by_the_writer():
    with liar("direct", "direct") as (_, endpoint, events):
        endpoint.write(0, memoryview(b"x"), RemoteSlice(1 << 64, 0, 1), 7, 0)
        assert isinstance(events.failures.get(timeout=DEADLINE), ProtocolError)
        assert events.writes.get(timeout=DEADLINE) == 7


def test_a_write_waits_for_memory_that_comes_late_and_gives_up_at_last(monkeypatch):
    monkeypatch.setattr(shm_endpoint, "SLOT_TIMEOUT", 0.2)
    with liar("direct", "memfd") as (sock, endpoint, events):
        endpoint.write(0, memoryview(b"x"), RemoteSlice(1, 0, 1), 7, 0)
        assert "did not share it within 0.2 s" in str(events.down.get(timeout=DEADLINE)[1])
        assert events.writes.get(timeout=DEADLINE) == 7
    monkeypatch.setattr(shm_endpoint, "SLOT_TIMEOUT", DEADLINE)
    with liar("direct", "memfd") as (sock, endpoint, events):
        arguments = (0, memoryview(b"late"), RemoteSlice(1, 0, 4), 7, 5)
        writer = threading.Thread(target=endpoint.write, args=arguments, daemon=True)
        writer.start()
        fd = sealed_memory(65536)
        send_fds(sock, message(MAP, key=1, length=65536), os.dup(fd))
        assert sock.recv(64) == message(WRITE, 7, 1, 0, 4, 0, 5)
        assert os.pread(fd, 5, 0) == b"late\0"
        os.close(fd)
        writer.join(DEADLINE)


def test_a_slot_taken_back_during_a_write_stays_mapped_until_its_end(monkeypatch):
    with liar("direct", "memfd") as (sock, endpoint, events):
        send_fds(sock, message(MAP, key=1, length=65536), sealed_memory(65536))
        slot = endpoint._peer_slots.get(1, DEADLINE)
        sock.send(message(FORGET, key=1))
        sock.send(message(FORGET, key=1))  # its refusal tells that the first was obeyed
        assert isinstance(events.failures.get(timeout=DEADLINE), ProtocolError)
        slot[:] = 1
        mapped = mappings()
        del slot
        assert mappings() == mapped - 1


# -- out of means --------------------------------------------------------------------------------------------------


def test_running_out_of_descriptors_or_slots_is_an_error_that_spoils_nothing(monkeypatch):
    with pair("memfd") as (near, far, _):
        near.buffer(1, 10)
        with monkeypatch.context() as limited:
            limited.setattr(slots, "MAX_SLOTS", 1)
            with pytest.raises(MemoryError, match="1 slots already"):
                near.endpoint.allocate(200_000)
        with monkeypatch.context() as limited:

            def full(nbytes):
                raise OSError(24, "Too many open files")

            limited.setattr(slots, "sealed_memory", full)
            with pytest.raises(OSError, match="ulimit -n"):
                near.endpoint.allocate(200_000)
            region = near.endpoint.register(memoryview(bytearray(200_000)))
            with pytest.raises(OSError, match="ulimit -n"):
                region.expose(9, 0, 200_000, 0)
        with pytest.raises(MemoryError, match=r"no .* bytes of shared memory are free|can't map"):
            near.endpoint.allocate(1 << 50)
        counts = near.counts()
        near.buffer(2, 200_000)
        far.write(7, near.expose(2, 7, 0, 200_000), 1, 200_000)
        assert near.landed() == [7, 200_000, 1]
        assert near.digest(2) == digest(pattern(1, 200_000))
        assert near.counts() == [counts[0], counts[1] + 1]


def test_an_exposed_notification_can_not_be_exposed_again():
    exposures = Exposures()
    region = exposures.register(memoryview(bytearray(10)))
    region.expose(7, 0, 10, 0)
    with pytest.raises(ValueError, match="exposed already"):
        region.expose(7, 0, 10, 0)
