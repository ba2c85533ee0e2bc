"""The verbs fabric by itself: two endpoints in this process, on two devices."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyverbs.device", reason="pyverbs is not installed for this Python")

from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.verbs.devices import IWARP
from nvflare_rdma.fabric.verbs.endpoint import IN_PLACE_BYTES
from nvflare_rdma.fabric.verbs.registration_cache import EXTENT_BYTES
from tests.support import rdma_devices
from tests.support.processes import ROOT
from tests.support.recorder import Recorder
from tests.support.verbs_pair import DEADLINE, buffer, fabric, held, numbered, verbs_pair

MIB = 1 << 20


@pytest.fixture(params=["RoCE", "iWARP"])
def devices(request):
    """Each test over both kinds of connection; skipped where a kind has no device."""
    return rdma_devices.pair() if request.param == "RoCE" else rdma_devices.iwarp_pair()


@pytest.fixture
def roce_devices():
    return rdma_devices.pair()


def sent(pair, source, remote, notification=7, rail=0, digest=0):
    pair.active.write(rail, source, remote, notification, digest)
    assert pair.said.writes.get(timeout=DEADLINE) == notification


def down(recorder):
    return recorder.down.get(timeout=DEADLINE)


#: How a device reports that the peer's has refused a write. On iWARP a write is done when TCP has it: the refusal comes
#: afterwards and ends the connection, so that work is flushed, or can't be sent to its end.
REFUSED = re.compile("REM_ACCESS_ERR|WR_FLUSH_ERR .* refused a write|LOC_QP_OP_ERR .* refused a write")


@pytest.mark.parametrize("digest", [0, 2**64 - 1])
@pytest.mark.parametrize("size", [1, 4095, IN_PLACE_BYTES - 1, IN_PLACE_BYTES, 3 * MIB + 5])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_write_lands_in_the_exposed_slice_and_nowhere_else(devices, size, digest, kind):
    with verbs_pair(devices) as pair:
        target, source = buffer(size + 20, 9), numbered(size)
        remote = pair.passive.register(target).expose(7, 10, size, 1)
        sent(pair, memoryview(kind(source)), remote, rail=1, digest=digest)
        assert pair.heard.landings.get(timeout=DEADLINE) == (7, size, digest)
        assert target[10 : 10 + size] == source
        assert bytes(target[:10]) == bytes(target[10 + size :]) == bytes([9] * 10)


def test_an_exposure_is_answered_with_nothing(devices):
    with verbs_pair(devices) as pair:
        target = buffer(100, 9)
        remote = pair.passive.register(target).expose(8, 0, 100, 0)
        sent(pair, memoryview(b""), remote, 8)
        assert pair.heard.landings.get(timeout=DEADLINE) == (8, 0, 0)
        assert bytes(target) == bytes([9] * 100)


def test_both_directions_and_many_writes_at_once(devices):
    count, size = 300, 40_001  # more than fit the queue of one rail
    with verbs_pair(devices) as pair:
        ends = [(pair.active, pair.said, pair.passive, pair.heard), (pair.passive, pair.heard, pair.active, pair.said)]
        source = numbered(size)
        targets = [buffer(count * size) for _ in ends]
        slices = []
        for (_, _, receiver, _), target in zip(ends, targets, strict=True):
            region = receiver.register(target)
            slices.append([region.expose(n, n * size, size, n % 2) for n in range(count)])
        for n in range(count):
            for (sender, *_), remotes in zip(ends, slices, strict=True):
                sender.write(n % 2, source, remotes[n], n, 0)
        for (_, sender_says, _, receiver_says), target in zip(ends, targets, strict=True):
            assert {receiver_says.landings.get(timeout=DEADLINE)[0] for _ in range(count)} == set(range(count))
            assert {sender_says.writes.get(timeout=DEADLINE) for _ in range(count)} == set(range(count))
            assert bytes(target) == bytes(source) * count


def test_a_device_that_carries_little_at_once_gets_chains_of_requests(devices):
    with verbs_pair(devices, max_message=64 * 1024) as pair:
        size = MIB + 77
        target, source = buffer(size), numbered(size)
        sent(pair, source, pair.passive.register(target).expose(7, 0, size, 0))
        assert pair.heard.landings.get(timeout=DEADLINE) == (7, size, 0)
        assert target == source


def test_a_source_may_be_changed_when_it_was_written(devices, wires):
    """Also while the bytes wait in a queue, for a way that is slow."""
    size, count = 128 * 1024, 16  # sources are copied, each to where the one before was
    links = ("va", "vb", "vc", "vd")
    for link in links:
        slow = ["tc", "qdisc", "replace", "dev", link, "root", "netem", "rate", "100mbit", "limit", "10000"]
        subprocess.run(slow, check=True, timeout=DEADLINE)
    with verbs_pair(devices, rails=1) as pair:
        targets = [buffer(size) for _ in range(count)]
        slices = [pair.passive.register(target).expose(n, 0, size, 0) for n, target in enumerate(targets)]
        for n, remote in enumerate(slices):
            sent(pair, buffer(size, n + 1), remote, n)
        for _ in range(count):
            pair.heard.landings.get(timeout=DEADLINE)
        assert [set(bytes(target)) for target in targets] == [{n + 1} for n in range(count)]


def test_a_source_that_spans_registrations(devices):
    with verbs_pair(devices) as pair:
        source = numbered(2 * EXTENT_BYTES + 9)
        for start, end in [(EXTENT_BYTES - MIB, EXTENT_BYTES + MIB), (5, len(source))]:
            target = buffer(end - start)
            sent(pair, source[start:end], pair.passive.register(target).expose(7, 0, end - start, 0))
            assert pair.heard.landings.get(timeout=DEADLINE) == (7, end - start, 0)
            assert target == source[start:end]
        cache = pair.fabrics[1].cache
        assert (cache.misses, cache.hits) == (3, 2)


# -- what a hostile peer writes ----------------------------------------------------------------------------

BAD_SLICES = {
    "beyond the end": lambda r: dataclasses.replace(r, address=r.address + 1),
    "before the start": lambda r: dataclasses.replace(r, address=r.address - 1),
    "another key": lambda r: dataclasses.replace(r, key=r.key ^ 0x55),
}


@pytest.mark.parametrize("change", BAD_SLICES.values(), ids=BAD_SLICES)
def test_a_write_outside_of_what_is_granted_is_refused_by_the_device(devices, change):
    with verbs_pair(devices, rails=1) as pair:
        target = buffer(4096 + 64, 9)
        remote = pair.passive.register(target).expose(7, 32, 4096, 0)
        sent(pair, numbered(4096), change(remote))
        assert REFUSED.search(str(down(pair.said)[1]))
        rail, error = down(pair.heard)
        assert (rail, type(error)) == (0, FabricError)
        assert bytes(target) == bytes([9] * len(target))
        assert pair.heard.landings.empty()


def test_a_grant_that_was_used_is_refused_by_the_device(devices):
    with verbs_pair(devices) as pair:
        target = buffer(4096)
        remote = pair.passive.register(target).expose(7, 0, 4096, 0)
        sent(pair, numbered(4096), remote)
        assert pair.heard.landings.get(timeout=DEADLINE) == (7, 4096, 0)
        sent(pair, buffer(4096, 5), remote, 8)
        assert REFUSED.search(str(down(pair.said)[1]))
        assert down(pair.heard)[0] == 0
        assert target == numbered(4096)
        # The other rail, and the process, are none the worse.
        remote = pair.passive.register(target).expose(9, 0, 4096, 1)
        sent(pair, buffer(4096, 6), remote, 9, rail=1)
        assert pair.heard.landings.get(timeout=DEADLINE) == (9, 4096, 0)
        assert bytes(target) == bytes([6] * 4096)


def test_the_key_of_one_peer_is_of_no_use_to_another(devices):
    with verbs_pair(devices) as pair, verbs_pair(devices) as other:
        target = buffer(4096)
        remote = pair.passive.register(target).expose(7, 0, 4096, 0)
        sent(other, numbered(4096), remote)
        assert REFUSED.search(str(down(other.said)[1]))
        assert bytes(target) == bytes(4096)
        sent(pair, numbered(4096), remote)
        assert pair.heard.landings.get(timeout=DEADLINE) == (7, 4096, 0)


@pytest.mark.parametrize(("rail", "address"), [(50, 0), (0, (1 << 64) - 100_000)])
def test_a_grant_of_what_can_not_be_is_a_violation(roce_devices, rail, address):
    with verbs_pair(roce_devices, max_message=64 * 1024) as pair, pytest.raises(ProtocolError, match="no such"):
        pair.active.write(rail, numbered(200_000), RemoteSlice(1, address, 200_000), 7, 0)


def test_an_answer_to_nothing_is_a_violation(devices):
    with verbs_pair(devices) as pair:
        pair.passive.expose(7, buffer(64), 0)  # its receive takes the notice
        sent(pair, memoryview(b""), RemoteSlice(0, 0, 64), 99)
        error = pair.heard.failures.get(timeout=DEADLINE)
        assert isinstance(error, ProtocolError)
        assert "99" in str(error)


def test_an_answer_over_another_rail_is_a_violation(devices):
    with verbs_pair(devices) as pair:
        target = buffer(64)
        remote = pair.passive.register(target).expose(7, 0, 64, 0)
        pair.passive.expose(8, buffer(64), 1)
        sent(pair, numbered(64), remote, 7, rail=1)
        assert "rail 1" in str(pair.heard.failures.get(timeout=DEADLINE))


# -- rails -------------------------------------------------------------------------------------------------


def test_a_late_write_to_a_revoked_slice_is_still_reported(devices):
    with verbs_pair(devices) as pair:
        region = pair.passive.register(buffer(4096))
        remote = region.expose(7, 0, 4096, 0)
        region.revoke(7)
        region.close()
        sent(pair, numbered(4096), remote)
        assert pair.heard.landings.get(timeout=DEADLINE) == (7, 4096, 0)


def test_a_dropped_rail_is_reported_by_both_sides_and_the_others_go_on(devices):
    with verbs_pair(devices) as pair:
        region = pair.passive.register(buffer(4096))
        lost = region.expose(6, 0, 64, 0)
        pair.passive.drop(0)
        assert down(pair.heard)[0] == 0
        sent(pair, numbered(64), lost, 6)  # until it has noticed, and afterwards too
        assert down(pair.said)[0] == 0
        sent(pair, numbered(64), lost, 6)
        remote = region.expose(7, 0, 64, 1)
        sent(pair, numbered(64), remote, 7, rail=1)
        assert pair.heard.landings.get(timeout=DEADLINE) == (7, 64, 0)
        assert pair.heard.failures.empty()


def test_an_exposure_while_its_rail_ends_crashes_nothing(devices):
    """The link exposes under its lock, for which the rail's thread waits when it reports the writes that it ends."""
    with verbs_pair(devices) as pair:
        remote = pair.passive.register(buffer(4096)).expose(7, 0, 4096, 0)
        region, heard = pair.active.register(buffer(4096)), pair.said.written

        def written(notification):
            region.expose(8, 0, 4096, 0)
            heard(notification)

        pair.said.written = written
        pair.active.write(0, numbered(4096), dataclasses.replace(remote, key=remote.key ^ 0x55), 7, 0)
        assert down(pair.said)[0] == 0


def test_no_key_outlives_the_rail_that_it_was_granted_over(devices):
    """The link grants over a rail until the end of the rail was reported, and it listens to the end of that."""
    with verbs_pair(devices) as pair:
        target, heard = buffer(4096), pair.heard.rail_down
        slices = []

        def rail_down(rail, error):
            slices.append(pair.passive.register(target).expose(7, 0, 4096, rail))
            heard(rail, error)

        pair.heard.rail_down = rail_down
        pair.passive.drop(0)
        assert down(pair.heard)[0] == 0
        pair.passive.expose(8, buffer(64), 1)  # its receive takes the notice
        sent(pair, numbered(4096), slices[0], 8, rail=1)
        assert REFUSED.search(str(down(pair.said)[1]))
        assert bytes(target) == bytes(4096)


def test_nothing_is_exposed_over_a_rail_that_was_never_opened(devices):
    """A peer may say that it has opened more rails than there are, and the link believes it until they are reported."""
    with verbs_pair(devices) as pair:
        assert pair.passive.register(buffer(64)).expose(7, 0, 64, 50) == RemoteSlice(0, 0, 64)


def test_a_closed_endpoint_writes_nothing_and_says_so(devices):
    with verbs_pair(devices) as pair:
        remote = pair.passive.register(buffer(64)).expose(7, 0, 64, 0)
        pair.active.close()
        sent(pair, numbered(64), remote)
        assert pair.said.down.empty()
        assert pair.heard.landings.empty()


def test_a_write_that_is_too_long_for_its_slice_is_this_sides_mistake(devices):
    with verbs_pair(devices) as pair:
        remote = pair.passive.register(buffer(64)).expose(7, 0, 10, 0)
        with pytest.raises(ValueError, match="a write of 64 bytes does not fit a slice of 10"):
            pair.active.write(0, numbered(64), remote, 7, 0)


def test_a_peer_that_does_not_answer_is_not_tried_again(roce_devices):
    """What a firewall looks like that lets the control stream through, and UDP port 4791 not."""
    with verbs_pair(roce_devices, rails=1) as pair:
        pair.active.close()
    heard = Recorder()
    passive, _ = pair.fabrics[0].offer(heard)
    passive.accept(pair.active.answer)  # of queue pairs that are gone
    error = down(heard)[1]
    passive.close()
    assert isinstance(error, FabricUnavailable)
    assert "UDP port 4791" in str(error)


def test_what_can_not_reach_each_other_says_so(devices):
    passive, offer = fabric(devices[0]).offer(Recorder())
    port = offer["ports"][0]
    port.update({"gid": b"\x20" * 16} if port["transport"] == IWARP else {"kind": "RoCE v1"})
    with pytest.raises(FabricUnavailable, match=r"no GID for (RoCE v1 over IPv4|iWARP over IPv6), which the peer uses"):
        fabric(devices[1]).connect(offer, Recorder())
    passive.close()


# -- memory and ends ---------------------------------------------------------------------------------------


def test_nothing_is_left_of_endpoints_that_were_closed(devices):
    def once():
        with verbs_pair(devices) as pair:
            target = buffer(MIB)
            remote = pair.passive.register(target).expose(7, 0, MIB, 0)
            pair.passive.register(target).expose(8, 0, 64, 1)  # never answered
            sent(pair, numbered(MIB), remote)

    once()
    before = held()
    for _ in range(5):
        once()
    assert held() == before


LAST = """
import errno, os, sys
sys.path.insert(0, sys.argv[1])
from nvflare_rdma.errors import FabricError
from tests.support.recorder import Recorder
from tests.support.verbs_pair import VerbsPair, fabric, held
VerbsPair(sys.argv[2:], 1).close()  # librdmacm keeps what it has opened
before, make, made = held(), os.eventfd, []
def one(*arguments):
    if len(made) % 2:
        made.clear()
        raise OSError(errno.EMFILE, "Too many open files")
    made.append(True)
    return make(*arguments)
os.eventfd = one
for _ in range(3):
    try:
        fabric(sys.argv[2]).offer(Recorder())
    except FabricError as error:
        reason = error
print(reason)
print("the same" if held() == before else f"{held()}, was {before}")
"""


def test_an_endpoint_that_lacks_descriptors_leaves_nothing_open(devices):
    done = run_script(LAST, *devices)
    assert (done.returncode, done.stderr) == (0, "")
    assert "`ulimit -n`" in done.stdout
    assert done.stdout.endswith("the same\n")


FORK = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.support.recorder import Recorder
from tests.support.verbs_pair import DEADLINE, VerbsPair, buffer, fabric, held, numbered
pair = VerbsPair(sys.argv[2:], 2)
waiting, offer = fabric(sys.argv[2]).offer(heard := Recorder())
before = held()
if not (child := os.fork()):
    sys.exit(0)
os.waitpid(child, 0)
print("the same" if held() == before else f"{held()}, was {before}")
late = fabric(sys.argv[3]).connect(offer, Recorder())
waiting.accept(late.answer)
for active, passive, landings in (pair.active, pair.passive, pair.heard.landings), (late, waiting, heard.landings):
    remote = passive.register(buffer(4096)).expose(7, 0, 4096, 0)
    active.write(0, numbered(4096), remote, 7, 0)
    print(landings.get(timeout=DEADLINE))
"""


def test_a_forked_process_that_ends_closes_nothing_of_its_parent(devices):
    done = run_script(FORK, *devices)
    assert (done.returncode, done.stdout) == (0, "the same\n" + "(7, 4096, 0)\n" * 2), done.stderr


CLOSED_BY_MANY = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from tests.support.recorder import Recorder
from tests.support.verbs_pair import fabric
sys.setswitchinterval(1e-6)
for _ in range(8):
    endpoint, _ = fabric(sys.argv[2]).offer(Recorder())
    threads = [threading.Thread(target=endpoint.close) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print("closed")
"""


def run_script(script, *arguments):
    """In a process of its own, which may crash."""
    support = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", script, support, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
        check=False,
    )


def test_an_endpoint_is_closed_by_several_threads_at_once(devices):
    done = run_script(CLOSED_BY_MANY, devices[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


EXIT = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.support.verbs_pair import VerbsPair, buffer, numbered
pair = VerbsPair((sys.argv[2], sys.argv[3]), 2)
remote = pair.passive.register(buffer(1 << 20)).expose(7, 0, 1 << 20, 0)
pair.active.write(0, numbered(1 << 20), remote, 7, 0)
print("open")
"""


def test_the_interpreter_ends_with_endpoints_open(devices):
    done = run_script(EXIT, *devices)
    assert (done.returncode, done.stdout, done.stderr) == (0, "open\n", "")
