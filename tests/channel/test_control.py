"""The control stream's TLS over memory BIOs."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest

from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.control_writer import ControlWriter
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.limits import ChannelLimits
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.errors import TransferError
from nvflare_rdma.fabric.tcp import TcpFabric
from tests.support.certificates import Authority
from tests.support.tcp_pair import DEADLINE, context, in_parallel
from tests.support.trickling import TlsPeer, trickle


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("pki"))
    files = authority.issue("server", "server")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(files["server_cert"], files["server_key"])
    client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=authority.root)
    client.check_hostname = False
    return client, server


@pytest.fixture
def streams(contexts):
    near, far = socket.socketpair()
    client, server = ControlStream(near, contexts[0]), ControlStream(far, contexts[1], server_side=True)
    yield client, server
    client.close()
    server.close()


def test_a_message_that_comes_with_the_end_of_the_handshake_is_not_missed(contexts):
    """The client's last handshake record and its first message reach the server in one piece."""
    near, far = socket.socketpair()
    server = ControlStream(far, contexts[1], server_side=True)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[0].wrap_bio(incoming, outgoing)
    near.settimeout(DEADLINE)

    def greet() -> None:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        near.sendall(outgoing.read())
        while True:
            incoming.write(near.recv(65536))
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
        client.write(b"hello")
        near.sendall(outgoing.read())

    in_parallel(greet, lambda: server.handshake(DEADLINE))
    assert server.receive(DEADLINE) == b"hello"
    near.close()
    server.close()


def test_large_messages_both_ways_and_the_end(streams):
    client, server = streams
    in_parallel(lambda: client.handshake(DEADLINE), lambda: server.handshake(DEADLINE))
    data = bytes(range(256)) * 8000
    for sender, receiver in ((client, server), (server, client)):
        received = bytearray()

        def collect(receiver=receiver, received=received) -> None:
            while len(received) < len(data):
                received.extend(receiver.receive(DEADLINE))

        in_parallel(lambda sender=sender: sender.send(sender.protect([data[:100], data[100:]])), collect)
        assert received == data
    client.close()
    assert server.receive(DEADLINE) == b""


def test_receive_gives_up_after_its_timeout_without_closing(streams):
    client, server = streams
    in_parallel(lambda: client.handshake(DEADLINE), lambda: server.handshake(DEADLINE))
    assert server.receive(0.05) is None
    client.send(client.protect([b"late"]))
    assert server.receive(DEADLINE) == b"late"


def secure_peer(contexts):
    """A stream of this side, and the peer at its other end, after their handshake."""
    near, far = socket.socketpair()
    peer, server = TlsPeer(near, contexts[0]), ControlStream(far, contexts[1], server_side=True)
    in_parallel(peer.greet, lambda: server.handshake(DEADLINE))
    return peer, server


def test_a_record_that_trickles_holds_receive_no_longer_than_its_timeout(contexts):
    peer, server = secure_peer(contexts)
    record, received = peer.encrypt(bytes(16_000)), []
    thread = threading.Thread(target=lambda: received.append(server.receive(1.0)), daemon=True)
    with peer.sock, trickle(peer.sock, record):
        thread.start()
        thread.join(DEADLINE)
        assert not thread.is_alive(), "one byte after the other puts the deadline off"
    assert received == [None]
    server.close()


def test_what_had_come_of_a_record_by_the_timeout_is_not_lost(contexts):
    peer, server = secure_peer(contexts)
    record = peer.encrypt(b"hello")
    peer.sock.sendall(record[:10])
    assert server.receive(0.05) is None
    peer.sock.sendall(record[10:])
    assert server.receive(0.0) == b"hello"
    peer.sock.close()
    server.close()


def test_a_greeting_that_trickles_in_one_record_ends_at_the_handshakes_deadline(contexts):
    peer, server = secure_peer(contexts)
    limits = ChannelLimits(max_message_bytes=1 << 20, handshake_timeout=0.5)
    link, errors = Link(server, Role.PASSIVE, {"tcp": TcpFabric(1)}, context(limits), print, "link"), []

    def open_link() -> None:
        try:
            link.open()
        except TransferError as error:
            errors.append(str(error))

    thread = threading.Thread(target=open_link, daemon=True)
    with peer.sock, trickle(peer.sock, peer.encrypt(bytes(16_000))):
        thread.start()
        thread.join(DEADLINE)
        assert not thread.is_alive(), "one byte after the other puts the deadline off"
    assert errors == ["the peer did not finish the handshake in 0.5 s"]


def test_a_handshake_that_trickles_has_one_deadline_in_all(contexts):
    near, far = socket.socketpair()
    client = contexts[0].wrap_bio(ssl.MemoryBIO(), outgoing := ssl.MemoryBIO())
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    stop = threading.Event()

    def trickle() -> None:
        for byte in hello:
            if stop.wait(0.05):
                return
            far.send(bytes([byte]))

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    with far, pytest.raises(TimeoutError):
        ControlStream(near, contexts[1], server_side=True).handshake(0.5)
    stop.set()
    thread.join(DEADLINE)


def test_a_handshake_with_a_silent_peer_times_out(contexts):
    near, far = socket.socketpair()
    with far, pytest.raises(TimeoutError):
        ControlStream(near, contexts[0]).handshake(0.2)


@pytest.mark.parametrize("queued", [False, True], ids=["at once", "by the thread"])
def test_a_writer_that_fails_of_anything_closes_the_stream(queued, caplog):
    near, far = socket.socketpair()
    room = threading.Condition()
    writer = ControlWriter(ControlStream(near), room, lambda: False, "test")
    writer.start()
    with far:
        far.settimeout(DEADLINE)
        with room:
            writer.send_locked(["no bytes", *[bytes(1 << 18)] * queued], 0)
        assert far.recv(1) == b""
    writer.stop(DEADLINE)
    assert "test: the control stream can't be written, and is closed: " in caplog.text


def test_a_stream_that_was_closed_here_is_not_waited_for():
    """Its descriptor may be another socket's by now."""
    near, far = socket.socketpair()
    stream, number = ControlStream(near), near.fileno()
    stream.close()
    others = [socket.socketpair() for _ in range(4)]
    assert number in [sock.fileno() for pair in others for sock in pair]
    with pytest.raises(OSError, match="closed"):
        stream.receive(0.1)
    for sock in (far, *(sock for pair in others for sock in pair)):
        sock.close()


def test_a_peer_that_reads_nothing_of_what_it_causes_ends_its_link():
    near, far = socket.socketpair()
    room = threading.Condition()
    writer = ControlWriter(ControlStream(near), room, lambda: False, "link")
    writer.start()

    def answer(times: int, inline: int = 0) -> None:
        with room:
            for _ in range(times):
                writer.send_locked([bytes(64 * 1024)], inline)

    with near, far:
        answer(1000, 64 * 1024)  # what this side sends by itself is bounded elsewhere
        answer(100)
        with pytest.raises(TransferError, match="does not read what it causes"):
            answer(1000)
        far.close()
        writer.stop(DEADLINE)
        assert not writer.thread.is_alive()


def test_bytes_without_messages_come_in_parts_and_end_with_the_stream(streams):
    client, server = streams
    in_parallel(lambda: client.handshake(DEADLINE), lambda: server.handshake(DEADLINE))
    data = bytes(range(256)) * 4096
    got = bytearray(len(data) + 10)

    def send() -> None:
        left = memoryview(data)
        while left:
            left = left[client.send_part(left, DEADLINE) :]
        # A peer may end TLS with a goodbye, as OpenSSL's own programs do.
        with contextlib.suppress(ssl.SSLWantReadError):
            client._tls.unwrap()
        client._flush()

    def receive() -> int:
        size = 0
        while part := server.receive_into(memoryview(got)[size:]):
            size += part
        return size

    received: list[int] = []
    in_parallel(send, lambda: received.append(receive()))
    assert received == [len(data)]
    assert got[: len(data)] == data


def test_a_part_that_is_not_taken_in_time_is_an_error(streams):
    client, server = streams
    in_parallel(lambda: client.handshake(DEADLINE), lambda: server.handshake(DEADLINE))
    data = memoryview(bytes(1024 * 1024))

    def fill() -> None:
        while True:
            client.send_part(data, 0.2)

    with pytest.raises(TimeoutError, match=r"the peer took nothing for 0\.2 s"):
        fill()


def test_both_ends_know_what_they_have_agreed_on(contexts):
    def agreed(offered: list[str], known: list[str]) -> tuple[str, str]:
        client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        if offered:
            client.set_alpn_protocols(offered)
        contexts[1].set_alpn_protocols(known)
        pair = socket.socketpair()
        near, far = ControlStream(pair[0], client), ControlStream(pair[1], contexts[1], server_side=True)
        in_parallel(lambda: near.handshake(DEADLINE), lambda: far.handshake(DEADLINE))
        try:
            return near.alpn, far.alpn
        finally:
            near.close()
            far.close()

    assert agreed(["one"], ["one"]) == ("one", "one")
    assert agreed(["other"], ["one"]) == agreed([], ["one"]) == ("", "")
    assert ControlStream(socket.socketpair()[0]).alpn == ""
