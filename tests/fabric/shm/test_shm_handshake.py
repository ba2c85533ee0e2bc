"""How shm peers meet: tickets, credentials, and the choice of a path when reading a peer's memory is forbidden."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import types
from pathlib import Path

import pytest

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.shm import handshake, process_memory
from nvflare_rdma.fabric.shm.fabric import ShmFabric
from nvflare_rdma.logs import Seldom
from tests.support.recorder import Recorder
from tests.support.shm_peer import DEADLINE, Peer, RemotePeer, digest, pattern
from tests.support.waiting import eventually

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="changes the user of a process")
NOBODY = 65534


def listening(name: str) -> bool:
    """Whether a socket accepts connections (flag 0x10000) under this abstract name."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(line[-1] == f"@{name}" and int(line[3], 16) & 0x10000 for line in lines[1:])


@contextlib.contextmanager
def peers():
    near, far = Peer(), RemotePeer()
    try:
        yield near, far
    finally:
        far.end()
        if hasattr(near, "endpoint"):
            near.close()


def transfers(near, far) -> None:
    """Bytes go both ways."""
    for receiver, sender in ((near, far), (far, near)):
        receiver.buffer(9, 100_000)
        sender.write(9, receiver.expose(9, 9, 0, 100_000), 4, 100_000)
        assert receiver.landed() == [9, 100_000, 4]
        assert receiver.digest(9) == digest(pattern(4, 100_000))


def test_an_offer_is_used_once_and_leaves_nothing_behind():
    with peers() as (near, far):
        offer = near.offer()
        assert listening(offer["name"])
        far.connect(offer)
        transfers(near, far)
        eventually(lambda: not listening(offer["name"]))
        with RemotePeer() as other, pytest.raises(RuntimeError, match="FabricError: nobody listens"):
            other.connect(offer)
        transfers(near, far)


def test_a_wrong_ticket_is_refused_and_the_right_one_still_works():
    with peers() as (near, far):
        offer = near.offer()
        for wrong in ("00" * 32, offer["ticket"][:-2] + "00" if offer["ticket"][-2:] != "00" else "11" * 32):
            with pytest.raises(RuntimeError, match="FabricError: the shm peer refused the ticket"):
                far.connect({**offer, "ticket": wrong})
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as noise:
            noise.connect(f"\0{offer['name']}")
            noise.send(b"GET / HTTP/1.1\r\n")
        far.connect(offer)
        transfers(near, far)


def stranger(offer) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as noise:
        noise.settimeout(DEADLINE)
        noise.connect(f"\0{offer['name']}")
        noise.send(b"GET / HTTP/1.1\r\n")
        noise.recv(64)  # that it is refused


def test_strangers_do_not_fill_the_log(caplog, monkeypatch):
    """Each link that opens has a listener of its own."""
    monkeypatch.setattr(handshake, "_strangers", Seldom(600.0))
    for _ in range(3):
        with peers() as (near, far):
            offer = near.offer()
            for _ in range(5):
                stranger(offer)
            far.connect(offer)
            transfers(near, far)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "presented a wrong ticket" in caplog.text


def test_an_offer_expires(monkeypatch):
    monkeypatch.setattr(handshake, "OFFER_LIFETIME", 0.05)
    with peers() as (near, far):
        offer = near.offer()
        eventually(lambda: not listening(offer["name"]))
        with pytest.raises(RuntimeError, match=r"FabricError: nobody listens.*expired"):
            far.connect(offer)
        assert near.endpoint.rails == 0


def test_closing_the_endpoint_withdraws_its_offer():
    near = Peer()
    offer = near.offer()
    near.close()
    assert not listening(offer["name"])
    assert near.endpoint.rails == 0


def test_closing_the_endpoint_ends_a_set_up_that_hangs(monkeypatch):
    monkeypatch.setattr(handshake, "SETUP_TIMEOUT", 10 * DEADLINE)
    near = Peer()
    offer = near.offer()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.settimeout(DEADLINE)
        silent.connect(f"\0{offer['name']}")
        silent.send(handshake.MAGIC + bytes.fromhex(offer["ticket"]))
        assert silent.recv(64) == b"admitted"
        closer = threading.Thread(target=near.close, daemon=True)
        closer.start()
        while silent.recv(64):
            pass
        closer.join(DEADLINE)
        assert not closer.is_alive()
    assert not listening(offer["name"])


def test_all_steps_of_a_set_up_have_one_deadline(monkeypatch):
    """A peer that answers each step, and takes 4 s for it."""
    now, token = [0.0], bytes(32)
    hello = handshake._HELLO.pack(process_memory.address_of(memoryview(token)), token)
    monkeypatch.setattr(handshake, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    name = f"nvflare-rdma-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen()

        def answer() -> None:
            guest, _ = listener.accept()
            with guest, contextlib.suppress(OSError):
                for reply in (b"admitted", hello, b"yes", b"no", b"direct", b"yes"):
                    if not guest.recv(256):
                        return
                    now[0] += 4.0
                    guest.send(reply)
                guest.send(handshake.READY)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        offer = {"name": name, "ticket": bytes(32)}
        with pytest.raises(FabricError, match="did not answer within 10 s"):
            handshake.dial(offer, handshake.PATHS)
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_write_before_the_peer_has_come_ends_at_once():
    near = Peer()
    near.offer()
    near.buffer(1, 10)
    near.write(7, near.expose(1, 7, 0, 10), 1, 10)
    assert near.written() == 7
    near.close()


@AS_ROOT
@pytest.mark.parametrize("stranger", ["dials", "listens"])
def test_another_user_is_refused_on_both_sides(stranger):
    with peers() as (near, far):
        far.become(NOBODY)
        if stranger == "dials":
            offer = near.offer()
            with pytest.raises(RuntimeError, match="runs as user 0, this process as 65534"):
                far.connect(offer)
            assert far.show_ticket(offer) == ""
            assert near.endpoint.rails == 0
        else:
            with pytest.raises(FabricError, match="runs as user 65534, this process as 0"):
                near.connect(far.offer())


@pytest.mark.parametrize(
    "offer",
    [{}, {"name": "x"}, {"name": b"x", "ticket": bytes(32)}, {"name": "x" * 101, "ticket": bytes(32)}]
    + [{"name": "x", "ticket": ticket} for ticket in (bytes(31), "x" * 32, None)],
)
def test_a_malformed_offer_is_a_protocol_error(offer):
    with pytest.raises(ProtocolError, match="socket name and ticket"):
        ShmFabric().connect(offer, Recorder())


@pytest.mark.parametrize("name", ["other-program-{}", "nvflare-rdma-{}x", "nvflare-rdma-{}\n", "xnvflare-rdma-{}"])
def test_a_peer_can_not_send_this_side_to_a_socket_of_another_program(name):
    name = name.format(secrets.token_hex(16))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(f"\0{name}")
        other.listen()
        other.setblocking(False)
        with pytest.raises(ProtocolError, match="socket name and ticket"):
            ShmFabric().connect({"name": name, "ticket": bytes(32)}, Recorder())
        with pytest.raises(BlockingIOError):  # nobody has come
            other.accept()


@pytest.mark.parametrize("paths", [(), ("tcp",), ("direct", "rdma")])
def test_unknown_paths_are_refused(paths):
    with pytest.raises(ValueError, match="direct and memfd"):
        ShmFabric(paths)


# -- process_vm_readv is forbidden for real ------------------------------------------------------------------------


def test_a_side_whose_seccomp_profile_forbids_reading_receives_in_memfds():
    with peers() as (near, far):
        far.forbid_reading()
        assert far.connect(near.offer()) == {"receive": "memfd", "send": "direct"}
        transfers(near, far)


@AS_ROOT
def test_a_side_that_may_not_read_an_undumpable_peer_receives_in_memfds():
    """Two processes of one ordinary user; the passive one can't be traced."""
    with RemotePeer() as near, RemotePeer() as far:
        near.undumpable(NOBODY)
        far.become(NOBODY)
        offer = near.offer()
        assert far.connect(offer) == {"receive": "memfd", "send": "direct"}
        transfers(near, far)


@pytest.mark.parametrize("forced", ["active", "passive"])
def test_a_path_that_is_forced_and_forbidden_is_an_error_with_the_reason(forced):
    with peers() as (near, far):
        far.forbid_reading()
        if forced == "active":
            with pytest.raises(RuntimeError, match=r"allows only direct.*process_vm_readv: Operation not permitted"):
                far.connect(near.offer(), "direct")
        else:
            with pytest.raises(FabricError, match="the shm peer has no way to receive that works"):
                near.connect(far.offer("direct"))


def test_without_memfds_the_reason_names_them(monkeypatch):
    def full(nbytes):
        raise OSError(errno.EMFILE, "Too many open files")

    with peers() as (near, far):
        offer = far.offer()
        monkeypatch.setattr(handshake, "sealed_memory", full)
        with pytest.raises(FabricError, match=r"memfd.*Too many open files"):
            near.connect(offer, "memfd")


def test_a_process_with_other_contents_there_is_not_the_peer():
    """A process number means another process in another namespace."""
    token = bytearray(b"x" * 32)
    address = process_memory.address_of(memoryview(token))
    assert handshake._try_reading(os.getpid(), address, bytes(token))[0] == b"yes"
    assert handshake._try_reading(os.getpid(), address, b"y" * 32)[0] == b"no"


# -- Yama: a peer is declared the tracer ---------------------------------------------------------------------------


class Yama:
    """A kernel that takes PR_SET_PTRACER, and who was declared."""

    def __init__(self, monkeypatch) -> None:
        self.declared: list[int] = []
        self.really = process_memory._prctl
        monkeypatch.setattr(process_memory, "_prctl", self.prctl)

    def prctl(self, option: int, pid: int, *rest: int) -> int:
        assert option == 0x59616D61
        self.declared.append(pid)
        self.really(option, pid, *rest)  # this kernel may have Yama
        return 0


def test_one_peer_at_a_time_is_the_tracer_and_it_is_taken_back(monkeypatch):
    yama, tracer = Yama(monkeypatch), process_memory.Tracer()
    assert tracer.allow(10)
    assert tracer.allow(10)
    assert not tracer.allow(11)
    tracer.release()
    assert not tracer.allow(11)
    tracer.release()
    assert tracer.allow(11)
    tracer.release()
    assert yama.declared == [10, 0, 11, 0]


def test_a_peer_that_may_not_read_is_declared_the_tracer_until_the_end(monkeypatch):
    """The other process can't read until it is declared: it does what Yama would, on this process's word."""
    yama = Yama(monkeypatch)
    with peers() as (near, far):
        far.read_only_when_told()
        offer = far.offer()
        near.connect(offer)
        assert near.paths() == {"receive": "direct", "send": "direct"}
        assert yama.declared == [far.pid()]
        near.close()
        assert yama.declared == [far.pid(), 0]


def test_a_declaration_that_did_not_help_is_taken_back(monkeypatch):
    yama = Yama(monkeypatch)
    with peers() as (near, far):
        far.forbid_reading()
        near.connect(far.offer())
        assert near.paths() == {"receive": "direct", "send": "memfd"}
        assert yama.declared == [far.pid(), 0]
        transfers(near, far)
