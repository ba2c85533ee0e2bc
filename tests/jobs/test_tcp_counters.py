from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys

import pytest
from traffic import tcp_counters
from traffic.tcp_counters import TcpByteCounter, WireBytes

PEER = """
import socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while count := int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "big"):
    sock.sendall(b"r" * count)
    left = count * 2
    while left:
        left -= len(sock.recv(min(left, 1 << 20)))
    sock.sendall(b"k")
"""


class Peer:
    """Another process that sends as many bytes as it is asked for and takes twice as many."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = str(self.listener.getsockname()[1])
        self.process = subprocess.Popen([sys.executable, "-c", PEER, port])
        self.listener.settimeout(30)
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(30)

    def exchange(self, count):
        self.sock.sendall(count.to_bytes(8, "big"))
        left = count
        while left:
            left -= len(self.sock.recv(min(left, 1 << 20)))
        self.sock.sendall(b"s" * (2 * count))
        assert self.sock.recv(1) == b"k"  # the peer has all

    def close(self):
        self.sock.close()
        self.listener.close()
        self.process.wait(30)


@pytest.fixture
def peer():
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def counter():
    counter = TcpByteCounter()
    counter.total()  # sockets that other tests of this process left open
    return counter


def test_both_directions_are_counted(peer, counter):
    before = counter.total()
    peer.exchange(3_000_000)
    moved = counter.total() - before
    assert (moved.sent, moved.received) == (6_000_008, 3_000_001)


def test_a_closed_socket_stays_in_the_sum(counter):
    before = counter.total()
    for _ in range(2):
        peer = Peer()
        peer.exchange(100_000)
        counter.total()
        peer.close()
        assert peer.process.returncode == 0
    moved = counter.total() - before
    assert (moved.sent, moved.received) == (2 * 200_008, 2 * 100_001)


def test_background_samples_see_a_socket_that_was_closed_in_between(counter):
    before = counter.total()
    counter.start(interval=0.01)
    try:
        peer = Peer()
        peer.exchange(100_000)
        peer.sock.sendall((1).to_bytes(8, "big"))  # the peer answers and waits: the socket is open for some samples
        assert peer.sock.recv(1) == b"r"
        deadline = 500
        while counter._live.get(os.fstat(peer.sock.fileno()).st_ino, WireBytes()).received < 100_002 and deadline:
            counter._stop.wait(0.01)
            deadline -= 1
        peer.sock.sendall(b"ss")
        peer.close()
    finally:
        counter.stop()
    assert (counter.total() - before).received >= 100_002


def test_a_connection_within_the_process_is_not_traffic(counter):
    before = counter.total()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
        a.sendall(b"x" * 1000)
        assert b.recv(1000, socket.MSG_WAITALL)
        assert counter.total() == before
        a.close()  # one end alone must not count as traffic now
        assert counter.total() == before
        b.close()
    assert counter.total() == before


def test_other_descriptors_are_left_alone(counter, tmp_path):
    before = counter.total()
    left, right = socket.socketpair()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with left, right, datagrams, open(tmp_path / "file", "wb") as file:
        left.sendall(b"x" * 100)
        file.write(b"x" * 100)
        assert counter.total() == before
        assert right.recv(100) == b"x" * 100


def test_counting_leaves_no_descriptor_open(peer, counter):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        counter.total()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reused_inode_does_not_lose_the_old_socket(counter, monkeypatch):
    samples = [{7: WireBytes(100, 50)}, {7: WireBytes(30, 10)}]
    ends = {7: (("a", 1), ("b", 2))}
    monkeypatch.setattr(tcp_counters, "_sample", lambda: (samples.pop(0), ends))
    before = counter.total() - WireBytes(100, 50)
    assert counter.total() - before == WireBytes(130, 60)


def test_what_is_sent_again_is_counted_apart():
    info = bytearray(216)
    info[128:136] = (70).to_bytes(8, sys.byteorder)
    info[200:208] = (50).to_bytes(8, sys.byteorder)
    info[208:216] = (9).to_bytes(8, sys.byteorder)
    assert tcp_counters._counts(bytes(info)) == WireBytes(sent=41, received=70, retransmitted=9)


def test_an_old_kernel_is_named(counter):
    with pytest.raises(RuntimeError, match=r"104 bytes .* needs Linux 4\.19"):
        tcp_counters._counts(b"\0" * 104)


def test_counting_leaves_the_locks_of_this_process_alone(tmp_path):
    """To close any duplicate of a locked file's descriptor would drop the lock."""
    path = tmp_path / "locked"
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        TcpByteCounter().total()
        code = f"import fcntl; fcntl.lockf(open({str(path)!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert "BlockingIOError" in other.stderr, "another process got the lock"


def test_a_connection_inside_the_process_is_not_counted_though_seen_before_it_was_accepted():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        near.sendall(b"x" * 1000)
        counter = TcpByteCounter()
        counter.total()
        far, _ = listener.accept()
        with near, far:
            assert counter.total().sent == 0
