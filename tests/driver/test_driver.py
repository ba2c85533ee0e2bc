"""The driver in this process: what FLARE's connector loop and a firewall's probe see."""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import contextmanager

import pytest
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.connection import ConnState
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode
from nvflare.fuel.f3.drivers.net_utils import parse_url

from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC, Hello, encode
from nvflare_rdma.driver import RdmaDriver
from nvflare_rdma.driver import driver as driver_module
from nvflare_rdma.driver import sites as sites_module
from tests.support.processes import free_port
from tests.support.running_drivers import DEADLINE, Running, comes_to_takers, running, wait_for_port
from tests.support.waiting import eventually


@contextmanager
def listening():
    """A driver that listens, and its URL."""
    port = free_port()
    url = f"rdma://127.0.0.1:{port}"
    with running(url, Mode.PASSIVE) as server:
        wait_for_port(port)
        yield server, url


@contextmanager
def connected(server: Running, url: str):
    with running(url, Mode.ACTIVE) as client:
        client.monitor.wait_for(ConnState.CONNECTED)
        server.monitor.wait_for(ConnState.CONNECTED)
        yield client


def test_a_frame_arrives_and_states_are_reported_once():
    with listening() as (server, url):
        with connected(server, url) as client:
            client.monitor.connections[0].send_frame(bytearray(300_000))
        assert client.monitor.states == [ConnState.CONNECTED, ConnState.CLOSED]
        client.monitor.connections[0].send_frame(b"late")  # dropped, as FLARE's own drivers do while closing
        server.monitor.wait_for(ConnState.CLOSED)
    assert server.monitor.states == [ConnState.CONNECTED, ConnState.CLOSED]


def test_shutdown_ends_a_connection_that_is_still_opening():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        client = Running(f"rdma://127.0.0.1:{port}", Mode.ACTIVE)
        peer, _ = silent.accept()
        peer.recv(1)  # it has begun its greeting
        client.driver.shutdown()
        client.join()
        peer.close()
    assert client.monitor.states == []
    assert client.error is not None


def test_shutdown_ends_a_link_that_is_still_opening():
    port = free_port()
    with running(f"rdma://127.0.0.1:{port}", Mode.PASSIVE) as server:
        wait_for_port(port)
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as peer:
            peer.sendall(CONTROL_MAGIC + encode(Hello({"tcp": ""}, 1 << 20, 1 << 16, 16)))
            assert peer.recv(1)  # it is past the door: the link answers, and waits for rails
            server.driver.shutdown()
            while peer.recv(4096):
                pass
    assert server.monitor.states == []


def test_a_listener_that_somebody_has_shut_is_opened_anew():
    port = free_port()
    url = f"rdma://127.0.0.1:{port}"
    with running(url, Mode.PASSIVE) as server:
        wait_for_port(port)
        eventually(lambda: server.driver._door)._listener.shutdown(socket.SHUT_RDWR)
        server.join()  # then FLARE's loop calls `listen` again
        assert server.error is None
        assert not server.connector.stopped.is_set()
        again = threading.Thread(target=server.driver.listen, args=(server.connector,), daemon=True)
        again.start()
        wait_for_port(port)
        with running(url, Mode.ACTIVE) as client:
            client.monitor.wait_for(ConnState.CONNECTED)
    again.join(DEADLINE)
    assert not again.is_alive()


@pytest.mark.parametrize("url", ["rdma://[::1]:{}", "rdma://[::1]:{}/x?y=z", "rdma://ip6:{}"])
def test_ipv6(url, monkeypatch, caplog):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as sock:
            url = url.format(sock.getsockname()[1])
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: resolve(host.replace("ip6", "::1"), *a, **k))
    with running(url, Mode.PASSIVE) as server:
        eventually(lambda: server.driver._door)
        with connected(server, url) as client:
            told = client.monitor.connections[0].get_conn_properties()
            assert told["peer_addr"] == f"[::1]:{url.split(':')[-1].partition('/')[0]}"
            assert told["local_addr"].startswith("[::1]:")


def test_urls_of_ipv6_hosts_have_brackets():
    resources = {"host": "2001:db8::1", "ports": free_port()}
    connect, listen = RdmaDriver.get_urls("rdma", resources)
    assert connect.startswith("rdma://[2001:db8::1]:")
    assert listen.startswith("rdma://0:")
    _, listen = RdmaDriver.get_urls("rdma", {**resources, "listen_host": "::1"})
    assert listen.startswith("rdma://[::1]:")
    connect, _ = RdmaDriver.get_urls("rdma", {**resources, "host": "name"})
    assert connect.startswith("rdma://name:")


def test_a_frame_that_is_refused_ends_the_connection_as_a_failed_send_does(caplog):
    with listening() as (server, url):
        with connected(server, url) as client:
            sender, receiver = client.monitor.connections[0], server.monitor.connections[0].link
            receiver._offered_locked = lambda transfer, length, label: receiver._deferred.append(
                lambda: receiver._no_memory(transfer, length, "it is short of it")
            )
            sender.send_frame(bytearray(300_000))
            client.monitor.wait_for(ConnState.CLOSED)
            with pytest.raises(CommError, match="can't send a frame of 4 bytes"):
                sender.send_frame(b"more")
        server.monitor.wait_for(ConnState.CLOSED)
    assert "a frame was refused, so this connection is closed" in caplog.text
    assert "it is short of it" in caplog.text


def test_a_driver_that_was_shut_down_before_does_not_listen():
    driver = RdmaDriver()
    driver.shutdown()
    params = parse_url(f"rdma://127.0.0.1:{free_port()}")
    connector = ConnectorInfo("CH", driver, params, Mode.PASSIVE, 0, 0, False, threading.Event())
    thread = threading.Thread(target=driver.listen, args=(connector,), daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "it listens"


def test_a_site_has_only_so_many_connections(monkeypatch, caplog):
    monkeypatch.setattr(sites_module, "MAX_CONNECTIONS_OF_SITE", 2)
    monkeypatch.setattr(driver_module, "site_of", lambda properties: "site-1")
    with listening() as (server, url):
        clients = [Running(url, Mode.ACTIVE) for _ in range(4)]
        for number, client in enumerate(clients, 1):
            client.monitor.wait_for(ConnState.CONNECTED)
            server.monitor.wait_for(ConnState.CONNECTED, number)
        server.monitor.wait_for(ConnState.CLOSED, 2)
        assert "site-1 has 2 connections, which are the most for one site; the oldest is closed" in caplog.text
        for client in clients:
            client.driver.shutdown()
            client.join()
    eventually(lambda: server.driver._sites.sites == [], DEADLINE)


def test_peers_that_take_nothing_are_left_all_at_once():
    """Each may be waited for a little, but not one after the other."""
    with listening() as (server, url):
        clients = [Running(url, Mode.ACTIVE) for _ in range(6)]
        for client in clients:
            client.monitor.wait_for(ConnState.CONNECTED)
            link = client.monitor.connections[0].link
            link._inbox.reserve = lambda *offered: None  # it never finds memory
        server.monitor.wait_for(ConnState.CONNECTED, 6)
        for connection in server.monitor.connections:
            connection.send_frame(bytearray(300_000))
        server.driver.shutdown()  # six lingers in a row would be longer than the deadline
        server.join()
    for client in clients:
        client.driver.shutdown()
        client.join()
    server.monitor.wait_for(ConnState.CLOSED, 6)


def test_a_forked_process_that_exits_leaves_the_drivers_to_its_parent():
    with listening() as (server, url), connected(server, url) as client:
        child = os.fork()
        if not child:
            # What FLARE does at exit. A lock that another thread had is nobody's here, and would hold it for ever.
            for side in (client, server):
                side.driver.shutdown()
                side.monitor.connections[0].close()
            os._exit(0)
        done: list[int] = []
        eventually(lambda: done.extend(os.waitpid(child, os.WNOHANG)) or child in done, DEADLINE)
        assert done[-2:] == [child, 0]
        link = client.monitor.connections[0].link
        link.send(bytearray(300_000), DEADLINE).wait(DEADLINE)
        with running(url, Mode.ACTIVE) as another:
            another.monitor.wait_for(ConnState.CONNECTED)


def test_a_probe_of_the_port_is_no_error(caplog):
    port = free_port()
    with running(f"rdma://127.0.0.1:{port}", Mode.PASSIVE), caplog.at_level(logging.INFO):
        wait_for_port(port)
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as probe:
            probe.shutdown(socket.SHUT_WR)
            assert probe.recv(1) == b""
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_certificate_that_is_not_there_yet_is_tried_again(tmp_path, caplog):
    missing = {"ca_cert": str(tmp_path / "rootCA.pem"), "client_cert": "x", "client_key": "x"}
    with running(f"srdma://127.0.0.1:{free_port()}", Mode.ACTIVE, **missing) as client:
        client.join()
        assert isinstance(client.error, OSError)
        assert not client.connector.stopped.is_set()
    assert "can't start" in caplog.text


def test_a_bad_port_is_not_tried_again():
    with running("rdma://127.0.0.1:99999", Mode.ACTIVE) as client:
        client.join()
        assert isinstance(client.error, CommError)
        assert client.connector.stopped.is_set()


def test_a_listener_shares_its_port():
    with listening() as (_, url):
        assert comes_to_takers(int(url.rpartition(":")[2]))
