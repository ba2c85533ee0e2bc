"""TCP sockets of links and rails: over IPv4 or IPv6, dialled within one deadline, given up when their path is dead."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import time
from dataclasses import dataclass

#: Seconds until the kernel takes a connection for dead: what was sent is not acknowledged for so long, or so long ago
#: something came, and probes were not answered. The kernel's own limits are a quarter of an hour, and two hours.
DEAD_AFTER = 60
#: Seconds until the first probe of an idle connection, and from one to the next. Firewalls and NATs forget a connection
#: that is idle for minutes; the probes also keep them from that.
_PROBE_AFTER, _PROBE_EVERY = 30, 10
_PROBES = (DEAD_AFTER - _PROBE_AFTER) // _PROBE_EVERY
#: The longest that TCP waits until it sends again what was not acknowledged. Its pauses double: a path that comes back
#: after a minute would else be found out a minute later. It is longer than any round trip, full queues included.
_SEND_AGAIN_MS = 10_000
#: TCP_RTO_MAX_MS of <linux/tcp.h>, since Linux 6.15.
TCP_RTO_MAX_MS = 44
#: Where struct tcp_info of <linux/tcp.h> has tcpi_bytes_acked (u64).
_BYTES_ACKED = struct.Struct("@120xQ")
#: And tcpi_last_ack_recv (u32, milliseconds).
_LAST_ACK = struct.Struct("@56xI")
#: And tcpi_total_retrans, tcpi_min_rtt (microseconds) and tcpi_data_segs_out (all u32).
_TOLD = struct.Struct("@100xI44xI4xI")
_UNKNOWN = 0xFFFFFFFF


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel end the connection when its path has been dead for `DEAD_AFTER` seconds, idle or not."""
    with contextlib.suppress(OSError):  # no TCP, or gone again: whoever uses it next will see
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, _SEND_AGAIN_MS)  # the last: older kernels refuse it


def acknowledged(sock: socket.socket) -> int | None:
    """How many bytes the peer's kernel has acknowledged so far; None where this kernel does not tell."""
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
    except OSError:
        return None
    return int(_BYTES_ACKED.unpack(told)[0]) if len(told) == _BYTES_ACKED.size else None


def seconds_since_acknowledgement(sock: socket.socket) -> float:
    """Seconds since the peer's kernel has acknowledged anything, probes of a closed window included; infinity where
    this kernel does not tell."""
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK.size)
    except OSError:
        return float("inf")
    return float(_LAST_ACK.unpack(told)[0]) / 1000 if len(told) == _LAST_ACK.size else float("inf")


@dataclass(frozen=True, slots=True)
class TcpTold:
    """What the kernel says of a connection: the shortest round trip in seconds (0 if it has seen none), the segments
    with data that were sent, and how many were sent again."""

    round_trip: float
    segments: int
    resent: int


def tcp_told(sock: socket.socket) -> TcpTold | None:
    """What this kernel tells of a connection; None if it is gone, or the kernel does not tell."""
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOLD.size)
    except OSError:
        return None
    if len(told) != _TOLD.size:
        return None
    resent, microseconds, segments = _TOLD.unpack(told)
    return TcpTold(0.0 if microseconds == _UNKNOWN else microseconds / 1e6, segments, resent)


def connect_tcp(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connect to a host, by whichever of its addresses answers first in the order of the resolver. `timeout` is in
    seconds and for all of them together; each may take its share of what is left.

    Raises:
        TimeoutError: one of them did not answer in time. OSError: nobody listens, or there is no such host.
    """
    deadline = time.monotonic() + timeout
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    failures: list[OSError] = []
    for number, (family, kind, protocol, _, where) in enumerate(found):
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(max((deadline - time.monotonic()) / (len(found) - number), 0.001))
            sock.connect(where)
            return sock
        except OSError as error:
            failures.append(error)
            if sock is not None:
                sock.close()
    if len(failures) == 1:
        raise failures[0]
    silent = any(isinstance(failure, TimeoutError) for failure in failures)
    kind_of_error = TimeoutError if silent else OSError
    tried = zip(found, failures, strict=True)
    raise kind_of_error("; ".join(f"{where[0]}: {failure}" for (*_, where), failure in tried))


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on a port: of all addresses of this machine, IPv4 and IPv6, if `host` is "" or "::"; else of the address
    that `host` is or resolves to, an IPv4 one first.

    Raises:
        OSError: the port is in use, `host` has no address, or none that is this machine's.
    """
    if host in ("", "::"):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    failure: OSError | None = None
    for family, *_, where in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        try:
            return socket.create_server(where, family=family)
        except OSError as error:
            failure = failure or error
    assert failure is not None  # the resolver finds an address, or raises
    raise failure


def join_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def plain_host(host: str) -> str:
    """Return an IPv4 address as such that a socket for both families gives as IPv6 one (::ffff:192.0.2.1)."""
    try:
        mapped = ipaddress.IPv6Address(host).ipv4_mapped
    except ValueError:
        return host
    return str(mapped or host)
