"""TCP sockets over both families, within one deadline."""

from __future__ import annotations

import socket
import time

import pytest

from nvflare_rdma.channel import address_of
from nvflare_rdma.fabric import connect_tcp, join_address, keep_alive, listen_tcp, plain_host
from nvflare_rdma.fabric.sockets import TCP_RTO_MAX_MS, acknowledged
from tests.support.tcp_pair import DEADLINE
from tests.support.unanswered import unanswered
from tests.support.waiting import eventually


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@needs_ipv6
@pytest.mark.parametrize(("host", "families"), [("", "46"), ("::", "46"), ("::1", "6"), ("127.0.0.1", "4")])
def test_a_listener_is_there_for_the_families_of_its_host(host, families):
    with listen_tcp(host, 0) as listener:
        port = listener.getsockname()[1]
        for family, address in (("4", "127.0.0.1"), ("6", "::1")):
            if family not in families:
                with pytest.raises(ConnectionRefusedError):
                    connect_tcp((address, port), DEADLINE)
                continue
            with connect_tcp((address, port), DEADLINE) as near:
                far, _ = listener.accept()
                with far:
                    # However it came, an address looks as whoever has it says it.
                    assert address_of(far, peer=True) == join_address(address, near.getsockname()[1])
                    assert address_of(near, peer=True) == address_of(far, peer=False) == join_address(address, port)


def test_a_port_that_is_in_use_is_said():
    with listen_tcp("", 0) as listener:
        port = listener.getsockname()[1]
        for host in ("", "127.0.0.1", "localhost"):
            with pytest.raises(OSError, match="in use"):
                listen_tcp(host, port)


def test_a_name_that_is_nobodys_is_said():
    with pytest.raises(OSError, match="known"):
        listen_tcp("nobody.invalid", 0)
    with pytest.raises(OSError, match="known"):
        connect_tcp(("nobody.invalid", 1), DEADLINE)
    with pytest.raises(OSError, match="assign"):
        listen_tcp("192.0.2.1", 0)


def of_a_name(monkeypatch, *addresses) -> None:
    """Have the resolver find them for any name."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kinds: found)


def test_all_addresses_of_a_name_are_tried_within_one_deadline(monkeypatch):
    with unanswered() as silent, socket.create_server(("127.0.0.1", 0)) as listener:
        of_a_name(monkeypatch, silent, silent, listener.getsockname())
        with connect_tcp(("name", 1), 1.0) as sock:
            assert sock.getpeername() == listener.getsockname()
        of_a_name(monkeypatch, *[silent] * 20)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"127.0.0.1: timed out; 127.0.0.1: timed out"):
            connect_tcp(("name", 1), 0.5)
        assert time.monotonic() - began < 10  # each of them had 0.5 s


def test_the_kernel_is_asked_what_has_arrived():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            before = acknowledged(near)
            assert before is not None
            near.sendall(bytes(1000))
            eventually(lambda: acknowledged(near) == before + 1000, DEADLINE)
    assert acknowledged(near) is None  # it is closed


def test_a_path_that_comes_back_is_used_soon():
    with socket.socket() as sock:
        try:
            before = sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS)
        except OSError:
            pytest.skip("this kernel has no TCP_RTO_MAX_MS")
        keep_alive(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == 10_000 < before


def test_what_is_no_tcp_socket_is_left_alone():
    near, far = socket.socketpair()
    with near, far:
        keep_alive(near)
        near.sendall(b"x")
        assert far.recv(1) == b"x"


@pytest.mark.parametrize(
    ("host", "plain", "joined"),
    [
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1:80"),
        ("192.0.2.1", "192.0.2.1", "192.0.2.1:80"),
        ("2001:db8::1", "2001:db8::1", "[2001:db8::1]:80"),
        ("a.name", "a.name", "a.name:80"),
    ],
)
def test_addresses_for_people(host, plain, joined):
    assert plain_host(host) == plain
    assert join_address(plain_host(host), 80) == joined
