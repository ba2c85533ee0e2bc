"""The driver on FLARE's own schemes, in this process: with itself, with FLARE's own driver, and with who is neither."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from contextlib import contextmanager

import pytest
from nvflare.fuel.f3 import communicator
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.connection import ConnState
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.drivers.driver_manager import DriverManager
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver
from nvflare.fuel.f3.sfm.constants import Types
from nvflare.fuel.f3.sfm.prefix import PREFIX_LEN, Prefix
from nvflare.fuel.utils.config_service import ConfigService

from nvflare_rdma.channel import guests as guests_module
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC, VERSION
from nvflare_rdma.driver import RdmaDriver, UpgradedTcpDriver, sites, take_over_where_asked
from nvflare_rdma.driver import upgrade as upgrade_module
from nvflare_rdma.driver.connection import RdmaConnection
from nvflare_rdma.driver.flare_words import MAX_HELLO_FRAME_BYTES, FlareConnection
from nvflare_rdma.driver.upgrade import ANSWER, FLARES, OURS, alpn, preface
from tests.support.certificates import Authority
from tests.support.link_process import tls_context
from tests.support.processes import free_port
from tests.support.running_drivers import DEADLINE, Running, comes_to_takers, running, wait_for_port
from tests.support.waiting import eventually

ALPN, PREFACE = alpn(VERSION), preface(VERSION)
UPGRADED, FLARES_OWN = UpgradedTcpDriver, TcpDriver
PAIRS = [(UPGRADED, UPGRADED), (UPGRADED, FLARES_OWN), (FLARES_OWN, UPGRADED)]
#: Whole frames, with FLARE's prefix.
SIZES = [PREFIX_LEN, PREFIX_LEN + 1, 64 * 1024, 64 * 1024 + 1, 256 * 1024 + 7, 5 * 1024 * 1024 + 3]


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("pki"))
    other = Authority(tmp_path_factory.mktemp("other"), "another-project")
    return {
        "server": authority.issue("server", "server"),
        "site": authority.issue("client", "site-1"),
        "stranger": other.issue("client", "site-1"),
    }


def frame(size: int, kind: int = Types.DATA, fill: int = 7) -> bytearray:
    made = bytearray([fill]) * size
    Prefix(size, 0, kind, 0, 0, 0, 1, 1).to_buffer(made, 0)
    return made


HELLO = bytes(frame(60, Types.HELLO))


@contextmanager
def server(driver, **params):
    port = free_port()
    url = f"{'stcp' if params else 'tcp'}://127.0.0.1:{port}"
    with running(url, Mode.PASSIVE, driver, **params) as it:
        wait_for_port(port)
        it.url, it.port = url, port
        yield it


def exchange(one: Running, other: Running, sizes=SIZES) -> None:
    """Frames of all sizes, in both directions at once."""
    ends = [(one, other), (other, one)]

    def send(sender: Running) -> None:
        for size in sizes:
            sender.monitor.connections[-1].send_frame(frame(size))

    threads = [threading.Thread(target=send, args=(sender,)) for sender, _ in ends]
    for thread in threads:
        thread.start()
    for _, receiver in ends:
        for size in sizes:
            assert receiver.monitor.frames.get(timeout=DEADLINE) == frame(size)
    for thread in threads:
        thread.join(DEADLINE)


def greet(client: Running, it: Running) -> None:
    """As FLARE does on every new connection."""
    client.monitor.wait_for(ConnState.CONNECTED)
    client.monitor.connections[-1].send_frame(HELLO)
    assert it.monitor.frames.get(timeout=DEADLINE) == HELLO


def send_on_and_on(connection) -> None:
    while True:
        connection.send_frame(frame(1024 * 1024))


def lines(caplog) -> list[str]:
    return [message for message in caplog.messages if "is spoken with" in message]


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "mTLS"])
@pytest.mark.parametrize(("listener", "dialler"), PAIRS, ids=["both", "old site", "old server"])
def test_frames_of_all_sizes_arrive_both_ways(listener, dialler, secure, pki, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    both = listener is dialler
    with server(listener, **(pki["server"] if secure else {})) as it:
        with running(it.url, Mode.ACTIVE, dialler, **(pki["site"] if secure else {})) as client:
            greet(client, it)
            exchange(client, it)
            kind = RdmaConnection if both else FlareConnection
            for side, driver in ((it, listener), (client, dialler)):
                if driver is UPGRADED:
                    assert type(side.monitor.connections[-1]) is kind
            # what FLARE is told of the connection is what its own driver tells
            told, its = (side.monitor.connections[-1].get_conn_properties() for side in (client, it))
            assert told["peer_addr"] == its["local_addr"] == f"127.0.0.1:{it.port}"
            assert told["local_addr"] == its["peer_addr"]
            assert (told.get("peer_cn"), its.get("peer_cn")) == (("server", "site-1") if secure else (None, None))
        it.monitor.wait_for(ConnState.CLOSED)
    said = lines(caplog)
    assert len(said) == (2 if both else 1)
    assert all((OURS if both else FLARES) in line for line in said)


def test_what_flare_asks_of_a_driver_is_answered_as_by_its_own():
    assert UPGRADED.supported_transports() == FLARES_OWN.supported_transports()
    assert UPGRADED.capabilities() == FLARES_OWN.capabilities()
    for resources in ({"host": "localhost"}, {"host": "a.b", "secure": True}, {"host": "10.1.2.3"}, {}):
        asked = {**resources, "port": 8002}
        assert UPGRADED.get_urls("tcp", asked) == FLARES_OWN.get_urls("tcp", asked)


def test_an_old_server_closes_at_once_and_says_nothing(caplog):
    """It must not wait for the frame that the preface would begin, nor allocate it."""
    caplog.set_level(logging.INFO)
    with server(FLARES_OWN) as it, socket.create_connection(("127.0.0.1", it.port), DEADLINE) as guest:
        guest.sendall(PREFACE)
        assert guest.recv(1) == b""
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_an_old_server_is_asked_again_when_it_may_have_been_replaced(monkeypatch):
    asked: list[str] = []
    ask = upgrade_module._ask
    monkeypatch.setattr(upgrade_module, "_ask", lambda *given: asked.append(ask(*given)) or asked[-1])

    def dial_again() -> None:
        thread = threading.Thread(target=client._run, daemon=True)
        before = client.monitor.states.count(ConnState.CONNECTED)
        thread.start()
        client.monitor.wait_for(ConnState.CONNECTED, before + 1)
        client.thread = thread

    def drop(connection) -> None:
        connection.sock.shutdown(socket.SHUT_RDWR)
        client.join()

    with server(FLARES_OWN) as it, running(it.url, Mode.ACTIVE, UPGRADED) as client:
        client.monitor.wait_for(ConnState.CONNECTED)
        drop(client.monitor.connections[-1])  # before it has said anything: it may refuse this side
        dial_again()
        assert len(asked) == 1, "it was asked again though it had just refused"
        monkeypatch.setattr(upgrade_module, "SPEAKS_FLARES_SECONDS", 0.0)
        drop(client.monitor.connections[-1])
        dial_again()
        assert len(asked) == 2, "it was not asked again after a while"
        monkeypatch.setattr(upgrade_module, "SPEAKS_FLARES_SECONDS", 600.0)
        greet(client, it)
        eventually(lambda: it.monitor.connections[-1].state is ConnState.CONNECTED)
        it.monitor.connections[-1].send_frame(HELLO)
        client.monitor.frames.get(timeout=DEADLINE)
        drop(client.monitor.connections[-1])  # as when a server that has worked is replaced
        dial_again()
        assert len(asked) == 3, "it was not asked again after its connection had ended"
        assert all(asked)


class NextVersion(UpgradedTcpDriver):
    """As the driver of a later version of this package."""

    version = VERSION + 1


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "mTLS"])
@pytest.mark.parametrize(("listener", "dialler"), list(itertools.permutations([UPGRADED, NextVersion])))
def test_two_versions_of_our_protocol_meet_in_flares_words(listener, dialler, secure, pki, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    with server(listener, **(pki["server"] if secure else {})) as it:
        with running(it.url, Mode.ACTIVE, dialler, **(pki["site"] if secure else {})) as client:
            greet(client, it)
            exchange(client, it, [100_000])
        said = lines(caplog)
        assert len(said) == 2
        assert all(f": {FLARES} is spoken with" in line for line in said)
        text = f"asks for version {dialler.version} of {OURS}, which is not this side's ({listener.version})"
        assert (text in caplog.text) is not secure
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def replaced(first, then, client: Running, port: int) -> None:
    """A server that is replaced at the same port; FLARE's loop dials again."""
    for number, driver in enumerate((first, then), 1):
        with running(f"tcp://127.0.0.1:{port}", Mode.PASSIVE, driver) as it:
            wait_for_port(port)
            stop = threading.Event()

            def loop(stop=stop) -> None:
                while not stop.is_set():
                    with contextlib.suppress(Exception):
                        client.driver.connect(client.connector)

            thread = threading.Thread(target=loop, daemon=True)
            thread.start()
            client.monitor.wait_for(ConnState.CONNECTED, number)
            greet(client, it)
            it.monitor.connections[-1].send_frame(HELLO)
            client.monitor.frames.get(timeout=DEADLINE)
            stop.set()
        if driver is FLARES_OWN:
            it.driver.server.server_close()  # it leaves that to the end of its process
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.mark.parametrize("order", list(itertools.permutations([UPGRADED, FLARES_OWN])), ids=["down", "up"])
def test_a_server_that_is_replaced_is_found_out(order):
    port = free_port()
    with running(f"tcp://127.0.0.1:{port}", Mode.ACTIVE, UPGRADED) as client:
        client.join()  # nobody listens yet
        replaced(*order, client, port)
        kinds = [type(connection) for connection in client.monitor.connections[:2]]
        assert kinds == [RdmaConnection if driver is UPGRADED else FlareConnection for driver in order]


def refused(guest: socket.socket) -> None:
    with guest, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        assert guest.recv(1) == b""


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "it speaks neither this package's protocol nor FLARE's tcp"),
        (bytes(frame(100)), "it speaks neither this package's protocol nor FLARE's tcp"),
        (struct.pack(">IHBBHHHH", MAX_HELLO_FRAME_BYTES + 1, 0, Types.HELLO, 0, 0, 0, 1, 1), "speaks neither"),
        (struct.pack(">IHBBHHHH", PREFIX_LEN, 0, Types.HELLO, 0, 0, 0, 1, 1), "speaks neither"),
        (b"\x16\x03\x01", "it speaks TLS"),
    ],
    ids=["http", "data first", "a long hello", "an empty hello", "TLS"],
)
def test_what_is_no_peer_is_refused(says, reason, caplog):
    with server(UPGRADED) as it:
        guest = socket.create_connection(("127.0.0.1", it.port), DEADLINE)
        guest.sendall(says)
        refused(guest)
        eventually(lambda: reason in caplog.text, DEADLINE)
        with running(it.url, Mode.ACTIVE, UPGRADED) as client:
            greet(client, it)
        assert len(it.monitor.connections) == 1


@pytest.mark.parametrize("version", [VERSION, VERSION + 1], ids=["ours", "another"])
def test_guests_that_begin_with_the_preface_do_not_fill_the_log(version, caplog, monkeypatch):
    monkeypatch.setattr(guests_module, "_COMPLAINTS_SECONDS", 600.0)
    caplog.set_level(logging.INFO, "nvflare_rdma")
    count = guests_module._COMPLAINTS + 10
    with server(UPGRADED) as it:
        before = len(caplog.messages)
        for _ in range(count):
            guest = socket.create_connection(("127.0.0.1", it.port), DEADLINE)
            guest.sendall(preface(version))
            with guest:
                assert guest.recv(len(ANSWER)) == (ANSWER if version == VERSION else b"")
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("rdma-conn-")], DEADLINE)
        said = caplog.messages[before:]
    assert len(said) == guests_module._COMPLAINTS, said
    assert not lines(caplog)


@pytest.mark.parametrize("says", [b"", PREFACE[:4], PREFACE[:8], PREFACE[:12], HELLO[:8], HELLO[:30]])
def test_half_a_greeting_and_then_silence_is_not_waited_for(says, monkeypatch, caplog):
    monkeypatch.setattr(upgrade_module, "GREETING_TIMEOUT", 0.3)
    monkeypatch.setattr("nvflare_rdma.channel.door.Door.__init__.__defaults__", (0.3,))
    with server(UPGRADED) as it:
        guest = socket.create_connection(("127.0.0.1", it.port), DEADLINE)
        guest.sendall(says)
        refused(guest)
        eventually(lambda: "timed out" in caplog.text, DEADLINE)
    assert it.monitor.states == []


@pytest.mark.parametrize("says", [HELLO, PREFACE, CONTROL_MAGIC], ids=["FLARE's", "preface", "magic"])
def test_a_tls_listener_takes_nothing_in_the_clear(says, pki, caplog):
    with server(UPGRADED, **pki["server"]) as it:
        guest = socket.create_connection(("127.0.0.1", it.port), DEADLINE)
        guest.sendall(says)
        refused(guest)
        eventually(lambda: "it does not speak TLS, which this listener requires" in caplog.text, DEADLINE)
    assert it.monitor.states == []


@pytest.mark.parametrize("alpn", [False, True])
def test_a_client_of_another_authority_is_refused(alpn, pki, caplog):
    context = tls_context(pki["stranger"], False)
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols([ALPN])
    with server(UPGRADED, **pki["server"]) as it:
        sock = socket.create_connection(("127.0.0.1", it.port), DEADLINE)
        with contextlib.suppress(OSError), context.wrap_socket(sock) as guest:
            guest.sendall(HELLO)
            assert guest.recv(1) == b""
        eventually(lambda: "the client's certificate is not trusted here" in caplog.text, DEADLINE)
    assert it.monitor.states == []


def test_in_tls_nothing_is_taken_before_a_hello(pki, caplog):
    context = tls_context(pki["site"], False)
    with server(UPGRADED, **pki["server"]) as it:
        with socket.create_connection(("127.0.0.1", it.port), DEADLINE) as sock, context.wrap_socket(sock) as guest:
            guest.sendall(struct.pack(">IHBBHHHH", 1 << 30, 0, Types.DATA, 0, 0, 0, 1, 1))
            with contextlib.suppress(OSError):
                assert guest.recv(1) == b""
        eventually(lambda: "it speaks neither" in caplog.text, DEADLINE)
    assert it.monitor.states == []


def test_a_hello_may_come_in_pieces_and_with_more_behind_it():
    with server(UPGRADED) as it, socket.create_connection(("127.0.0.1", it.port), DEADLINE) as guest:
        guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HELLO[:20]:
            guest.sendall(bytes([byte]))
        guest.sendall(HELLO[20:] + frame(300) + frame(100_000))
        for expected in (HELLO, frame(300), frame(100_000)):
            assert it.monitor.frames.get(timeout=DEADLINE) == expected


def test_a_site_that_speaks_flares_has_only_so_many_connections(monkeypatch, caplog):
    monkeypatch.setattr(sites, "MAX_CONNECTIONS_OF_SITE", 2)
    monkeypatch.setattr(upgrade_module, "certified_site_of", lambda properties: "site-1")
    with server(UPGRADED) as it, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running(it.url, Mode.ACTIVE, FLARES_OWN)) for _ in range(4)]
        for client in clients:
            greet(client, it)
        it.monitor.wait_for(ConnState.CLOSED, 2)
        assert "site-1 has 2 connections, which are the most for one site; the oldest is closed" in caplog.text
    eventually(lambda: it.driver._sites.sites == [])


def test_sites_behind_one_address_that_speak_flares_are_not_counted_as_one(monkeypatch, caplog):
    monkeypatch.setattr(sites, "MAX_CONNECTIONS_OF_SITE", 1)
    said = upgrade_module.FlareConnection.get_conn_properties
    monkeypatch.setattr(
        upgrade_module.FlareConnection, "get_conn_properties", lambda self: {**said(self), "peer_addr": "192.0.2.1:1"}
    )
    with server(UPGRADED) as it, contextlib.ExitStack() as stack:
        for _ in range(2):
            greet(stack.enter_context(running(it.url, Mode.ACTIVE, FLARES_OWN)), it)
        assert it.driver._sites.sites == [""]
        assert "the oldest is closed" not in caplog.text


def test_a_guest_that_speaks_flares_has_its_place_until_its_hello(monkeypatch, caplog):
    monkeypatch.setattr("nvflare_rdma.channel.guests.MAX_HANDSHAKES_OF_SOURCE", 2)
    with server(UPGRADED) as it:
        silent = []
        for _ in range(2):
            guest = socket.create_connection(("127.0.0.1", it.port), DEADLINE)
            guest.sendall(HELLO[:30])
            silent.append(guest)
        for number in range(1, 4):  # each is let in, and has no place any more
            with running(it.url, Mode.ACTIVE, FLARES_OWN) as client:
                greet(client, it)
            it.monitor.wait_for(ConnState.CLOSED, number)
        refused(silent[0])
        silent[1].close()
        assert caplog.text.count("too many guests") == 1


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "mTLS"])
def test_a_peer_that_takes_nothing_is_given_up(secure, pki, monkeypatch):
    """FLARE's limit for sending (`streaming_send_timeout`) holds in FLARE's words."""
    from nvflare.fuel.f3.comm_config import CommConfigurator

    monkeypatch.setattr(CommConfigurator, "get_streaming_send_timeout", lambda self, default: 0.5)
    with server(UPGRADED, **(pki["server"] if secure else {})) as it:
        sock = socket.create_connection(("127.0.0.1", it.port), DEADLINE)
        guest = tls_context(pki["site"], False).wrap_socket(sock) if secure else sock
        with guest:
            guest.sendall(HELLO)
            it.monitor.wait_for(ConnState.CONNECTED)
            with pytest.raises(CommError) as told:
                send_on_and_on(it.monitor.connections[0])
            assert told.value.code == CommError.TIMEOUT
            it.monitor.wait_for(ConnState.CLOSED)


def test_shutdown_ends_all_of_them(pki):
    for listener, dialler in PAIRS:
        with server(listener) as it:
            client = Running(it.url, Mode.ACTIVE, dialler)
            greet(client, it)
            if listener is UPGRADED:
                with socket.create_connection(("127.0.0.1", it.port), DEADLINE) as half:
                    half.sendall(HELLO[:12])
                    it.driver.shutdown()
                    it.join()
                    refused(half)
                it.monitor.wait_for(ConnState.CLOSED)
            client.driver.shutdown()
            client.join()
        assert client.monitor.states == [ConnState.CONNECTED, ConnState.CLOSED]


def test_shutdown_ends_the_question():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Running(f"tcp://127.0.0.1:{silent.getsockname()[1]}", Mode.ACTIVE, UPGRADED)
        peer, _ = silent.accept()
        assert peer.recv(100) == PREFACE
        client.driver.shutdown()
        client.join()
        peer.close()
    assert client.monitor.states == []


def test_a_peer_that_does_not_answer_is_spoken_to_in_flares_words(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    monkeypatch.setattr(upgrade_module, "GREETING_TIMEOUT", 0.3)
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, running(f"tcp://127.0.0.1:{silent.getsockname()[1]}", Mode.ACTIVE, UPGRADED) as client:
        first, _ = silent.accept()
        second, _ = silent.accept()
        client.monitor.wait_for(ConnState.CONNECTED)
        client.monitor.connections[0].send_frame(HELLO)
        assert second.recv(100) == HELLO
        first.close()
        second.close()
    (line,) = lines(caplog)
    assert f"{FLARES} is spoken with" in line
    assert "it did not answer for 0.3 s" in line


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl(1)")
def test_a_tls_server_that_refuses_our_alpn_is_dialled_without_it(pki, caplog):
    """As some proxies do that end TLS and know only protocols of their own."""
    caplog.set_level(logging.INFO, "nvflare_rdma")
    port, files = free_port(), pki["server"]
    arguments = ["-accept", f"127.0.0.1:{port}", "-cert", files["server_cert"], "-key", files["server_key"]]
    command = ["openssl", "s_server", *arguments, "-alpn", "h2", "-quiet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as proxy:
        try:
            wait_for_port(port)
            with running(f"stcp://127.0.0.1:{port}", Mode.ACTIVE, UPGRADED, **pki["site"]) as client:
                client.monitor.wait_for(ConnState.CONNECTED)
                client.monitor.connections[0].send_frame(HELLO)
                assert proxy.stdout is not None
                assert proxy.stdout.read(len(HELLO)) == HELLO
        finally:
            proxy.kill()
    (line,) = lines(caplog)
    assert f"as it refuses a TLS handshake that offers {ALPN}" in line


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_an_upgraded_listener_takes_both_kinds_of_addresses(family):
    port, host = free_port(), "[::1]" if family == "IPv6" else "127.0.0.1"
    with running(f"tcp://0:{port}", Mode.PASSIVE, UPGRADED) as it:
        wait_for_port(port)
        with running(f"tcp://{host}:{port}", Mode.ACTIVE, UPGRADED) as client:
            greet(client, it)
            assert it.monitor.connections[-1].get_conn_properties()["peer_addr"].startswith(f"{host}:")
        if family == "IPv4":
            with running(f"tcp://{host}:{port}", Mode.ACTIVE, FLARES_OWN) as client:
                greet(client, it)
                assert it.monitor.connections[-1].get_conn_properties()["peer_addr"].startswith(f"{host}:")


def test_its_port_is_shared():
    with server(UPGRADED) as it:
        assert comes_to_takers(it.port)


# -- taking over -------------------------------------------------------------------------------------------


@pytest.fixture
def flares_drivers(monkeypatch):
    """FLARE's drivers, as they are before a folder of others is looked at."""
    manager = DriverManager()
    for driver in (TcpDriver, RdmaDriver):
        manager.register(driver)
    manager.drivers["grpc"] = manager.drivers["http"] = object
    monkeypatch.setattr(communicator, "driver_mgr", manager)
    ConfigService.reset()  # it remembers what it has read of the environment
    yield manager.drivers
    ConfigService.reset()


@pytest.mark.parametrize(("value", "taken"), [("true", True), ("True", True), ("false", False), (None, False)])
def test_only_where_it_is_asked_for_are_tcp_and_stcp_taken_over(value, taken, flares_drivers, monkeypatch, caplog):
    if value is not None:
        monkeypatch.setenv("NVFLARE_RDMA_UPGRADE", value)
    take_over_where_asked()
    expected = UPGRADED if taken else FLARES_OWN
    assert flares_drivers == {
        **{"tcp": expected, "stcp": expected},
        **{"rdma": RdmaDriver, "srdma": RdmaDriver, "grpc": object, "http": object},
    }
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_bad_value_is_an_error_that_says_what_follows(flares_drivers, monkeypatch, caplog):
    monkeypatch.setenv("NVFLARE_RDMA_UPGRADE", "maybe")
    take_over_where_asked()
    (line,) = caplog.messages
    assert line.startswith("rdma_upgrade='maybe' is neither true nor false. Allowed: true, false.")
    assert "FLARE's own driver keeps the schemes tcp and stcp" in line
    assert flares_drivers["tcp"] is FLARES_OWN


def test_another_bad_setting_does_not_hide_the_upgrade(flares_drivers, monkeypatch):
    monkeypatch.setenv("NVFLARE_RDMA_UPGRADE", "true")
    monkeypatch.setenv("NVFLARE_RDMA_RAILS", "many")
    take_over_where_asked()
    with running("tcp://127.0.0.1:1", Mode.ACTIVE, flares_drivers["tcp"]) as client:
        client.join()
        assert isinstance(client.error, CommError)
        assert "rdma_rails='many'" in str(client.error)
        assert client.connector.stopped.is_set()
