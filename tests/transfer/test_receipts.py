"""What a sender signs off, and that no receiver gets a tensor that has lost more than its mark allows."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from nvflare_rdma.codecs import Codes, get_codec
from nvflare_rdma.codecs.fidelity import PieceNotes, RelativeError
from nvflare_rdma.codecs.marks import marked, note_codes, was_decoded
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.streaming.relay import RelayConsumer, produce
from nvflare_rdma.transfer import content, manifest
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.encoding import EncodedChunkCache
from nvflare_rdma.transfer.places import in_memory
from nvflare_rdma.transfer.receipt import Receipt
from nvflare_rdma.transfer.sender import Relayed
from tests.support.direct_transfers import new_memory
from tests.support.encoded import as_encoded
from tests.support.tcp_pair import DEADLINE, in_parallel
from tests.support.waiting import eventually

NF4 = get_codec("normfloat4")


def weights(n=300_000, seed=1) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def error_of(tensor, codec="normfloat4") -> float:
    x, y = tensor.numpy().astype(np.float64), as_encoded(tensor, codec).astype(np.float64)
    return math.sqrt(((x - y) ** 2).sum() / (x**2).sum())


def limited(tensor, limit, codec=NF4):
    return marked(tensor, codec, PieceNotes(RelativeError(0.05, True), limit))


def sent(records, count=1):
    eventually(lambda: sum(each.direction == "sent" for each in records) == count, DEADLINE)
    return [each for each in records if each.direction == "sent"]


def test_an_error_that_nobody_knows_is_not_called_none():
    assert "; relative error not known; " in str(Receipt({"normfloat4": 1, "exact": 2}, None, ""))
    assert "; nothing lost; " in str(Receipt({"lossless": 1, "exact": 2}, None, ""))


def test_the_error_is_that_of_what_the_receiver_has(direct, cell, records):
    tensor = weights()
    got = direct({"w": limited(tensor, 0.2), "b": torch.ones(3)}).pull(cell("site-1"))
    (record,) = sent(records)
    lost = (tensor.double() - got["w"].double()).square().sum() / tensor.double().square().sum()
    assert record.relative_error == pytest.approx(math.sqrt(lost), rel=1e-9)
    assert (record.codecs, record.error_from) == ("1 normfloat4, 1 exact", "whole")
    assert len(record.digest) == 32


@pytest.mark.parametrize("sites", [1, 3])
def test_what_loses_too_much_travels_exact_to_all(direct, cell, records, sites, caplog):
    """Its estimate was below the limit, and the whole of it is not."""
    tensor, other = weights(), weights(seed=2)
    tight = error_of(tensor) * 0.999
    it = direct({"w": limited(tensor, tight), "x": limited(other, 0.2)})
    found = {}
    in_parallel(*(lambda name=f"site-{i}": found.update({name: it.pull(cell(name))}) for i in range(sites)))
    for got in found.values():
        assert torch.equal(got["w"], tensor)
        assert np.array_equal(to_flat(got["x"]), as_encoded(other, "normfloat4"))
        assert [was_decoded(got[name]) for name in "wx"] == [False, True]
    assert "normfloat4 loses 0.09" in caplog.text
    assert caplog.text.count("tensor w is sent exact") == 1
    assert {record.codecs for record in sent(records, sites)} == {"1 exact, 1 normfloat4"}


def test_who_comes_later_gets_it_exact_too(direct, cell):
    tensor = weights()
    it = direct({"w": limited(tensor, error_of(tensor) * 0.999)})
    for site in ("site-1", "site-2"):
        assert torch.equal(it.pull(cell(site))["w"], tensor)


def test_a_limit_that_just_holds_is_no_obstacle(direct, cell):
    tensor = weights()
    got = direct({"w": limited(tensor, error_of(tensor) * 1.000001)}).pull(cell("site-1"))["w"]
    assert was_decoded(got)


def test_small_ones_that_lose_too_much_travel_exact(cell, direct, monkeypatch):
    """With the description, and in bundles."""
    monkeypatch.setattr(manifest, "BUNDLED_BYTES", 128 << 10)
    for small_total in (256 << 10, 0):
        monkeypatch.setattr(content, "SMALL_TOTAL", small_total)
        tensors = {f"t{i}": weights(2000, i) for i in range(20)}
        marks = {name: limited(each, 0.2 if name != "t7" else 1e-3) for name, each in tensors.items()}
        got = direct(marks, ports=None if small_total else (0, 0)).pull(cell(f"site-{small_total}"))
        assert torch.equal(got["t7"], tensors["t7"])
        assert np.array_equal(to_flat(got["t8"]), as_encoded(tensors["t8"], "normfloat4"))


def test_on_the_fallback_it_travels_exact_too():
    tensor = weights()
    made = TensorContent({"w": limited(tensor, error_of(tensor) * 0.999), "x": limited(tensor, 0.2)})
    items = made.items()
    relayed, consumer, state = Relayed(items, made), RelayConsumer(items, in_memory(new_memory)), None
    while (answer := produce(relayed, state))[0] == "ok":
        state = consumer.consume("", answer[2], answer[1])
    consumer.download_completed("")
    assert torch.equal(consumer.result["w"], tensor)
    assert np.array_equal(to_flat(consumer.result["x"]), as_encoded(tensor, "normfloat4"))
    receipt = made.receipt(relayed.items)
    assert dict(receipt.codecs) == {"exact": 1, "normfloat4": 1}


def test_the_digest_is_of_what_left(direct, cell, records):
    """It is the same for all receivers of one message, and another one if a bit of a value or a name differs."""
    tensor = weights()
    changed = tensor.clone()
    changed[77] += 1
    it = direct({"w": marked(tensor, NF4), "b": torch.ones(3)})
    for site in ("site-1", "site-2"):
        it.pull(cell(site))
    for n, other in enumerate(
        (
            {"w": marked(tensor, NF4), "b": torch.ones(3)},
            {"w": marked(changed, NF4), "b": torch.ones(3)},
            {"w": marked(tensor, NF4), "b": torch.zeros(3)},
            {"v": marked(tensor, NF4), "b": torch.ones(3)},
            {"w": marked(tensor, get_codec("int8")), "b": torch.ones(3)},
        )
    ):
        it.service.close()
        it = direct(other)
        it.pull(cell(f"other-{n}"))
    digests = [record.digest for record in sent(records, 7)]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests)) == 5
    assert "" not in digests


def test_codes_of_the_filters_count_as_what_they_stand_for(direct, cell, records, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    codes = torch.ones(200_000, dtype=torch.uint8)
    note_codes(codes, Codes("int2", RelativeError(0.4, True)))
    direct({"w": codes, "scales": torch.ones(50_000)}).pull(cell("site-1"))
    (record,) = sent(records)
    assert (record.codecs, record.relative_error, record.error_from) == ("1 int2, 1 exact", 0.4, "sample")
    (line,) = [text for text in caplog.messages if text.startswith("sent 2 tensors to site-1: 400000 bytes, ")]
    assert line.endswith(
        f"on the way; 1 in int2, 1 exact; relative error at most 0.4 (estimated from a sample); digest {record.digest}"
    )


def test_lossless_codes_lose_nothing(direct, cell, records):
    codes = torch.ones(200_000, dtype=torch.uint8)
    note_codes(codes, Codes("lossless", RelativeError(0.0)))
    direct({"w": codes}).pull(cell("site-1"))
    (record,) = sent(records)
    assert (record.codecs, record.relative_error, record.error_from) == ("1 lossless", None, "")


def test_a_message_of_which_nothing_is_encoded_is_not_read_for_a_digest(direct, cell, records, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    direct({"w": weights()}).pull(cell("site-1"))
    (record,) = sent(records)
    assert (record.codecs, record.relative_error, record.error_from, record.digest) == ("", None, "", "")
    assert not [text for text in caplog.messages if text.startswith("sent ")]


def test_who_takes_flares_own_path_gets_marked_tensors_exact(direct, records):
    it = direct({"w": marked(weights(), NF4), "b": torch.ones(3)})
    it.service.meters.begin("site-1").fall_back("the receiver asked on FLARE's own path")
    it.service.ended("site-1")
    (record,) = sent(records)
    assert (record.codecs, record.relative_error, record.digest) == ("2 exact", None, "")


def test_pieces_are_measured_once_for_all_receivers(direct, cell, monkeypatch):
    calls = []
    measured = "nvflare_rdma.transfer.encoding.lost_by"
    from nvflare_rdma.codecs import lost_by

    monkeypatch.setattr(measured, lambda *args: (calls.append(1), lost_by(*args))[1])
    view = limited(weights(), 0.2)
    cache = EncodedChunkCache(limit=0)
    made = TensorContent({"w": view}, cache=cache)
    (item,) = made.items()
    for _ in range(3):
        source = made.source(item)
        source.read(0, source.nbytes, new_memory)
    assert len(calls) == item.cut.count
