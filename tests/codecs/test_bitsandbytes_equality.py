"""blockwise8 and the 4-bit types against bitsandbytes on a CPU: equal bit for bit, but for a decoded zero's sign."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.runs import TILE
from tests.support import bitsandbytes_here

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(20)


def _mixed_magnitudes(n):
    return RNG.standard_normal(n) * 10.0 ** RNG.integers(-40, 38, n)


CASES = {
    "normal": RNG.standard_normal(3 * TILE),
    "partial last block": RNG.standard_normal(2 * TILE + 4096 + 77),
    "odd length": RNG.standard_normal(65),
    "one value": np.array([-0.37]),
    "one zero": np.array([0.0]),
    "constant": np.full(10_000, 3.0),
    "negative constant": np.full(10_000, -3.0),
    "zero": np.zeros(10_001),
    "negative zero": np.full(5000, -0.0),
    "denormal": RNG.standard_normal(9001) * 1e-41,
    "denormal constant": np.full(5000, 1e-40),
    "smallest denormal": RNG.integers(-1, 2, 9001) * 2.0**-149,
    "edge of normal": RNG.standard_normal(9001) * 3e-39,
    "huge": np.clip(RNG.standard_normal(9001) * 1e38, -3.4e38, 3.4e38),
    "outliers": RNG.standard_normal(20_001) * np.where(RNG.random(20_001) < 0.01, 1e4, 1),
    "mixed magnitudes": np.clip(_mixed_magnitudes(50_001), -3.4e38, 3.4e38),
    "sparse": RNG.standard_normal(20_001) * (RNG.random(20_001) < 0.05),
    "zero blocks between": np.repeat(RNG.standard_normal(10) * (np.arange(10) % 2), 4096),
    "even steps": np.linspace(-1, 1, 400_001),
}


FOUR_BIT = [("float4", "fp4"), ("normfloat4", "nf4")]


@pytest.fixture(scope="module")
def bnb():
    return bitsandbytes_here.functional()


def encode(name, x):
    """Everything that `x` is encoded to, and its parts."""
    codec = get_codec(name)
    encoded = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    codec.encode_into(x, encoded)
    return codec, encoded, codec.parts(encoded, x.size)


def assert_same_bits(got, wanted):
    np.testing.assert_array_equal(got.view(np.uint8), np.ascontiguousarray(wanted).reshape(-1).view(np.uint8))


def assert_decodes_like(codec, encoded, wanted):
    """The same bits, where a zero has no sign: fp4 has two codes for it, and whether bitsandbytes decodes the second
    code to +0.0 or -0.0 depends on the instructions that the processor has."""
    out = np.empty(wanted.numel(), np.float32)
    codec.decode_into(encoded, out)
    # The sum of -0.0 and +0.0 is +0.0; all other values stay what they are.
    assert_same_bits(out + np.float32(0), wanted.numpy() + np.float32(0))


@pytest.mark.parametrize("case", CASES)
def test_blockwise8_equals_bitsandbytes(case, bnb):
    x = CASES[case].astype(np.float32)
    wanted, state = bnb.quantize_blockwise(torch.from_numpy(x.copy()), blocksize=4096)
    codec, encoded, parts = encode("blockwise8", x)
    assert_same_bits(parts["scales"], state.absmax.numpy())
    assert_same_bits(parts["codes"], wanted.numpy())
    assert_decodes_like(codec, encoded, bnb.dequantize_blockwise(wanted, state))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "quant_type"), FOUR_BIT)
def test_4_bit_types_equal_bitsandbytes(name, quant_type, case, bnb):
    x = CASES[case].astype(np.float32)
    wanted, state = bnb.quantize_4bit(torch.from_numpy(x.copy()), quant_type=quant_type, blocksize=64)
    codec, encoded, parts = encode(name, x)
    assert_same_bits(parts["scales"], state.absmax.numpy())
    assert_same_bits(parts["codes"], wanted.numpy())
    if x.size % 2 == 0:  # for odd lengths bitsandbytes compiles code with a C++ compiler, which may be missing
        assert_decodes_like(codec, encoded, bnb.dequantize_4bit(wanted, state))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "quant_type"), FOUR_BIT)
def test_double_quantized_types_equal_bitsandbytes_given_its_mean(name, quant_type, case, bnb):
    x = CASES[case].astype(np.float32)
    wanted, state = bnb.quantize_4bit(
        torch.from_numpy(x.copy()), quant_type=quant_type, blocksize=64, compress_statistics=True
    )
    codec, encoded, parts = encode(f"{name}_dq", x)
    mean = np.float32(state.offset.item())
    if np.isinf(mean):  # torch's sum in float32 has overflowed: bitsandbytes makes NaN of all values
        assert np.isfinite(parts["offset"][0])
        return
    # torch adds float32 in an order that depends on the processor and the number of threads, and each sum may round by
    # half a unit in the last place. Ours is exact.
    absmax = encode(name, x)[2]["scales"]
    assert parts["offset"][0] == np.float32(math.fsum(absmax) / absmax.size)
    assert abs(parts["offset"][0] - mean) <= np.spacing(mean) * absmax.size
    codec._encode_with(x, parts, mean)
    assert_same_bits(parts["codes"], wanted.numpy())
    assert_same_bits(parts["scales"], state.absmax.numpy())
    assert_same_bits(parts["nested_scales"], state.state2.absmax.numpy())
    if x.size % 2 == 0:
        assert_decodes_like(codec, encoded, bnb.dequantize_4bit(wanted, state))


@pytest.mark.parametrize(("name", "quant_type"), FOUR_BIT)
def test_values_at_every_threshold_of_the_4_bit_types(name, quant_type, bnb):
    table = np.sort(get_codec(name).table)
    middles = (table[:-1] + table[1:]) / np.float32(2)
    near = np.concatenate([np.nextafter(middles, -2), middles, np.nextafter(middles, 2), table])
    blocks = np.zeros((4, 64), np.float32)
    blocks[:, : near.size] = near
    blocks *= np.array([[1], [0.3], [7], [1e-20]], np.float32)
    wanted, _ = bnb.quantize_4bit(torch.from_numpy(blocks), quant_type=quant_type, blocksize=64)
    assert_same_bits(encode(name, blocks)[2]["codes"], wanted.numpy())


def test_tables_equal_those_of_bitsandbytes(bnb):
    # Without fused multiply-add torch gives bitsandbytes other last bits.
    np.testing.assert_array_max_ulp(get_codec("blockwise8").table, bnb.create_dynamic_map().numpy(), 2)
    for name, quant_type in FOUR_BIT:
        assert_same_bits(get_codec(name).table, bnb.get_4bit_type(quant_type, device="cpu").numpy())
