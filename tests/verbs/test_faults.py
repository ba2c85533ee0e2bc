"""What breaks in the field, made to break for real: links, devices, processes, limits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyverbs.device", reason="pyverbs is not installed for this Python")

from nvflare_rdma.errors import FabricUnavailable, TransferError
from tests.support import rdma_devices
from tests.support.link_peer import DEADLINE, link_peer
from tests.support.link_process import digest, pattern
from tests.support.processes import ROOT
from tests.support.verbs_pair import verbs_pair
from tests.support.waiting import PATIENCE, eventually

KIB, MIB = 1 << 10, 1 << 20
SIZE = 128 * MIB


#: For faults that iWARP devices report in another way.
over_both = pytest.mark.parametrize("fabric", ["verbs", "verbs-iwarp"])


@pytest.fixture
def fabric():
    """What `link_process.FABRICS` calls it; see `over_both`."""
    return "verbs"


@pytest.fixture
def connect(tmp_path, fabric):
    find = rdma_devices.iwarp_pair if fabric == "verbs-iwarp" else rdma_devices.pair
    find()  # skips where there are none
    return lambda **options: link_peer(tmp_path / "peer.log", **{"fabric": fabric, "depth": 4, **options})


def command(*words):
    subprocess.run(words, check=True, timeout=DEADLINE)


def landed(peer):
    """Bytes of messages that this side is receiving."""
    return sum(landed for landed, _ in peer.link.incoming().values())


def begin(peer, direction):
    """Send, or have sent, `SIZE` bytes; returns when a part of it has landed, with what waits for the rest."""
    if direction == "there":
        before = peer.ask()["granted_chunks"]
        peer.link.send(pattern(SIZE), DEADLINE)
        eventually(lambda: peer.ask()["granted_chunks"] > before + 20, DEADLINE)
        return lambda: check(peer.answer() == {"received": SIZE, "digest": digest(pattern(SIZE))})
    peer.tell("send", size=SIZE, seed=0)
    eventually(lambda: landed(peer) > 10 * MIB, DEADLINE)
    return lambda: check(digest(peer.messages.get(timeout=DEADLINE)) == digest(pattern(SIZE)))


def check(true):
    assert true


@over_both
@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_queue_pair_in_the_error_state_is_rebuilt_and_the_transfer_resumes(connect, direction):
    with connect() as peer:
        finish = begin(peer, direction)
        rails = peer.link._rails
        for rail in rails.endpoint._rails:
            rail.queue_pair.fail()
        finish()
        assert peer.link.fabric == "verbs"
        assert peer.link._rails is not rails
        incoming = peer.ask() if direction == "there" else vars(peer.link._core._incoming)
        assert 0 < incoming["lost_chunks"] <= 8


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_link_that_is_down_for_two_seconds(connect, direction, wires):
    with connect(order=["verbs", "tcp"]) as peer:
        finish = begin(peer, direction)
        command("ip", "link", "set", "va", "down")
        # An outage has a length, and no event to wait for.
        subprocess.run(["sleep", "2"], check=True, timeout=DEADLINE)
        wires()
        finish()
        assert peer.link.fabric in ("verbs", "tcp")
        peer.there(2 * MIB)
        peer.back(2 * MIB)


# Not over iWARP: librdmacm keeps a device open that it has used once, and siw is only removed when nobody has it open,
# which in this process is when all tests are over.
@pytest.mark.parametrize("device", ["rxa", "rxb"], ids=["passive", "active"])
@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_device_that_is_removed_leaves_tcp(connect, direction, device, wires):
    with connect(order=["verbs", "tcp"]) as peer:
        finish = begin(peer, direction)
        # It returns when no process has the device open any more.
        removal = subprocess.Popen(["rdma", "link", "delete", device])
        finish()
        assert peer.link.fabric == "tcp"
        assert peer.ask()["fabric"] == "tcp"
        assert removal.wait(DEADLINE) == 0
        peer.there(2 * MIB)
        log = peer.log.read_text()
        assert "no such device" in log or "no rail" in log, log


def test_a_device_that_is_removed_is_noticed_by_any_rail_that_is_left(wires):
    devices = rdma_devices.pair()
    with verbs_pair(devices) as pair:
        pair.passive.drop(0)
        assert pair.heard.down.get(timeout=DEADLINE)[0] == 0
        removal = subprocess.Popen(["rdma", "link", "delete", devices[0]])
        rail, error = pair.heard.down.get(timeout=DEADLINE)
        assert (rail, type(error)) == (1, FabricUnavailable)
    assert removal.wait(DEADLINE) == 0


@over_both
@pytest.mark.parametrize("victim", ["receiver", "sender"])
def test_a_peer_that_is_killed(connect, victim):
    with connect() as peer:
        if victim == "receiver":
            sending = peer.link.send(pattern(SIZE), DEADLINE)
            eventually(lambda: peer.ask()["granted_chunks"] > 10, DEADLINE)
        else:
            begin(peer, "back")
        peer.process.send_signal(signal.SIGKILL)
        peer.runner.join(DEADLINE)
        assert not peer.runner.is_alive(), "the link did not notice"
        if victim == "receiver":
            with pytest.raises(TransferError, match=f"transfer {sending.transfer} failed"):
                sending.wait(DEADLINE)
        assert peer.context.budget.in_use == 0
        cache = peer.fabrics["verbs"].cache
        assert cache.pinned == 0
    with connect() as peer:
        peer.back(2 * MIB)


def test_chunks_carry_a_checksum_if_asked_to(connect):
    with connect(integrity="on") as peer:
        peer.there(5 * MIB)
        peer.back(5 * MIB)


def test_a_stopped_peer_breaks_no_rail_before_the_deadline(connect):
    """Its device goes on without it: only the channel's own deadline notices."""
    deadline = 2 * PATIENCE  # longer than a slow machine may take for a chunk
    with connect(stall_timeout=float(deadline)) as peer:
        begin(peer, "there")
        peer.process.send_signal(signal.SIGSTOP)
        peer.runner.join(DEADLINE)
        assert f"for {deadline} s" in peer.link._failure
        peer.process.send_signal(signal.SIGCONT)
        assert peer.process.wait(DEADLINE) == 0


LIMITED = """
import os, resource, sys
sys.path.insert(0, sys.argv[2])
from nvflare_rdma.fabric.registry import probe
from nvflare_rdma.errors import FabricError
from nvflare_rdma.fabric.options import FabricOptions, VerbsOptions
from tests.support.verbs_pair import DEADLINE, buffer, verbs_pair, numbered
options = FabricOptions(verbs=VerbsOptions((sys.argv[1],)))
probe(options)  # loads what it needs: the user that this process becomes may have no right to read the code
resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
os.setgid(65534), os.setuid(65534)
print(probe(options)["verbs"].reason)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (int(sys.argv[3]), 64 << 10))
try:
    with verbs_pair((sys.argv[1], sys.argv[1]), rails=1) as pair:  # without having looked
        pair.passive.register(buffer(1 << 20)).expose(7, 0, 1 << 20, 0)
        print(pair.heard.down.get(timeout=DEADLINE)[1])
except FabricError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [4 * KIB, 64 * KIB], ids=["4 KiB", "64 KiB"])
def test_too_little_memory_may_be_locked(devices, tmp_path, limit):
    """Known before anything is registered; and said if something is: the queues' memory, or an exposed slice."""
    support = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, devices[0], support, str(limit)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    looked, tried = done.stdout.splitlines()
    assert "this process may lock 64 KiB of memory (RLIMIT_MEMLOCK), RDMA needs 133120 KiB" in looked
    assert "`ulimit -l unlimited`" in looked
    # Of 4 KiB the first 2048 bytes take one page or two: what lies across a page boundary is too much already.
    assert re.search(f"registering ({1048576 if limit == 64 * KIB else '2048|8192'}) bytes failed", tried)
    assert "`ulimit -l unlimited`" in tried


def test_a_peer_without_rdma_leaves_tcp(connect, tmp_path):
    """Only one side has a device that works."""
    with connect(order=["verbs", "tcp"]) as peer:
        fabric = peer.fabrics["verbs"]
        fabric.options = type(fabric.options)(("gone0",))
        for rail in list(peer.link._rails.endpoint._rails):
            rail.queue_pair.fail()
        eventually(lambda: peer.link.fabric == "tcp", DEADLINE)
        peer.there(2 * MIB)
        assert json.dumps(peer.ask()["fabric"]) == '"tcp"'
