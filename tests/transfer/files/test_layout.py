"""How files are cut into parts, and what a peer may say of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, get_codec
from nvflare_rdma.codecs.safetensors_header import StoredTensor
from nvflare_rdma.errors import ProtocolError, SourceError
from nvflare_rdma.transfer.files import layout
from nvflare_rdma.transfer.files.layout import Layout, plan
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, FileIdentity
from nvflare_rdma.transfer.manifest import INLINE_BYTES, Item, pack, unpack, width
from nvflare_rdma.transfer.pieces import PIECE_VALUES, PieceLayout

#: Types that files can be sent in.
FIXED = [
    name for name in CODEC_NAMES if isinstance(codec := get_codec(name), FixedSizeCodec) and not codec.needs_feedback
]
PART = 8 * BLOCK_BYTES
CODEC = get_codec("int8")


def identity(size: int, kind: str = "int8") -> FileIdentity:
    return FileIdentity("model", size, 5, "0" * 32, PART, kind)


def stored(shapes, header: int) -> list[StoredTensor]:
    tensors = []
    for number, (dtype, shape) in enumerate(shapes):
        nbytes = math.prod(shape) * width(dtype, True)
        tensors.append(StoredTensor(f"t{number}", dtype, tuple(shape), header, nbytes))
        header += nbytes
    return tensors


SHAPES = st.lists(
    st.tuples(
        st.sampled_from(["float32", "float16", "bfloat16", "float64", "int64", "bool"]),
        st.one_of(
            st.just(()), st.lists(st.integers(0, 9), max_size=3), st.lists(st.integers(1, 1500), min_size=2, max_size=2)
        ),
    ),
    max_size=12,
)


@settings(deadline=None)
@example(shapes=[("float32", [1500, 1400]), ("int64", [3]), ("bfloat16", [1500, 1400])], header=99, kind="int8")
@example(shapes=[("float32", [1500, 1400])], header=99, kind="ternary")
@given(shapes=SHAPES, header=st.integers(8, 5_000_000), kind=st.sampled_from(["", *FIXED]))
def test_parts_are_the_file_and_encoded_ones_are_in_their_tensors(shapes, header, kind):
    tensors = stored(shapes, header)
    file = identity(header + sum(tensor.nbytes for tensor in tensors), kind)
    planned = plan(file, tensors if kind else [])
    items = [item for item, _ in planned]
    assert unpack(pack(items)) == items
    layout = Layout(file, items)
    assert sum(layout.nbytes(part) for part in range(len(layout))) == file.size
    by_name = {tensor.name: tensor for tensor in tensors}
    done = dict.fromkeys(by_name, 0)
    for part, (item, name) in enumerate(planned):
        assert 0 < item.nbytes == layout.nbytes(part) <= PART
        assert part == 0 or layout.start(part) == layout.start(part - 1) + layout.nbytes(part - 1)
        assert item.torch == bool(name)
        if name:
            assert (item.dtype, layout.start(part)) == (by_name[name].dtype, by_name[name].start + done[name])
            # Pieces are those of the whole tensor, and have whole blocks.
            encoded = replace(item, cut=PieceLayout.choose(get_codec(kind), item.shape[0]))
            assert done[name] // width(item.dtype, True) % encoded.cut.values == 0
            assert encoded.cut.values % PIECE_VALUES == done[name] % BLOCK_BYTES == 0
            assert item == (encoded if encoded.sent_nbytes < item.nbytes else replace(item, cut=None))
            done[name] += item.nbytes
    for name, tensor in by_name.items():
        assert done[name] in (0, tensor.nbytes)
        if kind == "int8" and tensor.dtype in ("float32", "float16", "bfloat16") and tensor.nbytes > INLINE_BYTES:
            assert done[name] == tensor.nbytes


N = 300_000
WEIGHTS = Item("1", True, "float32", (N,), None, PieceLayout.choose(CODEC, N))
GOOD = [Item("0", False, "uint8", (1000,)), WEIGHTS, Item("2", False, "uint8", (PART,))]
SIZE = 1000 + 4 * N + PART


@pytest.mark.parametrize("cut", [WEIGHTS.cut, None])
def test_what_a_peer_may_say(cut):
    layout = Layout(identity(SIZE), [GOOD[0], replace(WEIGHTS, cut=cut), GOOD[2]])
    assert [layout.start(part) for part in range(3)] == [0, 1000, 1000 + 4 * N]


@pytest.mark.parametrize(
    ("number", "item"),
    [
        (0, replace(GOOD[0], name="1")),
        (0, replace(GOOD[0], name="x")),
        (0, replace(GOOD[0], shape=(999,))),
        (0, replace(GOOD[0], shape=(1001,))),
        (0, replace(GOOD[0], shape=(10, 100))),
        (0, replace(GOOD[0], shape=())),
        (0, replace(GOOD[0], shape=(0,), content=b"")),
        (0, replace(GOOD[0], content=bytes(1000))),
        (0, replace(GOOD[0], dtype="int8")),
        (0, replace(GOOD[0], torch=True)),
        (0, replace(GOOD[0], dtype="float64", shape=(125,))),
        (1, replace(WEIGHTS, torch=False)),
        (1, replace(WEIGHTS, cut=PieceLayout.choose(get_codec("blockwise8"), N))),
        (1, replace(WEIGHTS, cut=PieceLayout(CODEC, N, 2 * PIECE_VALUES))),
        (1, replace(WEIGHTS, cut=PieceLayout.choose(CODEC, N - 1))),
        (1, replace(WEIGHTS, dtype="bfloat16")),
        (2, replace(GOOD[2], shape=(PART + 1,))),
        (2, replace(GOOD[2], shape=(1 << 47,))),
    ],
)
def test_what_a_peer_may_not_say(number, item):
    with pytest.raises(ProtocolError):
        Layout(identity(SIZE), [*GOOD[:number], item, *GOOD[number + 1 :]])


def test_a_part_that_is_too_long_although_the_file_is():
    with pytest.raises(ProtocolError, match="part 0 of model can't be 0, uint8 of shape"):
        Layout(identity(PART + 1), [Item("0", False, "uint8", (PART + 1,))])


@pytest.mark.parametrize("items", [[], GOOD[:2], [*GOOD, Item("3", False, "uint8", (1,))], [GOOD[0], GOOD[0]]])
def test_parts_that_do_not_add_up(items):
    with pytest.raises(ProtocolError):
        Layout(identity(SIZE), items)


def test_values_are_not_sent_of_a_file_that_is_not_encoded():
    with pytest.raises(
        ProtocolError, match=r"part 1 of model can't be 1, float32 of shape \(300000,\), encoded as int8"
    ):
        Layout(identity(SIZE, ""), GOOD)


def test_too_many_parts(monkeypatch):
    monkeypatch.setattr(layout, "MAX_ITEMS", 3)
    tensors = stored([("float32", (5000,)), ("int8", (7,)), ("float32", (5000,))], 100)
    file = identity(100 + 40_007)
    with pytest.raises(SourceError, match="model has more than 3 parts: send it as it is"):
        plan(file, tensors)
