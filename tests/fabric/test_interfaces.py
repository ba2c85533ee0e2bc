from __future__ import annotations

import ipaddress
import socket
import struct

import pytest

from nvflare_rdma.fabric import interfaces
from nvflare_rdma.fabric.interfaces import addresses_of

HERE, THERE = ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("192.0.2.2")
SIX = ipaddress.ip_address("2001:db8::1")
ADDRESS, LOCAL, LABEL = 1, 2, 3
NEW_ADDRESS, ERROR, DONE = 20, 2, 3


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return padded(struct.pack("=HH", 4 + len(value), kind) + value)


def message(kind: int, body: bytes) -> bytes:
    return padded(struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body)


def address(interface: int, *attributes: bytes) -> bytes:
    return message(NEW_ADDRESS, struct.pack("=BBBBI", 2, 24, 0, 0, interface) + b"".join(attributes))


@pytest.fixture
def kernel(monkeypatch):
    """What the kernel is to answer, a datagram each; ``lo`` has the number 1, as everywhere."""
    datagrams: list[bytes] = []

    class Kernel:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def settimeout(self, seconds):
            assert 0 < seconds < 60

        def sendall(self, request):
            assert struct.unpack_from("=IH", request) == (len(request), 22)

        def recv(self, _):
            if not datagrams:
                raise TimeoutError("no more")
            return datagrams.pop(0)

    monkeypatch.setattr(interfaces.socket, "socket", Kernel)
    return datagrams


def test_this_hosts_loopback():
    assert ipaddress.ip_address("127.0.0.1") in addresses_of("lo")


@pytest.mark.parametrize("name", ["none0", "", "x" * 99])
def test_an_interface_that_is_not_there_has_none(name):
    assert addresses_of(name) == []


def test_addresses_come_in_the_kernels_order_and_of_one_interface(kernel):
    one = socket.if_nametoindex("lo")
    kernel += [
        address(one, attribute(ADDRESS, SIX.packed), attribute(LABEL, b"lo\0")) + address(one + 1),
        address(one + 1, attribute(ADDRESS, THERE.packed)) + address(one, attribute(ADDRESS, HERE.packed)),
        message(DONE, bytes(4)),
    ]
    assert addresses_of("lo") == [SIX, HERE]


def test_a_point_to_point_link_has_this_ends_address(kernel):
    one = socket.if_nametoindex("lo")
    kernel += [address(one, attribute(ADDRESS, THERE.packed), attribute(LOCAL, HERE.packed)), message(DONE, bytes(4))]
    assert addresses_of("lo") == [HERE]


@pytest.mark.parametrize("end", [message(ERROR, bytes(4)), b"", b"\0" * 32], ids=["error", "silence", "no length"])
def test_what_came_before_an_error_is_kept(kernel, end):
    kernel += [address(socket.if_nametoindex("lo"), attribute(ADDRESS, HERE.packed)), end]
    assert addresses_of("lo") == [HERE]
