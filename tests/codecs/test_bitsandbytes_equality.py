"""blockwise8 and normfloat4 against bitsandbytes on a CPU: equal bit for bit."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

from nvflare_rdma.codecs import get_codec  # noqa: E402
from nvflare_rdma.codecs.base import TILE  # noqa: E402

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


@pytest.mark.parametrize("case", CASES)
def test_blockwise8_equals_bitsandbytes(case):
    x = CASES[case].astype(np.float32)
    wanted, state = bnb.quantize_blockwise(torch.from_numpy(x.copy()), blocksize=4096)
    codec = get_codec("blockwise8")
    encoded = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    codec.encode_into(x, encoded)
    codes, scales = (codec.parts(encoded, x.size)[part] for part in ("codes", "scales"))
    np.testing.assert_array_equal(scales, state.absmax.numpy())
    np.testing.assert_array_equal(codes, wanted.numpy())
    out = np.empty_like(x)
    codec.decode_into(encoded, out)
    np.testing.assert_array_equal(out, bnb.dequantize_blockwise(wanted, state).numpy())


@pytest.mark.parametrize("case", CASES)
def test_normfloat4_equals_bitsandbytes(case):
    x = CASES[case].astype(np.float32)
    wanted, state = bnb.quantize_4bit(
        torch.from_numpy(x.copy()), quant_type="nf4", blocksize=64, compress_statistics=False
    )
    codec = get_codec("normfloat4")
    encoded = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    codec.encode_into(x, encoded)
    codes, scales = (codec.parts(encoded, x.size)[part] for part in ("codes", "scales"))
    np.testing.assert_array_equal(scales, state.absmax.numpy())
    np.testing.assert_array_equal(codes, wanted.numpy()[:, 0])
    out = np.empty_like(x)
    codec.decode_into(encoded, out)
    if x.size % 2 == 0:  # for odd lengths bitsandbytes compiles code with a C++ compiler, which may be missing
        np.testing.assert_array_equal(out, bnb.dequantize_4bit(wanted, state).numpy().reshape(-1))


def test_values_at_every_threshold_of_normfloat4():
    table = get_codec("normfloat4").table
    middles = (table[:-1] + table[1:]) / np.float32(2)
    near = np.concatenate([np.nextafter(middles, -2), middles, np.nextafter(middles, 2), table])
    blocks = np.zeros((4, 64), np.float32)
    blocks[:, : near.size] = near
    blocks *= np.array([[1], [0.3], [7], [1e-20]], np.float32)
    wanted, _ = bnb.quantize_4bit(torch.from_numpy(blocks), quant_type="nf4", blocksize=64, compress_statistics=False)
    codec, encoded = get_codec("normfloat4"), np.empty(128 + 16, np.uint8)
    codec.encode_into(blocks, encoded)
    np.testing.assert_array_equal(codec.parts(encoded, 256)["codes"], wanted.numpy()[:, 0])


def test_tables_equal_those_of_bitsandbytes():
    np.testing.assert_array_equal(get_codec("blockwise8").table, bnb.create_dynamic_map().numpy())
    np.testing.assert_array_equal(get_codec("normfloat4").table, bnb.get_4bit_type("nf4", device="cpu").numpy())
