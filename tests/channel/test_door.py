"""The door on real sockets, without FLARE: who is let in, who is not, and how it closes."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import resource
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nvflare_rdma.channel import guests as guests_module
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.door import Door, Pending, dial
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC
from nvflare_rdma.errors import TlsError, TransferError
from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TICKET_BYTES, TcpFabric
from nvflare_rdma.logs import get_logger
from tests.support.certificates import Authority
from tests.support.link_process import tls_context
from tests.support.tcp_pair import DEADLINE, context, in_parallel
from tests.support.waiting import eventually

FOR_EVER = 600.0
TLS_RECORD = b"\x16"


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """By whether it is secure: (the dialling side's, the door's)."""
    authority = Authority(tmp_path_factory.mktemp("pki"))
    files = {**authority.issue("server", "server"), **authority.issue("client", "client")}
    return {False: (None, None), True: (tls_context(files, False), tls_context(files, True))}


@pytest.fixture(params=[False, True], ids=["clear", "tls"])
def tls(request, contexts):
    return contexts[request.param]


class Open:
    """A door that serves in a thread and keeps what it welcomes."""

    def __init__(self, tls=None, greeting_timeout: float = FOR_EVER) -> None:
        self.fabric = TcpFabric(2)
        self.welcomed: queue.Queue[tuple[socket.socket, ControlStream]] = queue.Queue()
        self.refusal: Exception | None = None
        self.admits = True
        self.undecided: queue.Queue[socket.socket] = queue.Queue()
        listener = socket.create_server(("127.0.0.1", 0))
        self.door = Door(
            listener, (lambda: tls) if tls else None, self.fabric, self._on_connection, "the door", greeting_timeout
        )
        self._before = set(threading.enumerate())
        self._thread = threading.Thread(target=self.door.serve, daemon=True)
        self._thread.start()

    def _on_connection(self, sock: socket.socket, stream: ControlStream, admitted: Callable[[], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self.admits:
            admitted()
        else:
            self.undecided.put(sock)
            sock.recv(1)  # until the door gives its place to somebody else
            sock.close()
            return
        self.welcomed.put((sock, stream))

    def guest(self, says: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.door.address, DEADLINE)
        sock.sendall(says)
        return sock

    def in_greeting(self) -> int:
        return sum(t.name.startswith("rdma-conn-") for t in set(threading.enumerate()) - self._before)

    def join(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the door does not close"


@contextmanager
def open_door(tls=None, greeting_timeout: float = FOR_EVER) -> Iterator[Open]:
    it = Open(tls, greeting_timeout)
    try:
        yield it
    finally:
        it.door.close()
        it.join()


def test_a_door_that_asks_for_no_certificate_says_so(contexts, caplog):
    def lines():
        return [line for line in caplog.messages if "connection_security=tls" in line]

    _, mutual = contexts[True]
    one_sided = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    assert one_sided.verify_mode is ssl.CERT_NONE
    for tls in (None, mutual):
        with open_door(tls):
            pass
    assert not lines()
    with open_door(one_sided):
        (line,) = eventually(lines, DEADLINE)
    assert line.startswith("the door asks who dials for no certificate")


def assert_lets_in(it: Open, tls=None) -> None:
    sock, near = dial(it.door.address, tls, Pending(), DEADLINE)
    peer, far = it.welcomed.get(timeout=DEADLINE)
    assert sock.getpeername() == peer.getsockname()
    assert near.secure == far.secure == (tls is not None)
    for sender, receiver in ((near, far), (far, near)):
        sender.send(sender.protect([b"hello"]))
        assert receiver.receive(DEADLINE) == b"hello"
    near.close()
    far.close()


def assert_dropped(guest: socket.socket) -> None:
    with guest, contextlib.suppress(ConnectionResetError):  # that is when something it had said was not read
        assert guest.recv(1) == b""


def test_two_doors_of_one_process_let_their_own_peers_in(contexts):
    with open_door() as clear, open_door(contexts[True][1]) as secure:
        assert clear.door.address != secure.door.address
        for _ in range(2):
            assert_lets_in(clear)
            assert_lets_in(secure, contexts[True][0])


def test_a_link_and_its_rails_come_through_one_door(tls):
    with open_door(tls[1]) as it:
        _, stream = dial(it.door.address, tls[0], Pending(), DEADLINE)
        _, far = it.welcomed.get(timeout=DEADLINE)
        inbox: queue.Queue = queue.Queue()
        dialling = TcpFabric(2, lambda: socket.create_connection(it.door.address, DEADLINE))
        active = Link(stream, Role.ACTIVE, {"tcp": dialling}, context(), print, "active")
        passive = Link(far, Role.PASSIVE, {"tcp": it.fabric}, context(), inbox.put, "passive")
        in_parallel(active.open, passive.open)
        runners = [threading.Thread(target=link.run, daemon=True) for link in (active, passive)]
        for runner in runners:
            runner.start()
        assert active.fabric == passive.fabric == "tcp"
        active.send(bytes(1_000_000), DEADLINE)
        assert len(inbox.get(timeout=DEADLINE)) == 1_000_000
        active.close()
        for runner in runners:
            runner.join(DEADLINE)
            assert not runner.is_alive()
        assert it.welcomed.empty(), "a rail was taken for a control stream"


def test_a_rail_with_an_unknown_ticket_is_refused(tls, caplog):
    with open_door(tls[1]) as it:
        rail = it.guest(RAIL_MAGIC + bytes(TICKET_BYTES))
        assert rail.recv(1) == b"\x00"
        assert_dropped(rail)
        eventually(lambda: "its ticket is unknown, used or expired" in caplog.text, DEADLINE)
        assert_lets_in(it, tls[0])
        assert it.welcomed.empty()


@pytest.mark.parametrize(
    ("secure", "says", "reason"),
    [
        (False, b"GET / HTTP/1.1\r\n", "it is no nvflare-rdma peer; check the scheme in its URL"),
        (False, TLS_RECORD + b"\x03\x01", "it speaks TLS (srdma://), but this listener is clear (rdma://)"),
        (True, CONTROL_MAGIC, "it does not speak TLS, which this listener requires (srdma://)"),
        (True, TLS_RECORD + b"no TLS at all", "TLS with the client failed"),
        (False, CONTROL_MAGIC[:3], "it closed the connection in the middle of its greeting"),
        (True, TLS_RECORD + b"\x03\x01", "the peer closed the connection during the TLS handshake"),
    ],
    ids=["garbage", "TLS to a clear door", "clear to a TLS door", "broken TLS", "leaves", "leaves in TLS"],
)
def test_what_is_no_peer_is_refused_and_the_door_stays_open(contexts, caplog, secure, says, reason):
    mine, its = contexts[secure]
    with open_door(its) as it:
        guest = it.guest(says)
        own_address = f"127.0.0.1:{guest.getsockname()[1]}"
        with guest, contextlib.suppress(ConnectionResetError):
            with contextlib.suppress(OSError):  # it may have been dropped already
                guest.shutdown(socket.SHUT_WR)
            while guest.recv(4096):  # broken TLS is answered with an alert
                pass
        eventually(lambda: f"refused the connection from {own_address}: {reason}" in caplog.text, DEADLINE)
        assert_lets_in(it, mine)
        assert it.welcomed.empty()


@pytest.mark.parametrize(("secure", "says"), [(False, b""), (False, CONTROL_MAGIC[:3]), (True, TLS_RECORD)])
def test_a_guest_that_says_nothing_more_is_dropped_after_the_greeting_timeout(contexts, caplog, secure, says):
    with open_door(contexts[secure][1], greeting_timeout=0.5) as it:
        assert_dropped(it.guest(says))
        eventually(lambda: "refused the connection from 127.0.0.1" in caplog.text, DEADLINE)


@pytest.mark.parametrize(("secure", "says"), [(False, b""), (False, CONTROL_MAGIC[:3]), (True, TLS_RECORD)])
def test_closing_ends_a_greeting(contexts, caplog, secure, says):
    with open_door(contexts[secure][1]) as it:
        guest = it.guest(says)
        eventually(it.in_greeting, DEADLINE)
        it.door.close()
        it.join()
        assert_dropped(guest)
        eventually(lambda: not it.in_greeting(), DEADLINE)
    assert caplog.text == ""  # it was this side's wish


def test_a_door_that_is_closed_before_it_serves_gives_its_port_back():
    listener = socket.create_server(("127.0.0.1", 0))
    door = Door(listener, None, TcpFabric(1), print, "the door")
    door.close()
    thread = threading.Thread(target=door.serve, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert listener.fileno() == -1


def test_closing_leaves_alone_what_was_welcomed(tls):
    with open_door(tls[1]) as it:
        _, near = dial(it.door.address, tls[0], Pending(), DEADLINE)
        _, far = it.welcomed.get(timeout=DEADLINE)
        it.door.close()
        it.join()
        near.send(near.protect([b"hello"]))
        assert far.receive(DEADLINE) == b"hello"
        near.close()
        far.close()


def test_a_guest_has_its_place_until_it_is_let_in(monkeypatch, caplog):
    monkeypatch.setattr(guests_module, "MAX_HANDSHAKES_OF_SOURCE", 3)
    with open_door() as it:
        it.admits = False
        silent = [it.guest(says) for says in (CONTROL_MAGIC, b"", CONTROL_MAGIC)]
        assert {it.undecided.get(timeout=DEADLINE).getpeername() for _ in range(2)} == {
            silent[0].getsockname(),
            silent[2].getsockname(),
        }
        eventually(lambda: it.in_greeting() == 3, DEADLINE)
        it.admits = True
        for _ in range(3):  # one after the other comes in, though all places are taken
            assert_lets_in(it)
        assert_dropped(silent[0])  # the oldest made room, once: who is let in has no place any more
        assert caplog.text.count("too many guests have not said who they are; the oldest of them goes") == 1
        for guest in silent[1:]:
            guest.setblocking(False)
            with pytest.raises(BlockingIOError):
                guest.recv(1)
            guest.close()


def test_a_thousand_guests_do_not_fill_the_log(caplog, monkeypatch):
    monkeypatch.setattr(guests_module, "_COMPLAINTS_SECONDS", FOR_EVER)
    with open_door() as it:
        for _ in range(guests_module._COMPLAINTS + 10):
            assert_dropped(it.guest(b"garbage!"))
        assert_lets_in(it)
        eventually(lambda: it.in_greeting() == 0, DEADLINE)  # it is dropped first, and the line comes then
        assert caplog.text.count("refused the connection") == guests_module._COMPLAINTS
        monkeypatch.setattr(guests_module, "_COMPLAINTS_SECONDS", -1.0)
        assert_dropped(it.guest(b"garbage!"))
        eventually(lambda: "the door: 10 more lines about guests were left out" in caplog.text, DEADLINE)


def test_what_is_logged_of_a_guest_waits_until_it_is_let_in(caplog):
    caplog.set_level(logging.INFO)
    log = guests_module.GuestLog(get_logger("nvflare_rdma.test"), True)
    for number in range(100):
        log.warning("line %d", number)
    assert not caplog.messages
    try:
        raise ValueError("a fault of this side")
    except ValueError:
        log.exception("it ends")
    assert caplog.messages == ["it ends"]
    log.let_in()
    assert caplog.messages[1:] == [f"line {number}" for number in range(guests_module._MOST_KEPT)]
    log.info("later")
    log.let_in()
    assert caplog.messages[-1] == "later"


def test_places_are_counted_by_source():
    most, most_of_one = guests_module.MAX_HANDSHAKES, guests_module.MAX_HANDSHAKES_OF_SOURCE
    guests, socks = guests_module.Guests(), [socket.socket() for _ in range(most + 3)]
    try:
        of_one, others, late = socks[:most_of_one], socks[most_of_one:most], socks[most:]
        assert all(guests.enter(sock, "10.0.0.1") is None for sock in of_one)
        assert all(guests.enter(sock, f"2001:db8:{n:x}::1") is None for n, sock in enumerate(others))
        assert guests.enter(late[0], "10.0.0.2") is of_one[0]  # whoever has most of them gives one
        guests.leave(of_one[1])
        assert guests.enter(late[1], "2001:db8:0::ffff") is None
        guests.leave(late[1])
        assert guests.enter(late[2], "::ffff:10.0.0.1") is None
        assert guests.enter(late[1], "10.0.0.1") is of_one[2]  # the same source, in other words
    finally:
        for sock in socks:
            sock.close()


def test_an_error_of_the_welcome_is_that_connections_alone(tls, caplog):
    with open_door(tls[1]) as it:
        it.refusal = TransferError("no room")
        _, near = dial(it.door.address, tls[0], Pending(), DEADLINE)
        assert near.receive(DEADLINE) == b""
        eventually(lambda: "refused the connection from 127.0.0.1" in caplog.text, DEADLINE)
        assert "no room" in caplog.text
        near.close()
        it.refusal = None
        assert_lets_in(it, tls[0])


def test_only_so_many_guests_are_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(guests_module, "MAX_HANDSHAKES", 2)
    with open_door() as it:
        guests = [it.guest() for _ in range(5)]
        for oldest in guests[:3]:
            assert_dropped(oldest)
        eventually(lambda: it.in_greeting() == 2, DEADLINE)
        for guest in guests[3:]:
            guest.close()
        eventually(lambda: not it.in_greeting(), DEADLINE)
        caplog.clear()
        for _ in range(3):  # who has greeted, or was refused, is no guest any more
            assert_lets_in(it)
            assert_dropped(it.guest(b"garbage!"))
        assert "too many guests" not in caplog.text


def test_without_descriptors_the_port_stays_open(caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_door() as it, socket.socket() as guest:
        guest.settimeout(DEADLINE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            guest.connect(it.door.address)
            guest.sendall(CONTROL_MAGIC)
            eventually(lambda: "can't accept a connection on the door" in caplog.text, DEADLINE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        _, stream = it.welcomed.get(timeout=DEADLINE)
        stream.close()
        assert_lets_in(it)


def test_a_listener_that_somebody_has_shut_ends_its_door_with_one_line(caplog):
    it = Open()
    assert_lets_in(it)
    guest = it.guest(CONTROL_MAGIC[:1])
    eventually(it.in_greeting, DEADLINE)
    it.door._listener.shutdown(socket.SHUT_RDWR)  # as a forked process may, that has inherited it
    it.join()
    assert it.door.is_over
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the door listens no more, as its socket was shut down ([Errno 22]" in line
    with socket.create_server(it.door.address):
        pass  # the port is free
    guest.sendall(CONTROL_MAGIC[1:])  # who was in goes on
    it.welcomed.get(timeout=DEADLINE)
    guest.close()
    it.door.close()


def test_an_error_of_this_side_ends_the_guests_connection(caplog):
    with open_door() as it:
        it.refusal = RuntimeError("can't start new thread")
        assert_dropped(it.guest(CONTROL_MAGIC))
        eventually(lambda: "ended the connection from 127.0.0.1" in caplog.text, DEADLINE)
        it.refusal = None
        assert_lets_in(it)


# -- dialling ----------------------------------------------------------------------------------------------


def test_peers_of_two_authorities_are_told_so_on_both_sides(contexts, tmp_path, caplog):
    stranger = tls_context(Authority(tmp_path, "another-project").issue("client", "client"), False)
    with open_door(contexts[True][1]) as it:
        with pytest.raises(TlsError, match="the server's certificate is not trusted here"):
            dial(it.door.address, stranger, Pending(), DEADLINE)
        eventually(lambda: "the client does not trust this side's certificate" in caplog.text, DEADLINE)
        assert_lets_in(it, contexts[True][0])


@pytest.mark.parametrize(
    ("age", "why"), [(400, "has expired"), (-2, "is not valid yet")], ids=["expired", "of tomorrow"]
)
@pytest.mark.parametrize("whose", ["server", "client"])
def test_a_certificate_of_another_time_is_told_as_such(tmp_path, caplog, age, why, whose):
    authority = Authority(tmp_path)
    server = authority.issue("server", "server", age=age if whose == "server" else 0)
    client = authority.issue("client", "client", age=age if whose == "client" else 0)
    if whose == "server":
        with open_door(tls_context(server, True)) as it:
            with pytest.raises(TlsError, match=f"^the server's certificate {why}, by this side's clock: "):
                dial(it.door.address, tls_context(client, False), Pending(), DEADLINE)
            eventually(lambda: "this side's certificate" in caplog.text, DEADLINE)
        return
    with open_door(tls_context(server, True)) as it:
        _, near = dial(it.door.address, tls_context(client, False), Pending(), DEADLINE)
        with pytest.raises(TlsError, match=r"the server does not (take|trust) this side's certificate"):
            near.receive(DEADLINE)  # TLS 1.3: the server judges it when the client's handshake is over
        near.close()
        eventually(lambda: f"the client's certificate {why}, by this side's clock: " in caplog.text, DEADLINE)


def test_dialling_gives_up_on_a_silent_listener(contexts):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        dial(silent.getsockname(), contexts[True][0], Pending(), 0.2)


def test_closing_what_is_pending_ends_a_greeting_that_was_dialled(contexts):
    pending, errors = Pending(), queue.Queue()

    def try_to_dial() -> None:
        try:
            dial(silent.getsockname(), contexts[True][0], pending, FOR_EVER)
        except OSError as error:
            errors.put(error)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        thread = threading.Thread(target=try_to_dial, daemon=True)
        thread.start()
        peer, _ = silent.accept()
        assert peer.recv(1) == TLS_RECORD  # it has begun
        pending.close()
        assert isinstance(errors.get(timeout=DEADLINE), OSError)
        thread.join(DEADLINE)
        peer.close()


def test_nothing_is_dialled_any_more_after_that(tls):
    pending = Pending()
    pending.close()
    with open_door(tls[1]) as it:
        with pytest.raises(ConnectionAbortedError):
            dial(it.door.address, tls[0], pending, DEADLINE)
        eventually(lambda: not it.in_greeting(), DEADLINE)
        assert it.welcomed.empty()


def test_connections_of_other_kinds_go_to_whoever_takes_them(tls):
    came: queue.Queue = queue.Queue()
    with open_door(tls[1]) as it:
        it.door.takers[b"OTHERKND"] = lambda sock, left, admitted: came.put(("taker", sock, left, admitted))
        it.door.stranger = lambda sock, first, admitted: came.put(("stranger", sock, first, admitted))
        for words, kind in ((b"OTHERKND and more", "taker"), (b"something else", "stranger")):
            with it.guest(words):
                who, taken, what, admitted = came.get(timeout=DEADLINE)
                assert who == kind
                assert what == words[:8] if kind == "stranger" else 0 < what <= FOR_EVER
                admitted()
                with taken:
                    taken.settimeout(DEADLINE)
                    assert taken.recv(64) == words[8:]
        assert_lets_in(it, tls[0])
