"""What a message's tensors are, as its sender says it: what is no plain tensor is not described, and what is no
manifest is refused before anything is made of it."""

from __future__ import annotations

import math
import sys
import tracemalloc

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.tensors import FLOAT_NAMES, MAX_DIMENSIONS, width
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.transfer import manifest
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.pieces import PieceLayout

DTYPES = ["bool", "float16", "float32", "float64", "complex64", "complex128", "int8", "uint8", "int64", "uint16"]
TORCH_ONLY = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


@st.composite
def items(draw: st.DrawFn) -> Item:
    of_torch = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES + TORCH_ONLY * of_torch))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    nbytes = math.prod(shape) * width(dtype, of_torch)
    cut = None
    if nbytes and dtype in FLOAT_NAMES and draw(st.booleans()):
        cut = PieceLayout.choose(get_codec(draw(st.sampled_from(["normfloat4", "int8", "float16"]))), math.prod(shape))
        nbytes = cut.nbytes
    content = draw(st.none() | st.binary(min_size=nbytes, max_size=nbytes)) if nbytes else b""
    return Item(draw(st.text("aü\0", max_size=8)), of_torch, dtype, shape, content, cut)


@settings(deadline=None, max_examples=50)
@given(st.lists(items(), max_size=6, unique_by=lambda item: item.name))
def test_what_is_packed_is_unpacked(described):
    assert manifest.unpack(manifest.pack(described)) == described


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_manifest(data):
    try:
        manifest.unpack(data)
    except ProtocolError:
        return
    assert data[:1] == b"\x90", "only the manifest of no tensors is so easily found"


def test_so_many_items_are_described_and_taken(monkeypatch):
    monkeypatch.setattr(manifest, "MAX_ITEMS", 6)
    tensors = {str(i): np.zeros(1) for i in range(7)}
    with pytest.raises(TransferError, match="a message has 7 tensors, and 6 are the most"):
        manifest.describe(tensors)
    del tensors["6"]
    assert len(manifest.unpack(manifest.pack(manifest.describe(tensors)))) == 6


def test_a_manifest_does_not_cost_its_receiver_many_times_its_size():
    """All the items that there may be take some tens of MiB, and nothing is made of one more."""
    assert manifest.MAX_ITEMS <= 1 << 16
    rows = [[str(i), False, "int8", [0], b""] for i in range(manifest.MAX_ITEMS + 1)]
    with pytest.raises(ProtocolError, match="exceeds max_array_len"):
        manifest.unpack(msgpack.packb(rows))


@pytest.mark.parametrize("made", [[], {}], ids=["lists", "maps"])
def test_what_is_in_rows_does_not_cost_many_times_its_size_either(made):
    row = [made] * 1000  # a byte each, and 56 or more here
    data = msgpack.packb([row] * 1000)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="malformed manifest: it has "):
            manifest.unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


GOOD = ["x", True, "float32", [2, 3], bytes(24)]


def but(**fields) -> list:
    names = ["name", "torch", "dtype", "shape", "content"]
    return [[fields.get(name, value) for name, value in zip(names, GOOD, strict=True)]]


@pytest.mark.parametrize(
    "rows",
    [
        5,
        None,
        {},
        {"x": 1},
        [5],
        ["abcde"],
        [GOOD[:4]],
        [[*GOOD, 1]],
        [GOOD, GOOD],
        but(name=b"x"),
        but(torch=1),
        but(dtype=4),
        but(dtype="object"),
        but(dtype="qint8"),
        but(torch=False, dtype="bfloat16"),
        but(shape=6),
        but(shape=[2.0, 3]),
        but(shape=[True, 6]),
        but(shape=[-2, -3]),
        but(shape=[1] * (MAX_DIMENSIONS + 1)),
        but(shape=[1 << 48], content=None),
        but(shape=[1 << 47, 1 << 47], content=None),
        but(shape=[0, 1 << 40, 1 << 40], content=b""),
        but(shape=[0], content=None),
        but(content="x" * 24),
        but(content=bytes(23)),
        but(content=bytes(25)),
        but(content=b""),
        [[*GOOD, "float16", 1 << 17]],
        [[*GOOD[:4], bytes(11), "float16", 1 << 17]],
        [[*GOOD[:4], bytes(13), "float16", 1 << 17]],
        [["x", True, "float32", [0, 3], b"", "float16", 1 << 17]],
    ],
    ids=str,
)
def test_malformed(rows):
    assert manifest.unpack(msgpack.packb([GOOD]))  # all but this is good
    with pytest.raises(ProtocolError, match="malformed manifest"):
        manifest.unpack(msgpack.packb(rows))


@pytest.mark.parametrize(
    "data",
    [
        None,
        "x",
        [],
        msgpack.packb([GOOD])[:-1],
        msgpack.packb([GOOD]) + b"\x00",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
    ],
    ids=["none", "text", "list", "short", "long", "nested", "huge"],
)
def test_what_is_not_msgpack(data):
    with pytest.raises(ProtocolError, match="manifest"):
        manifest.unpack(data)


def test_plain_tensors_are_described_without_being_read():
    found = manifest.describe(
        {"a": np.zeros((2, 0, 3), np.int8), "b": torch.nn.Parameter(torch.ones(4, 1)), "c": torch.ones(2, 3).T}
    )
    assert found == [
        Item("a", False, "int8", (2, 0, 3)),
        Item("b", True, "float32", (4, 1)),
        Item("c", True, "float32", (3, 2)),
    ]


class Labelled(torch.Tensor):
    """Means more than its values."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nn.UninitializedParameter(),
        lambda: torch.ones(3).as_subclass(Labelled),
        lambda: np.array([None, 1]),
        lambda: np.zeros(3, ">f4"),
        lambda: np.zeros(3, [("a", "f4")]),
        lambda: np.zeros(3, "datetime64[s]"),
        lambda: np.array(["text"]),
        lambda: np.ma.array([1.0]),
        lambda: np.ones((2, 2)).view(np.matrix),
        lambda: np.zeros(3, np.longdouble),
        lambda: np.float32(1),
        lambda: [1.0],
    ],
)
def test_what_is_no_plain_tensor_is_not_described(make):
    with pytest.raises(TransferError, match=r"weights is a .* no plain dense tensor"):
        manifest.describe({"weights": make()})


def test_a_big_endian_host_is_not_described(monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(TransferError, match="no plain dense tensor"):
        manifest.describe({"x": np.zeros(3)})
