"""The IP addresses of a network interface, asked of the kernel (rtnetlink(7), RTM_GETADDR)."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence, sender (struct nlmsghdr)
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface (struct ifaddrmsg)
_ATTRIBUTE = struct.Struct("=HH")  # length, type (struct rtattr)
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_REQUEST_DUMP = 0x301
_DONE, _ERROR = 3, 2
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_PATIENCE = 5.0  # seconds; the kernel answers at once


def addresses_of(interface: str) -> list[IPAddress]:
    """Return an interface's addresses in the kernel's order; none if there is no such interface."""
    request = _MESSAGE.pack(_MESSAGE.size + _ADDRESS.size, _GET_ADDRESS, _REQUEST_DUMP, 1, 0)
    found: list[IPAddress] = []
    try:
        index = socket.if_nametoindex(interface)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(_PATIENCE)
            kernel.sendall(request + _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
            while True:
                for kind, body in _split(kernel.recv(1 << 16), _MESSAGE):
                    if kind in (_DONE, _ERROR):
                        return found
                    if kind == _NEW_ADDRESS and _ADDRESS.unpack_from(body)[4] == index:
                        found += _address(body)
    except OSError:
        return found


def _address(body: memoryview) -> list[IPAddress]:
    known = dict(_split(body[_ADDRESS.size :], _ATTRIBUTE))
    # On a point-to-point link the "address" is the other end's.
    packed = known.get(_IFA_LOCAL, known.get(_IFA_ADDRESS))
    return [ipaddress.ip_address(bytes(packed))] if packed is not None and len(packed) in (4, 16) else []


def _split(data: bytes | memoryview, header: struct.Struct) -> Iterator[tuple[int, memoryview]]:
    """(type, contents) of what follows one another in `data`, each at a multiple of 4 bytes."""
    view = memoryview(data)
    while len(view) >= header.size:
        length, kind = header.unpack_from(view)[:2]
        if length < header.size:
            return
        yield kind, view[header.size : length]
        view = view[(length + 3) & ~3 :]
