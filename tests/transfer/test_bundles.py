"""Small tensors of a message that is not small travel together."""

from __future__ import annotations

import itertools

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nvflare_rdma.channel import MAX_UNIT_BYTES, MIN_CHUNK_BYTES
from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.marks import marked, was_decoded
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.errors import ProtocolError, UnrepresentableError
from nvflare_rdma.transfer import content, manifest
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.files.transfer import FileDestination
from nvflare_rdma.transfer.manifest import BUNDLE_BYTES, BUNDLED_BYTES, Item
from nvflare_rdma.transfer.places import OnDisk
from nvflare_rdma.transfer.sinks import TensorDestination
from tests.support.direct_transfers import assert_equal, new, new_memory
from tests.support.encoded import as_encoded
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

NF4 = get_codec("normfloat4")


@pytest.fixture(autouse=True)
def as_they_are(direct, monkeypatch):
    """`direct` sends everything apart; here the limits are as they are, and only descriptions have nothing in them."""
    monkeypatch.setattr(manifest, "BUNDLED_BYTES", BUNDLED_BYTES)


def adapter(count: int = 100, size: int = 5000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(size + i, generator=generator) for i in range(count)}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 3 * BUNDLED_BYTES) | st.integers(1, 500), max_size=80))
def test_every_item_is_in_one_place_and_no_bundle_is_too_large(sizes):
    items = [Item(str(i), False, "uint8", (size,), position=i) for i, size in enumerate(sizes)]
    found = manifest.bundled(items)
    assert sorted((tensor for item in found for tensor in item.tensors), key=lambda item: int(item.name)) == items
    for bundle in (item for item in found if item.members):
        assert len(bundle.members) > 1
        assert all(member.nbytes <= BUNDLED_BYTES for member in bundle.members)
        assert bundle.sent_nbytes == sum(member.nbytes for member in bundle.members) <= BUNDLE_BYTES
        assert MIN_CHUNK_BYTES <= bundle.unit <= MAX_UNIT_BYTES
    # Small ones are together as long as they fit: none of two neighbours had room for the other's first.
    small = [item for item in items if item.nbytes <= BUNDLED_BYTES]
    most = min(max(sum(item.nbytes for item in small) // 16, MIN_CHUNK_BYTES), BUNDLE_BYTES)
    together = [item.tensors for item in found if item.tensors[0] in small]
    together.sort(key=lambda tensors: int(tensors[0].name))
    for one, other in itertools.pairwise(together):
        assert sum(item.nbytes for item in one) + other[0].nbytes > most
    known = manifest.unpack(manifest.pack(found), bundles=True)
    assert known == found
    assert manifest.in_order(known) == items


ROW = ["x", True, "float32", [2, 3], None]
OTHER = ["y", *ROW[1:]]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[0, 0, *ROW]], "malformed"),
        ([[0]], "malformed"),
        ([[0, ROW]], "malformed"),
        ([[True, *ROW]], "malformed"),
        ([[0, *ROW[:4], bytes(24)]], "a bundle has an item with content"),
        ([[0, *ROW[:3], [MAX_UNIT_BYTES], None]], "4194304 bytes, 1048576 are the most"),
        ([[0, *ROW], [0, *ROW]], "a name comes twice"),
        ([[0, *ROW], ROW], "a name comes twice"),
        ([[1, *ROW]], "in bundle 1 after 0 bundles"),
        ([[-1, *ROW]], "in bundle -1 after 0 bundles"),
        ([[0, *ROW], [2, *OTHER]], "in bundle 2 after 1 bundles"),
        ([[0, *ROW], [1 << 60, *OTHER]], "after 1 bundles"),
        ([[0, *ROW], [1, *OTHER], [0, "z", *ROW[1:]]], "in bundle 0 after 2 bundles"),
    ],
    ids=str,
)
def test_what_is_no_bundle_is_refused(rows, reason):
    with pytest.raises(ProtocolError, match=reason):
        manifest.unpack(msgpack.packb(rows), bundles=True)


def test_where_none_may_be_a_bundle_is_refused():
    good = [[0, *ROW], [0, *OTHER]]
    assert manifest.unpack(msgpack.packb(good), bundles=True)
    with pytest.raises(ProtocolError, match="malformed manifest"):
        manifest.unpack(msgpack.packb(good))
    assert TensorDestination.bundles
    assert not FileDestination.bundles


def test_a_bundle_counts_with_all_that_is_in_it(monkeypatch):
    monkeypatch.setattr(manifest, "MAX_ITEMS", 6)
    rows = [[i, f"{i}{j}", *ROW[1:]] for i in range(2) for j in range(4)]
    with pytest.raises(ProtocolError, match="8 exceeds max_array_len"):
        manifest.unpack(msgpack.packb(rows), bundles=True)


def test_tensors_are_given_in_the_order_that_they_were_sent_in(direct, cell):
    large = {f"large{i}": torch.randn(100_000 + i) for i in range(3)}
    small = adapter()
    names = [*small, *large, "empty"]
    np.random.default_rng(0).shuffle(names)
    sent = {name: {**small, **large, "empty": torch.zeros(0)}[name] for name in names}
    sent = {name: marked(tensor, NF4) if name in small else tensor for name, tensor in sent.items()}
    assert any(item.members for item in TensorContent(sent).items(compact=True))
    assert list(direct(sent).confirmed(cell("site-1"))) == names


@pytest.mark.parametrize("fabrics", [("tcp",), ("shm",)], ids="-".join)
def test_tensors_of_all_kinds_are_in_few_messages(fabrics, direct, cell):
    plain = adapter()
    sent = plain | {
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(70, 90).T,
        "half": torch.randn(300).to(torch.bfloat16),
        "counts": np.arange(77).reshape(7, 11)[:, ::2],
        "large": torch.randn(200_000),
    }
    encoded = {name: marked(plain[name], NF4) for name in ("t3", "t50", "t99")}
    it, site = direct(sent | encoded, fabrics=fabrics), cell("site-1", fabrics=fabrics)
    told = []
    got = it.confirmed(site, progress=told.append)
    for name in encoded:
        assert np.array_equal(to_flat(got[name]), as_encoded(plain[name], "normfloat4"))
        assert was_decoded(got[name])
    assert_equal({name: got[name] for name in sent if name not in encoded}, {n: sent[n] for n in sent.keys() - encoded})
    eventually(lambda: sum(count for _, _, count in it.moved) == len(sent) - 1, DEADLINE)  # not the empty one
    assert len(it.moved) < 30
    assert told[-1].items == len(sent) - 1
    assert told[-1].nbytes == sum(nbytes for _, nbytes, _ in it.moved)


def test_members_land_in_files_of_their_own(direct, cell, tmp_path):
    plain = adapter(40)
    sent = {name: marked(tensor, NF4) if name == "t7" else tensor for name, tensor in plain.items()}
    it, site = direct(sent), cell("site-1")
    got = it.confirmed(site, land=lambda item: OnDisk(item, str(tmp_path / item.name)))
    assert len(it.moved) < 20
    for name, (path, key) in got.items():
        wanted = torch.from_numpy(as_encoded(plain[name], "normfloat4")) if name == "t7" else plain[name]
        assert torch.equal(load_file(path)[key], wanted)


def test_one_that_its_codec_can_not_carry_makes_no_other_exact(direct, cell, caplog):
    plain = adapter()
    plain["t40"][7] = float("nan")
    it, site = direct({name: marked(tensor, NF4) for name, tensor in plain.items()}), cell("site-1")
    got = it.confirmed(site)
    assert {name for name in plain if not was_decoded(got[name])} == {"t40"}
    assert bytes(to_flat(got["t40"])) == bytes(to_flat(plain["t40"]))
    assert "tensor t40 is sent exact" in caplog.text
    assert it.requests.count("describe") == 2
    it.requests.clear()
    it.confirmed(site)
    assert it.asked == ["describe"]  # it is known now


def test_a_bundle_whose_members_are_all_exact_is_the_same_bundle(direct, cell):
    plain = {name: torch.full_like(tensor, float("nan")) for name, tensor in adapter().items()}
    it, site = direct({name: marked(tensor, NF4) for name, tensor in plain.items()}), cell("site-1")
    assert_equal(it.confirmed(site), plain)


def test_receivers_share_what_is_encoded_and_nothing_is_kept():
    tensors = {name: marked(tensor, NF4) for name, tensor in adapter().items()}
    made = TensorContent(tensors)
    item = next(item for item in made.items(compact=True) if item.members)
    one, other = made.source(item), made.source(item)
    first = one.read(0, one.nbytes, new_memory)
    for tensor in tensors.values():
        tensor.zero_()  # so that it shows who encodes again
    assert bytes(other.read(0, other.nbytes, new_memory)) == bytes(first)
    del one, other
    third = made.source(item)
    assert bytes(third.read(0, third.nbytes, new_memory)) != bytes(first)
    del third
    assert not made._bundles
    assert not made._cache._chunks


def test_whose_member_can_not_be_encoded_says_which():
    made = TensorContent({f"t{i}": marked(torch.full((9000,), float("nan")), NF4) for i in range(60)})
    item = next(item for item in made.items(compact=True) if item.members)
    source = made.source(item)
    with pytest.raises(UnrepresentableError, match=f"{item.name}: "):
        source.read(0, source.nbytes, new_memory)
    assert source.unrepresentable.startswith(f"{item.name}: ")
    made.send_exact(item, source.unrepresentable)
    assert made._exact == {member.name for member in item.members}


def test_bundles_that_have_landed_are_not_sent_again(direct, cell):
    sent = adapter(400, 20_000)  # more bundles than are offered at once
    it, site = direct(sent), cell("site-1")
    asked: list[list[int]] = []
    ask = it.ask("site-1")

    def listen(request: dict) -> dict:
        if request["do"] in ("send", "describe") and request.get("items") is not None:
            asked.append(list(request["items"]))
        return ask(request)

    cut = it.once_some_are_here(lambda: site.find("server")._stream.close())
    assert_equal(it.confirmed(site, listen, progress=cut, land=new), sent)
    assert len(asked) >= 2
    assert set(asked[-1]) < set(asked[0])


def test_a_bundle_can_not_be_begun_in_the_middle(direct):
    it = direct(adapter())
    it.ask("site-1")({"do": "describe", "compact": True})
    request = {"do": "send", "first": 1, "items": [0], "invitation": None, manifest.STARTS: [MIN_CHUNK_BYTES // 2]}
    assert "where no unit of an item begins" in it.ask("site-1")(request)["refused"]
    assert content.TensorContent(adapter()).items(compact=True)[0].members
