"""What a direct transfer is recorded as, on both sides, where not everything goes well."""

from __future__ import annotations

import numpy as np
import torch

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.marks import marked
from nvflare_rdma.errors import RdmaError
from nvflare_rdma.streaming.fallback import finish
from nvflare_rdma.transfer import content
from nvflare_rdma.transfer.arrays import raw_bytes
from nvflare_rdma.transfer.manifest import INLINE_BYTES, SMALL_TOTAL
from nvflare_rdma.transfer.receiver import Pull
from nvflare_rdma.transfer.records import Meter
from nvflare_rdma.transfer.sinks import TensorDestination
from tests.support.data_channels import ANY_PORT
from tests.support.direct_transfers import large, new
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually


def pull(it, site, progress=lambda done: None) -> None:
    """As the decomposer does."""
    meter = Meter("received", site.name, "server", ledger=site.ledger)
    meter.budget = site.budget.watch()
    failure = None
    pulling = Pull(site, "server", it.ask(site.name), TensorDestination(new), lambda: False, progress, meter)

    try:
        pulling.run()
    except RdmaError as error:
        failure = str(error)
    finish(meter, failure, pulling.items)


def sides(records):
    eventually(lambda: len(records) == 2, DEADLINE)
    return {record.direction: record for record in records}


def test_a_chunk_that_was_damaged_counts_as_sent_again_on_both_sides(direct, cell, records):
    sent = large(3, 1 << 20)
    it, site = direct(sent), cell("site-1")
    link = it.channels.dial("site-1", site.invite("server"))
    assert site.await_open("server") is not None
    endpoint, write, damaged = link._rails.endpoint, link._rails.endpoint.write, []

    def flip_once(rail, source, remote, notification, digest):
        if not damaged:
            damaged.append(bytearray(source))
            damaged[0][5] ^= 1
            source = memoryview(damaged[0])
        write(rail, source, remote, notification, digest)

    endpoint.write = flip_once
    pull(it, site)
    for record in sides(records).values():
        assert (record.items, record.raw_bytes, record.wire_bytes) == (3, 3 << 20, 3 << 20)
        assert (record.resent_chunks, record.fabric, record.outcome) == (1, "tcp", "done")


def test_what_was_landed_before_a_channel_broke_counts_once(direct, cell, records):
    it, site = direct(large(5)), cell("site-1")
    cut = it.once_some_are_here(lambda: site.find("server").close(0.0))
    pull(it, site, progress=cut)
    received = sides(records)["received"]
    assert (received.items, received.raw_bytes, received.outcome) == (5, 500_000, "done")
    assert received.wire_bytes == 500_000


def test_small_tensors_come_with_the_manifest_and_over_no_fabric(direct, cell, records, monkeypatch):
    monkeypatch.setattr(content, "SMALL_TOTAL", SMALL_TOTAL)
    sent = {"a": torch.ones(3), "b": np.zeros(INLINE_BYTES, np.uint8), "empty": np.zeros(0)}
    pull(direct(sent, ports=None), cell("site-1", ports=None))
    for record in sides(records).values():
        assert (record.items, record.raw_bytes, record.wire_bytes) == (3, INLINE_BYTES + 12, INLINE_BYTES + 12)
        assert (record.path, record.fabric, record.outcome) == ("direct", "", "done")


def test_a_sender_that_ends_has_failed_once_for_each_receiver(direct, cell, records):
    it = direct(large(2))
    for receiver in ("site-1", "site-2"):
        it.ask(receiver)({"do": "describe"})
    it.ask("site-1")({"do": "give up"})
    it.ask("nobody")({"do": "done"})
    it.service.close()
    it.service.close()
    assert [(record.peer, record.reason) for record in records] == [
        ("site-1", "the receiver has given up"),
        ("site-2", ""),
    ]
    assert {record.outcome for record in records} == {"failed: the sender has ended the transfer"}


def test_an_answer_that_is_asked_for_twice_makes_no_second_record(direct, cell, records):
    it = direct({"a": torch.ones(3)})
    for request in ("describe", "done", "done", "give up"):
        it.ask("site-1")({"do": request})
    it.service.close()
    assert [record.outcome for record in records] == ["done"]


def test_a_receiver_that_fails_says_why_and_what_came(direct, cell, records):
    it, site = direct(large(3), ports=None), cell("site-1", ports=None)
    pull(it, site)
    (received,) = records
    assert received.outcome.startswith("failed: neither side has a door")
    assert (received.items, received.raw_bytes, received.wire_bytes) == (0, 0, 0)


def test_what_is_encoded_on_its_way_is_less_than_what_arrives(direct, cell, records):
    codec = get_codec("normfloat4")
    weights = torch.randn(300_000)
    pull(direct({"w": marked(weights, codec), "b": torch.ones(3)}), cell("site-1"))
    for record in sides(records).values():
        assert (record.items, record.raw_bytes, record.outcome) == (2, 1_200_012, "done")
        assert 150_000 < record.wire_bytes < 170_000 + 12
    assert len({record.wire_bytes for record in records}) == 1
    assert 0 < sides(records)["received"].budget_peak_bytes <= 16 << 20


def test_several_receivers_share_a_channel_and_no_figures(direct, cell, records):
    one, site = direct(large(2)), cell("site-1")
    two = direct(large(3, 50_000), ports=ANY_PORT)
    two.channels.close()
    two.channels = one.channels
    pull(one, site)
    pull(two, site)
    eventually(lambda: len(records) == 4, DEADLINE)
    assert sorted((r.items, r.wire_bytes) for r in records) == [(2, 200_000), (2, 200_000), (3, 150_000), (3, 150_000)]


def test_raw_bytes_of_tensors_that_are_not_plain():
    sparse = torch.eye(10).to_sparse()
    assert raw_bytes({"sparse": sparse, "text": "x", "a": np.zeros(3)}) == 400 + 24
