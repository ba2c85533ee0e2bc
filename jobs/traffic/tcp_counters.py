"""How many bytes this process has moved over TCP, as the kernel counted them. Knows nothing of FLARE.

The kernel keeps the counts per socket (`TCP_INFO`), so they are the same for every driver and library, and no one
has to report them: payload bytes that TCP carried, headers of IP and TCP not included.

- sent: `tcpi_bytes_sent` less `tcpi_bytes_retrans`, payload bytes put on the wire for the first time (RFC 4898,
  tcpEStatsPerfHCDataOctetsOut less tcpEStatsPerfOctetsRetrans);
- retransmitted: `tcpi_bytes_retrans`, payload bytes put on the wire again. Apart, because they come from the state
  of the link and of the machine (a receiver that gets no CPU is probed with its last bytes again, on loopback too) and
  would blur what two drivers or two encodings differ in;
- received: `tcpi_bytes_received`, payload bytes that arrived in order (RFC 4898,
  tcpEStatsAppHCThruOctetsReceived).

Counting needs Linux 4.19 or newer.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from dataclasses import dataclass

_BYTES_RECEIVED_AT = 128  # offsets in struct tcp_info (linux/tcp.h)
_BYTES_SENT_AT = 200
_BYTES_RETRANS_AT = 208
_TCP_INFO_SIZE = 216
_LISTEN = 10
_FD_FOLDER = "/proc/self/fd"

_Endpoints = tuple[tuple[str | int, ...], tuple[str | int, ...]]


@dataclass(frozen=True)
class WireBytes:
    """Payload bytes over TCP since some start."""

    sent: int = 0
    received: int = 0
    retransmitted: int = 0

    def __add__(self, other: WireBytes) -> WireBytes:
        return WireBytes(
            self.sent + other.sent, self.received + other.received, self.retransmitted + other.retransmitted
        )

    def __sub__(self, other: WireBytes) -> WireBytes:
        return WireBytes(
            self.sent - other.sent, self.received - other.received, self.retransmitted - other.retransmitted
        )


class TcpByteCounter:
    """Sums the kernel's counters over all TCP sockets of this process, closed ones included.

    A socket that has been closed can't be asked any more, so its last seen counts stay in the sum; `start` samples in
    the background to keep what can be missed (bytes moved between the last sample and the close) small. A connection
    whose two ends are both in this process is left out: nothing of it leaves the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, WireBytes] = {}  # by inode of the socket
        self._inside: set[int] = set()  # inodes once found to be one of two ends in this process
        self._closed = WireBytes()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, interval: float = 0.1) -> None:
        """Sample every `interval` seconds in a daemon thread until `stop`."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, args=(interval,), name="tcp-byte-counter", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the background sampling; `total` still works."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def total(self) -> WireBytes:
        """Sample now and return the bytes of all sockets seen so far.

        Raises:
            RuntimeError: the kernel does not give these counters.
        """
        with self._lock:
            counts, ends = _sample()
            pairs = set(ends.values())
            self._inside = {i for i in counts if i in self._inside or ends[i][::-1] in pairs}
            seen = {i: count for i, count in counts.items() if i not in self._inside}
            for inode, counted in self._live.items():
                if inode in self._inside:
                    continue  # seen before its other end was: it is not one that closed
                now = seen.get(inode)
                # A smaller count under the same inode is a new socket that got a number of an old one.
                if now is None or now.sent < counted.sent or now.received < counted.received:
                    self._closed += counted
            self._live = seen
            return sum(seen.values(), self._closed)

    def _run(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.total()


def _sample() -> tuple[dict[int, WireBytes], dict[int, _Endpoints]]:
    """Counts and (own address, peer's address) of every TCP connection of this process, by socket inode."""
    counts: dict[int, WireBytes] = {}
    ends: dict[int, _Endpoints] = {}
    for name in os.listdir(_FD_FOLDER):
        try:
            # Looked at by name first: to close any duplicate of a file's descriptor would drop this process's POSIX
            # locks on that file.
            if not stat.S_ISSOCK(os.stat(f"{_FD_FOLDER}/{name}").st_mode):
                continue
            # The owner may close the descriptor at any moment, and its number may be taken again: look only at a
            # duplicate of our own, and only for an instant, since it delays the owner's close.
            fd = os.dup(int(name))
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if not stat.S_ISSOCK(status.st_mode) or status.st_ino in counts:
                continue
            with socket.socket(fileno=fd) as sock:
                fd = -1  # the socket object closes it
                found = _read(sock)
        except OSError:  # went away under our hands
            continue
        finally:
            if fd >= 0:
                os.close(fd)
        if found is not None:
            counts[status.st_ino], ends[status.st_ino] = found
    return counts, ends


def _read(sock: socket.socket) -> tuple[WireBytes, _Endpoints] | None:
    """Counts and addresses of a connected TCP socket, or None for any other."""
    if sock.proto != socket.IPPROTO_TCP:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
        if info and info[0] == _LISTEN:
            return None
        ends = (_address(sock.getsockname()), _address(sock.getpeername()))
    except OSError:  # not connected yet, or not any more and without a peer's address: see `_unnamed`
        return _unnamed(sock)
    return _counts(info), ends


def _unnamed(sock: socket.socket) -> tuple[WireBytes, _Endpoints] | None:
    """A socket whose peer is gone: its counts still hold; it has no address to pair it with another."""
    try:
        counted = _counts(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE))
    except OSError:
        return None
    return (counted, (("", sock.fileno()), ())) if counted != WireBytes() else None


def _counts(info: bytes) -> WireBytes:
    if len(info) < _TCP_INFO_SIZE:
        raise RuntimeError(
            f"this kernel's TCP_INFO has {len(info)} bytes and no byte counters; counting needs Linux 4.19 or newer"
        )
    (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)
    (sent,) = struct.unpack_from("=Q", info, _BYTES_SENT_AT)
    (again,) = struct.unpack_from("=Q", info, _BYTES_RETRANS_AT)
    return WireBytes(sent - again, received, again)


def _address(name: tuple[str, int]) -> tuple[str, int]:
    host, port = name[:2]
    return (host.removeprefix("::ffff:"), port)  # an IPv4 peer as a dual-stack socket names it
