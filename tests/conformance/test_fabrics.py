"""One suite for every fabric: a link to another process over it, in the clear and with TLS."""

from __future__ import annotations

import threading

import pytest

from nvflare_rdma.errors import TransferError
from tests.support import rdma_devices
from tests.support.bodies import TestSink
from tests.support.certificates import Authority
from tests.support.link_peer import DEADLINE, link_peer
from tests.support.link_process import FABRICS, digest, pattern
from tests.support.waiting import PATIENCE, eventually

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LONG = 512 * MIB // PATIENCE  # long enough to be given up before it is over
SIZES = [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB, MIB + 601, 5_000_003]

pytestmark = [
    pytest.mark.parametrize("fabric", FABRICS),
    pytest.mark.parametrize("secure", [False, True], ids=["clear", "secure"]),
]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("pki"))
    return {**authority.issue("server", "server"), **authority.issue("client", "client")}


@pytest.fixture
def connect(fabric, secure, certificates, tmp_path):
    if fabric.startswith("verbs"):
        find = rdma_devices.iwarp_pair if fabric == "verbs-iwarp" else rdma_devices.pair
        find()  # skips where there are none

    def made(**options):
        tls = certificates if secure else None
        return link_peer(tmp_path / "peer.log", fabric=fabric, tls=tls, **{"controller": "adaptive", **options})

    return made


def test_messages_of_all_sizes_in_both_directions(connect, fabric):
    with connect() as peer:
        assert peer.link.fabric == FABRICS[fabric][0]
        for seed, size in enumerate(SIZES):
            peer.there(size, seed)
            peer.back(size, seed)
        eventually(lambda: not peer.context.budget.in_use)
        eventually(lambda: peer.ask()["budget_in_use"] == 0)
        assert peer.ask()["fabric"] == peer.link.fabric


def test_a_gibibyte_in_both_directions_at_once(connect, secure):
    """Less where it would take minutes, or is only sealed besides."""
    size = GIB // PATIENCE // (4 if secure else 1)
    with connect(chunk_bytes=4 * MIB) as peer:
        peer.tell("send", size=size, seed=7)
        peer.link.send(pattern(size, 8), DEADLINE)
        message = peer.messages.get(timeout=DEADLINE)
        assert (len(message), digest(message)) == (size, digest(pattern(size, 7)))
        assert peer.answer() == {"received": size, "digest": digest(pattern(size, 8))}


def test_32_transfers_at_once_in_both_directions(connect):
    sizes = [200_000 + 50_001 * i for i in range(32)]
    with connect() as peer:
        for seed, size in enumerate(sizes):
            peer.tell("send", size=size, seed=seed)
        threads = [
            threading.Thread(target=peer.link.send, args=(pattern(size, seed), DEADLINE), daemon=True)
            for seed, size in enumerate(sizes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        expected = {(size, digest(pattern(size, seed))) for seed, size in enumerate(sizes)}
        answers = [peer.answer() for _ in sizes]
        assert {(answer["received"], answer["digest"]) for answer in answers} == expected
        messages = [peer.messages.get(timeout=DEADLINE) for _ in sizes]
        assert {(len(message), digest(message)) for message in messages} == expected


def test_either_side_can_give_up_what_it_sends(connect):
    with connect(chunk_bytes=64 * KIB, depth=2) as peer:
        mine = peer.link.send(pattern(LONG), DEADLINE)
        peer.link.withdraw(mine, "changed its mind")
        with pytest.raises(TransferError, match="changed its mind"):
            mine.wait(DEADLINE)
        peer.tell("send and give up", size=LONG, seed=0)
        check_that_nothing_stays(peer)


def test_either_side_can_give_up_what_it_receives(connect):
    with connect(chunk_bytes=64 * KIB, depth=2) as peer:
        peer.tell("refuse the next")
        mine = peer.link.send(pattern(LONG), DEADLINE)
        with pytest.raises(TransferError, match="disk full"):
            mine.wait(DEADLINE)
        peer.tell("send", size=LONG, seed=0)
        incoming = eventually(lambda: [t for t, (landed, _) in peer.link.incoming().items() if landed])
        peer.link.refuse(incoming[0], "no longer wanted")
        check_that_nothing_stays(peer)


def check_that_nothing_stays(peer):
    """The link serves on, and after a while both sides hold nothing."""
    peer.there(300_000, 1)
    peer.back(300_001, 2)
    eventually(lambda: not peer.context.budget.in_use)
    eventually(lambda: (state := peer.ask())["budget_in_use"] == state["incoming"] == 0)
    assert peer.messages.empty()


def test_a_message_larger_than_the_budget(connect):
    mebibytes = 64 // PATIENCE
    with connect(budget=MIB, chunk_bytes=4 * MIB) as peer:
        peer.there(mebibytes * MIB + 1)
        peer.back(mebibytes * MIB + 1)
        state = peer.ask()
        assert state["budget_peak"] == peer.context.budget.peak == MIB
        # No more was on its way at once than the budget: the chunks were cut to it.
        assert state["granted_chunks"] >= mebibytes
        assert state["most_granted"] <= MIB


def test_what_is_known_by_a_label_lands_in_its_place(connect):
    """In memory of the receiver's choice, or unmasked chunk by chunk; neither takes more than slots for chunks."""
    unit, size = 96 * KIB, 20 * MIB // PATIENCE + 12345
    with connect(budget=8 * MIB) as peer:
        peer.sinks |= {1: TestSink(size), 2: TestSink(size, unit), (1 << 64) - 1: TestSink(7), 4: TestSink(7, unit)}
        for label, sink in peer.sinks.items():
            peer.tell("offer", size=sink.nbytes, seed=label % 99, unit=0 if sink.buffer else unit, label=label)
        assert [peer.answer() for _ in peer.sinks] == [{"failure": ""}] * 4
        for label, sink in peer.sinks.items():
            assert sink.ended.wait(DEADLINE)
            assert (sink.reason, digest(sink.memory)) == ("", digest(pattern(sink.nbytes, label % 99)))
        assert peer.context.budget.peak <= 8 * MIB
        check_that_nothing_stays(peer)


def test_what_nobody_waits_for_or_can_use_is_refused(connect):
    unit = 64 * KIB
    with connect() as peer:
        peer.sinks |= {2: TestSink(5 * MIB - 1), 3: TestSink(5 * MIB, unit, spoiled=True)}
        refusals = {1: "nothing expected as 1", 2: "5242879 bytes expected as 2", 3: "these are no codes"}
        for label, refusal in refusals.items():
            peer.tell("offer", size=5 * MIB, seed=label, unit=unit if label == 3 else 0, label=label)
            assert refusal in peer.answer()["failure"]
        for label, sink in peer.sinks.items():
            assert sink.ended.wait(DEADLINE)
            assert refusals[label] in sink.reason
        check_that_nothing_stays(peer)
