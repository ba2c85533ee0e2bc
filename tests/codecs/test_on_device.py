"""Encoding with torch ops against the numba kernels, bit for bit: on CPU tensors here, on CUDA's where there are any."""

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

NAMES = [name for name in CODEC_NAMES if name not in ("adaquant", "lossless")]
SETTINGS = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
LARGEST = float(np.finfo(np.float32).max)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))]


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
    if isinstance(wanted, str) or isinstance(got, str):
        assert got == wanted
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
    "normal", "even", "constant", "zero", "sparse", "outliers", "wide", "blocks of any size", "denormal", "the smallest",
    "about 1e-38", "about 2**-100", "huge", "the largest", "bits",
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


