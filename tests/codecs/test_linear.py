"""int8, float8_e4m3, int2 and ternary: their levels, and what error feedback needs of the last two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import get_codec

SETTINGS = settings(deadline=None, max_examples=60)


def encode(name, x):
    codec = get_codec(name)
    encoded = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    codec.encode_into(x, encoded)
    out = np.empty(x.size, np.float32)
    codec.decode_into(encoded, out)
    return codec.parts(encoded, x.size), out


def values(seed, n=5000):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 10.0 ** rng.uniform(-3, 3, n)).astype(np.float32)


def per_value(scales, n, block):
    return np.repeat(scales, block)[:n]


@pytest.mark.parametrize("n", [1, 2047, 2048, 2049, 50_000])
def test_int8_rounds_to_the_nearest_step(n):
    x = values(n, n)
    parts, out = encode("int8", x)
    scales = per_value(parts["scales"], n, 2048)
    largest = np.array([np.abs(x[i : i + 2048]).max() for i in range(0, n, 2048)], np.float32)
    np.testing.assert_array_equal(parts["scales"], largest / np.float32(127))
    np.testing.assert_array_equal(parts["codes"], np.rint(x * per_value(np.float32(127) / largest, n, 2048)))
    np.testing.assert_array_equal(out, parts["codes"] * scales)
    assert np.abs(parts["codes"].astype(int)).max() == 127


@pytest.mark.parametrize("n", [1, 127, 128, 129, 50_000])
def test_float8_codes_are_those_of_torch(n):
    torch = pytest.importorskip("torch")
    x = values(n, n)
    parts, out = encode("float8_e4m3", x)
    largest = np.array([np.abs(x[i : i + 128]).max() for i in range(0, n, 128)], np.float32)
    np.testing.assert_array_equal(parts["scales"], largest / np.float32(448))
    scaled = torch.from_numpy(x * per_value(np.float32(448) / largest, n, 128))
    wanted = scaled.to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(parts["codes"], wanted.view(torch.uint8).numpy())
    np.testing.assert_array_equal(out, wanted.float().numpy() * per_value(parts["scales"], n, 128))


def test_every_number_and_every_midpoint_of_float8_is_rounded_as_torch_does():
    torch = pytest.importorskip("torch")
    table = get_codec("float8_e4m3").table
    wanted_table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(table, wanted_table)
    finite = np.sort(table[np.isfinite(table)])
    middles = (finite[1:] + finite[:-1]) / np.float32(2)
    near = np.concatenate([finite, middles, np.nextafter(middles, -500), np.nextafter(middles, 500)])
    blocks = np.full((-(-near.size // 127), 128), 448, np.float32)  # so that every scale is 1
    blocks[:, 1:] = np.resize(near, (blocks.shape[0], 127))
    parts, _ = encode("float8_e4m3", blocks)
    wanted = torch.from_numpy(blocks).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(parts["codes"], wanted.reshape(-1))


@pytest.mark.parametrize(("name", "per_byte", "digits"), [("int2", 4, 4), ("ternary", 5, 3)])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_few_levels_are_packed_as_documented(name, per_byte, digits, n):
    x = values(n, n)
    parts, out = encode(name, x)
    code = np.empty(n, int)
    for start in range(0, n, 256):
        size = min(256, n - start)
        packed = parts["codes"][start // 256 * -(-256 // per_byte) :][: -(-size // per_byte)].astype(int)
        code[start : start + size] = (packed[:, np.newaxis] // digits ** np.arange(per_byte) % digits).reshape(-1)[
            :size
        ]
    level = 2 * code - 3 if name == "int2" else code - 1
    np.testing.assert_array_equal(out, level.astype(np.float32) * per_value(parts["scales"], n, 256))
    assert (level * np.sign(x) >= 0).all()
    for start in range(0, n, 256):
        block, chosen = x[start : start + 256].astype(float), level[start : start + 256]
        best = (block @ chosen) / (chosen @ chosen)
        if name == "int2" and (np.abs(chosen) == 3).any():
            best = min(best, np.abs(block).max() / 3)
        np.testing.assert_allclose(parts["scales"][start // 256], best, rtol=1e-3)


@pytest.mark.parametrize("name", ["int2", "ternary"])
@SETTINGS
@given(seed=st.integers(0, 2**32), n=st.integers(1, 600), sparse=st.sampled_from([1, 0.5, 0.02]), wide=st.booleans())
def test_what_is_lost_is_smaller_than_what_was_there(name, seed, n, sparse, wide):
    """The contraction that error feedback needs, block by block, however uneven the block is."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * (rng.random(n) < sparse) * 10.0 ** (rng.uniform(-8, 8, n) * wide)
    x = x.astype(np.float32)
    _, out = encode(name, x)
    for start in range(0, n, 256):
        block, lost = (a[start : start + 256].astype(float) for a in (x, x - out))
        assert (lost @ lost) < (block @ block) or not block.any()
        assert not lost.any() or block.any()


@pytest.mark.parametrize("name", ["int2", "ternary"])
def test_error_feedback_brings_the_mean_through(name):
    """With what was lost added to the next message, the messages' mean goes to the value's, at 1 / rounds."""
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    rest, total, off = np.zeros_like(x), np.zeros_like(x), {}
    for rounds in range(1, 401):
        _, out = encode(name, x + rest)
        rest += x - out
        total += out
        if rounds in (1, 100, 400):
            off[rounds] = np.linalg.norm(total / rounds - x) / np.linalg.norm(x)
    assert off[1] > 0.2
    assert off[100] < 0.15
    assert off[400] < off[100] / 2


@pytest.mark.parametrize("name", ["int8", "float8_e4m3", "int2", "ternary"])
def test_blocks_of_almost_nothing_become_zeros(name):
    for tiny in (0, 1e-45, 1e-38, 7e-31):
        x = np.full(2400, tiny, np.float32)
        x[::2] *= -1
        x[2080:] = 1
        parts, out = encode(name, x)
        assert parts["scales"][0] == 0
        assert not out[:128].any()
        assert out[2300] != 0
    x = np.full(300, 9e-31, np.float32)
    np.testing.assert_allclose(encode(name, x)[1], x, rtol=1e-3)


@pytest.mark.parametrize("name", ["int8", "float8_e4m3", "int2", "ternary"])
def test_the_largest_floats_do_not_overflow(name):
    x = np.full(1000, np.finfo(np.float32).max)
    x[::3] *= -1
    _, out = encode(name, x)
    np.testing.assert_allclose(out, x, rtol=1e-4)
    x[::4] /= 2
    x[1::4] /= 3
    _, out = encode(name, x)
    assert np.isfinite(out).all()
