"""Encoding with torch ops against the numba kernels, bit for bit: on CPU tensors, and on CUDA's where there are any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import CODEC_NAMES, Blockwise8, get_codec
from nvflare_rdma.codecs.tensors import to_array
from nvflare_rdma.errors import CodecError, UnrepresentableError

torch = pytest.importorskip("torch")

from nvflare_rdma.codecs import on_device  # noqa: E402
from nvflare_rdma.codecs.on_device import can_encode_on_device, encode_on_device  # noqa: E402

NAMES = [name for name in CODEC_NAMES if name not in ("adaquant", "lossless", "exact_delta")]
SETTINGS = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
LARGEST = float(np.finfo(np.float32).max)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of two of the largest blocks, so that small tensors have several."""
    monkeypatch.setattr(on_device, "PIECE", 8192)
    return on_device.PIECE


def by_kernels(codec, tensor):
    """The encoded bytes, or the words with which the values were refused."""
    encoded = np.empty(codec.encoded_nbytes(tensor.numel()), np.uint8)
    try:
        codec.encode_into(to_array(tensor), encoded)
    except UnrepresentableError as error:
        return str(error)
    return encoded


def by_torch(codec, tensor):
    before = tensor.clone()
    try:
        encoded = encode_on_device(codec, tensor)
    except UnrepresentableError as error:
        return str(error)
    assert torch.equal(tensor.nan_to_num(7), before.nan_to_num(7))
    return encoded


def assert_same(codec, tensor):
    wanted, got = by_kernels(codec, tensor), by_torch(codec, tensor)
    assert isinstance(got, type(wanted)), f"{codec.name}: {got}, not {wanted}"
    if isinstance(wanted, str):
        # Of several values that are too large, the message names the largest of a run, and test pieces are shorter.
        assert got.split(" value ")[0] == wanted.split(" value ")[0]
        return
    for name, part in codec.parts(wanted, tensor.numel()).items():
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[part.itemsize]
        found = codec.parts(got, tensor.numel())[name]
        np.testing.assert_array_equal(found.view(bits), part.view(bits), err_msg=f"{codec.name} {name}")


def make(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    with np.errstate(over="ignore"):
        x = {
            "normal": x,
            "even": rng.uniform(-1, 1, n),
            "constant": np.full(n, -1.75),
            "zero": x * 0,  # of both signs
            "sparse": x * (rng.random(n) < 0.02),
            "outliers": np.where(rng.random(n) < 0.01, x * 1000, x),
            "wide": x * 10.0 ** rng.uniform(-44, 37, n),
            "blocks of any size": x * np.repeat(10.0 ** rng.uniform(-46, 37, -(-n // 64)), 64)[:n],
            "denormal": x * 1e-41,
            "the smallest": np.sign(x) * 2.0**-149 * rng.integers(0, 3, n),
            "about 1e-38": x * 1e-38,
            "about 2**-100": np.sign(x) * 2.0**-100 * rng.choice([1, 1 - 2.0**-24, 1 + 2.0**-23], n),
            "huge": rng.uniform(-1, 1, n) * LARGEST,
            "the largest": np.sign(x) * LARGEST,
            "bits": rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32),
        }[kind].astype(np.float32)
    if kind == "bits":
        x[~np.isfinite(x)] = 1
    return np.clip(x, -LARGEST, LARGEST)


KINDS = [
    "normal", "even", "constant", "zero", "sparse", "outliers", "wide", "blocks of any size", "denormal",
    "the smallest", "about 1e-38", "about 2**-100", "huge", "the largest", "bits",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_those_of_the_kernels(name, kind, device, small_pieces):
    codec = get_codec(name)
    block = codec.block_size
    for n in (0, 1, 2, 3, block - 1, block, block + 1, small_pieces, 2 * small_pieces + block + 1):
        for dtype in DTYPES:
            assert_same(codec, torch.from_numpy(make(kind, n, n)).to(device, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_the_usual_size(name, device):
    x = torch.from_numpy(make("outliers", on_device.PIECE + 70_001))
    assert_same(get_codec(name), x.to(device))


@pytest.mark.parametrize("name", NAMES)
@SETTINGS
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 30_000),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-30, 30),
)
def test_any_values_and_sizes(name, seed, n, kind, dtype, power, device, small_pieces):
    x = torch.from_numpy(make(kind, n, seed)) * 2.0**power
    assert_same(get_codec(name), x.clamp_(-LARGEST, LARGEST).to(device, dtype))


def neighbours(values):
    """Each value with the float32 before and after it."""
    values = np.asarray(values, np.float32)
    return np.concatenate([np.nextafter(values, np.float32(-9)), values, np.nextafter(values, np.float32(9))])


@pytest.mark.parametrize("absmax", [1, 2, 3.3, 448, 2.0**-99, 1e-38, 2.0**-127, 3e38])
@pytest.mark.parametrize("name", NAMES)
def test_values_at_every_threshold(name, absmax, device):
    codec = get_codec(name)
    thresholds = {
        "int8": np.arange(-126.5, 127) / 127,
        "float8_e4m3": np.concatenate([t := codec_middles("float8_e4m3"), -t]),
        "blockwise8": np.arange(-1, 1, 1 / 32767.5),
        "float16": np.arange(-2048, 2048) / 2048 * (1 + 2.0**-11),
        "bfloat16": np.arange(-256, 256) / 256 * (1 + 2.0**-8),
    }.get(name)
    if thresholds is None:
        thresholds = codec_middles(name.removesuffix("_dq"))
    near = np.clip(neighbours(thresholds), -1, 1)
    block = codec.block_size
    per_row = max(block - 1, 1)
    padded = np.zeros(-(-near.size // per_row) * per_row, np.float32)
    padded[: near.size] = near
    rows = padded.reshape(-1, per_row)
    if block > 1:  # each block has the value that the others are multiples of
        rows = np.concatenate([np.ones((len(rows), 1), np.float32), rows], axis=1)
    x = rows * np.float32(absmax)
    assert_same(codec, torch.from_numpy(x).to(device))
    assert_same(codec, torch.from_numpy(x.reshape(-1)[: x.size - block // 3]).to(device))


def codec_middles(name):
    table = getattr(get_codec(name), "table", None)
    if table is None or name in ("int2", "ternary"):
        return np.linspace(-1, 1, 1001)
    table = np.unique(table[np.isfinite(table)]) / np.nanmax(table)
    return (table[:-1] + table[1:]) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_not_contiguous(name, dtype, device, small_pieces):
    codec = get_codec(name)
    values = torch.from_numpy(make("outliers", 40_000)).to(device, dtype)
    square = values.reshape(200, 200)
    for x in (
        square.T,
        square[:, ::3],
        square[3:, 7:],
        values.reshape(20, 10, 5, 40).to(memory_format=torch.channels_last),
        values[:1000].expand(30, 1000),
        values[5:],
        values[7],
        torch._neg_view(square),
        torch._neg_view(square.T),
        torch.nn.Parameter(square.T),
    ):
        assert_same(codec, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65520, -3.4e38])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_or_carried_as_by_the_kernels(name, bad, device, small_pieces):
    codec = get_codec(name)
    for where in (0, 9000, 20_000):
        x = make("normal", 20_001)
        x[where] = bad
        for dtype in DTYPES:
            assert_same(codec, torch.from_numpy(x).to(device, dtype))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_bits_of_nan_are_those_of_the_kernels(name, device):
    bits = [0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFC00000, 0x7FC0F000, 0xFF812345, 0x7F800000, 0x3F800000]
    assert_same(get_codec(name), torch.from_numpy(np.array(bits * 5, np.uint32).view(np.float32)).to(device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["float4_dq", "normfloat4_dq"])
def test_scales_that_would_become_infinite_are_refused(name, dtype, device):
    largest = torch.finfo(dtype).max
    for zeros in range(60, 70):
        x = largest * (torch.arange(625) >= zeros).to(dtype).repeat_interleave(64)
        assert_same(get_codec(name), x.to(device))


def test_a_code_table_of_its_own(device):
    codec = Blockwise8(np.linspace(-1, 1, 256, dtype=np.float32))
    assert_same(codec, torch.from_numpy(make("normal", 10_000)).to(device))


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of a tensor that an op makes; views of `given` don't count."""

    def __init__(self, given):
        super().__init__()
        self.given, self.most = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.given:
                self.most = max(self.most, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scratch_memory_does_not_grow_with_the_tensor(name, strided, small_pieces):
    x = torch.from_numpy(make("normal", 64 * small_pieces))
    x = x.reshape(8, -1).T if strided else x
    room = np.empty(get_codec(name).encoded_nbytes(x.numel()), np.uint8)
    with Sizes(x) as sizes:
        made = encode_on_device(get_codec(name), x)
    assert made.size == room.size
    # Indices of a strided piece are int64, one per dimension; results on the CPU are seen too.
    table = 65536
    assert sizes.most <= max(2 * 8 * small_pieces, table, room.size)


@pytest.mark.parametrize("name", ["int8", "normfloat4_dq"])
def test_a_device_without_memory_leaves_it_to_the_cpu(name, device, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setitem(on_device._RUNS, name, full)
    assert_same(get_codec(name), torch.from_numpy(make("normal", 10_000)).to(device))


def test_other_codecs_and_dtypes_are_refused():
    for name in ("adaquant", "lossless", "exact_delta"):
        assert not can_encode_on_device(get_codec(name))
        with pytest.raises(CodecError, match=name):
            encode_on_device(get_codec(name), torch.zeros(5))
    for dtype in (torch.float64, torch.int8, torch.bool):
        with pytest.raises(CodecError, match="int8 can't encode"):
            encode_on_device(get_codec("int8"), torch.zeros(5, dtype=dtype))
    assert all(can_encode_on_device(get_codec(name)) for name in NAMES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_memory_does_not_grow_with_the_tensor(name):
    x = torch.randn(64 << 20, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encode_on_device(get_codec(name), x)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
