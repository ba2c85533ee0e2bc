"""What breaks in the field, made to break for real: rails, processes, bits, memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading

import pytest

from nvflare_rdma.errors import TransferError
from nvflare_rdma.fabric.tcp import HEADER_BYTES, PREAMBLE_BYTES
from tests.support.certificates import Authority
from tests.support.flipping_proxy import FlippingProxy
from tests.support.link_peer import DEADLINE, link_peer
from tests.support.link_process import FABRICS, digest, pattern, resources
from tests.support.waiting import eventually

KIB, MIB = 1 << 10, 1 << 20
# Those of verbs are in tests/verbs: it takes a device, and breaks in ways of its own.
every_fabric = pytest.mark.parametrize("fabric", [name for name in FABRICS if not name.startswith("verbs")])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("pki"))
    return {**authority.issue("server", "server"), **authority.issue("client", "client")}


@pytest.fixture
def connect(tmp_path):
    return lambda **options: link_peer(tmp_path / "peer.log", **{"fabric": "tcp", **options})


def cut(peer, rail):
    peer.link._rails.endpoint._sockets[rail].shutdown(socket.SHUT_RDWR)


def landed(peer):
    """Bytes of messages that this side is receiving."""
    return sum(landed for landed, _ in peer.link.incoming().values())


def chunks(size):
    """How many there are; the end of a message goes with the last one."""
    return size // MIB - 1


# -- rails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["there", "back"])
def test_one_rail_closed_in_the_middle_costs_its_unfinished_chunks_only(connect, direction):
    size = 512 * MIB
    with connect(rails=2) as peer:
        if direction == "there":
            peer.link.send(pattern(size), DEADLINE)
            eventually(lambda: peer.ask()["granted_chunks"] > 20)
            cut(peer, 1)
            assert peer.answer() == {"received": size, "digest": digest(pattern(size))}
            state = peer.ask()
            granted, lost = state["granted_chunks"], state["lost_chunks"]
        else:
            peer.tell("send", size=size, seed=0)
            eventually(lambda: landed(peer) > 20 * MIB)
            cut(peer, 1)
            assert digest(peer.messages.get(timeout=DEADLINE)) == digest(pattern(size))
            granted, lost = peer.link._core._incoming.granted_chunks, peer.link._core._incoming.lost_chunks
        # At most what was granted ahead (8 chunks) over one of two rails, and all that had landed stayed.
        assert 0 < lost <= 8
        assert granted == chunks(size) + lost
        assert len(peer.link._core._rails) == 1
        assert peer.link.fabric == "tcp"


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "sealed"])
@pytest.mark.parametrize("times", [1, 2])
def test_all_rails_closed_are_dialled_again_and_the_transfer_goes_on(connect, certificates, times, secure):
    size = 512 * MIB
    tls = certificates if secure else None
    with connect(tls=tls) as peer:
        peer.tell("send", size=size, seed=0)
        for i in range(times):
            eventually(lambda i=i: landed(peer) > (i + 1) * 50 * MIB)
            endpoint = peer.link._rails.endpoint
            for rail in range(2):
                cut(peer, rail)
            eventually(lambda e=endpoint: peer.link._rails is not None and peer.link._rails.endpoint is not e)
        assert digest(peer.messages.get(timeout=DEADLINE)) == digest(pattern(size))
        incoming = peer.link._core._incoming
        # Those of the first rail are granted over the second before it is gone too.
        assert 0 < incoming.lost_chunks <= 16 * times
        assert incoming.granted_chunks == chunks(size) + incoming.lost_chunks
        assert peer.link.fabric == "tcp"
        peer.there(5 * MIB)


def test_rails_that_can_not_be_dialled_again_leave_the_control_stream(connect):
    """A firewall that changed its mind: the transfer goes on from what has landed."""
    size = 64 * MIB
    with connect(depth=2) as peer:
        peer.tell("send", size=size, seed=0)
        eventually(lambda: landed(peer) > 5 * MIB)

        def refuse():
            raise ConnectionRefusedError("blocked by the firewall")

        peer.fabrics["tcp"]._dial = refuse
        for rail in range(2):
            cut(peer, rail)
        assert digest(peer.messages.get(timeout=DEADLINE)) == digest(pattern(size))
        assert peer.link.fabric == "control"
        incoming = peer.link._core._incoming
        assert incoming.granted_chunks - incoming.lost_chunks <= size // MIB


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "secure"])
@pytest.mark.parametrize("fabric", ["shm-direct", "shm-memfd"])
def test_a_transfer_goes_on_over_another_fabric(connect, certificates, fabric, secure):
    """Shared memory that keeps breaking is given up for tcp, where chunks are sealed if TLS is asked for."""
    size = 1024 * MIB
    tls = certificates if secure else None
    with connect(fabric=fabric, order=["shm", "tcp"], tls=tls, depth=2) as peer:
        assert peer.link.fabric == "shm"
        peer.tell("send", size=size, seed=0)
        for i in range(3):
            eventually(lambda i=i: landed(peer) > (i + 1) * 20 * MIB)
            rails = peer.link._rails
            rails.endpoint.drop(0)
            eventually(lambda rails=rails: peer.link._rails not in (None, rails))
        assert digest(peer.messages.get(timeout=DEADLINE)) == digest(pattern(size))
        assert peer.link.fabric == "tcp"
        incoming = peer.link._core._incoming
        assert incoming.granted_chunks == chunks(size) + incoming.lost_chunks
        peer.there(5 * MIB)
        assert peer.ask()["fabric"] == "tcp"


# -- processes ---------------------------------------------------------------------------------------------


@every_fabric
@pytest.mark.parametrize("victim", ["receiver", "sender"])
def test_a_peer_that_is_killed_in_the_middle(connect, fabric, victim):
    with connect(fabric=fabric) as peer:
        if victim == "receiver":
            sending = peer.link.send(pattern(512 * MIB), DEADLINE)
            eventually(lambda: peer.ask()["granted_chunks"] > 20)
        else:
            peer.tell("send", size=512 * MIB, seed=0)
            eventually(lambda: landed(peer) > 20 * MIB)
        peer.process.send_signal(signal.SIGKILL)
        peer.runner.join(DEADLINE)
        assert not peer.runner.is_alive(), "the link did not notice"
        if victim == "receiver":
            with pytest.raises(TransferError, match=f"transfer {sending.transfer} failed: .*(clos|reset|broke)"):
                sending.wait(DEADLINE)
        with pytest.raises(TransferError):
            peer.link.send(b"more", DEADLINE)
        assert peer.context.budget.in_use == 0
        assert peer.messages.empty()
    # The process is none the worse: the next peer is served.
    with connect(fabric=fabric) as peer:
        peer.back(5 * MIB)


#: How a link ends whose peer does nothing for 1.5 s: whichever is seen first.
STOPPED = r"made no progress for 1.5 s|has read nothing .* for 1.5 s|no rail came up again in 1.5 s"


@every_fabric
@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_peer_that_is_stopped_beyond_the_deadline(connect, fabric, direction):
    with connect(fabric=fabric, stall_timeout=1.5) as peer:
        if direction == "there":
            sending = peer.link.send(pattern(1024 * MIB), DEADLINE)
            eventually(lambda: peer.ask()["granted_chunks"] > 20)
            peer.process.send_signal(signal.SIGSTOP)
            with pytest.raises(TransferError, match=STOPPED):
                sending.wait(DEADLINE)
        else:
            peer.tell("send", size=1024 * MIB, seed=0)
            eventually(lambda: landed(peer) > 20 * MIB)
            peer.process.send_signal(signal.SIGSTOP)
            peer.runner.join(DEADLINE)
            assert re.search(STOPPED, peer.link._failure)
        peer.process.send_signal(signal.SIGCONT)
        assert peer.process.wait(DEADLINE) == 0  # it noticed too, and ended
        assert peer.context.budget.in_use == 0


# -- bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "sealed"])
def test_a_bit_flipped_on_the_wire_costs_one_chunk(connect, certificates, secure):
    size = 64 * MIB
    tls = certificates if secure else None
    # In the second and the fifth chunk that go over the rail.
    chunk = HEADER_BYTES + MIB + (16 if secure else 0)
    positions = [PREAMBLE_BYTES + chunk + HEADER_BYTES + 17, PREAMBLE_BYTES + 4 * chunk + HEADER_BYTES + MIB - 1]
    proxies = []

    def wrap(address):
        proxies.append(FlippingProxy(address, positions))
        return proxies[0].address

    with connect(tls=tls, rails=1, wrap=wrap) as peer:
        peer.there(size)
        state = peer.ask()
        assert proxies[0].flipped == 2
        assert state["lost_chunks"] == 2
        assert state["granted_chunks"] == chunks(size) + 2
    proxies[0].close()


def test_a_bit_flipped_in_a_header_costs_the_rail(connect):
    size = 64 * MIB
    proxies = []

    def wrap(address):
        proxies.append(FlippingProxy(address, [PREAMBLE_BYTES + HEADER_BYTES + MIB + 9]))
        return proxies[0].address

    with connect(rails=2, wrap=wrap) as peer:
        peer.there(size)
        state = peer.ask()
        assert proxies[0].flipped == 1
        assert 0 < state["lost_chunks"] <= 8
        assert len(peer.link._core._rails) == 1
    proxies[0].close()


# -- memory ------------------------------------------------------------------------------------------------


@every_fabric
def test_half_a_gibibyte_through_a_budget_of_one_mebibyte(connect, fabric):
    size = 512 * MIB
    with connect(fabric=fabric, budget=MIB, keep_bytes=MIB) as peer:
        before = peer.ask()
        peer.there(size)
        state = peer.ask()
        assert state["budget_peak"] == MIB
        # Beyond the message itself, which has to be in one piece.
        assert state["peak_rss"] - before["rss"] - size < 16 * MIB


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root and unshare")
@every_fabric
def test_a_full_dev_shm_changes_nothing(connect, fabric, tmp_path):
    script = tmp_path / "full.sh"
    script.write_text(
        "mount -t tmpfs -o size=64k none /dev/shm\n"
        "head -c 1000000 /dev/zero > /dev/shm/full 2>/dev/null\n"
        '[ "$(df --output=avail /dev/shm | tail -1)" -eq 0 ] || exit 9\n'
        'exec "$@"\n'
    )
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=20, check=False)
    if probe.returncode:
        pytest.skip(f"unshare -m is not allowed here: {probe.stderr.decode().strip()}")
    with connect(fabric=fabric, prefix=("unshare", "-m", "sh", str(script))) as peer:
        assert peer.link.fabric == FABRICS[fabric][0]
        peer.there(20 * MIB + 1)
        peer.back(20 * MIB + 1)


@every_fabric
def test_a_thousand_transfers_leave_nothing_behind(connect, fabric):
    size = 300_001
    with connect(fabric=fabric, chunk_bytes=128 * KIB) as peer:

        def exchange(count):
            for _ in range(count):
                peer.link.send(pattern(size), DEADLINE)
                peer.tell("send", size=size, seed=0)
            for _ in range(count):
                assert peer.answer()["received"] == size
                assert len(peer.messages.get(timeout=DEADLINE)) == size
            eventually(lambda: not peer.ask()["budget_in_use"] and not peer.context.budget.in_use)

        exchange(100)  # until pools are filled and threads are started
        before = peer.ask(), resources()
        for _ in range(9):
            exchange(100)
        after = peer.ask(), resources()
        for was, now in zip(before, after, strict=True):
            assert now["descriptors"] <= was["descriptors"]
            assert now["threads"] <= was["threads"]
            # One per slot, and how many messages are there at once varies; 900 transfers leave none.
            assert now["mappings"] <= was["mappings"] + 150
            assert now["rss"] <= was["rss"] + 32 * MIB  # 900 transfers of 0.3 MB both ways: 540 MB


def test_connections_leave_nothing_behind(connect):
    def once():
        with connect() as peer:
            peer.there(MIB)

    once()
    before = resources()
    threads = threading.active_count()
    for _ in range(5):
        once()
    after = resources()
    assert threading.active_count() <= threads
    assert after["descriptors"] <= before["descriptors"]
