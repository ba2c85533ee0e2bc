"""normfloat4_e4m3: its levels and scales, and how much less it loses than normfloat4."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.tables import float8_e4m3, normal_float4


def encode(name, x):
    codec = get_codec(name)
    encoded = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    codec.encode_into(x, encoded)
    out = np.empty(x.size, np.float32)
    codec.decode_into(encoded, out)
    return codec.parts(encoded, x.size), out


def squared_error(name, x):
    lost = x - encode(name, x)[1]
    return float((lost.astype(float) @ lost) / (x.astype(float) @ x))


def test_a_value_takes_four_and_a_quarter_bits():
    codec = get_codec("normfloat4_e4m3")
    assert codec.encoded_nbytes(32 * 1000) == 4 + 32 * 1000 * 4.25 / 8


def test_it_loses_less_than_normfloat4_in_fewer_bits():
    rng = np.random.default_rng(0)
    for values, most, of_normfloat4 in (
        (rng.standard_normal(1 << 20), 0.00776, 0.00840),
        (rng.standard_t(4, 1 << 20), 0.00960, 0.01200),
    ):
        x = values.astype(np.float32)
        assert squared_error("normfloat4_e4m3", x) < most < of_normfloat4 < squared_error("normfloat4", x)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 5000])
def test_scales_and_levels_are_as_documented(n):
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * np.repeat(10.0 ** rng.uniform(-2, 2, -(-n // 32)), 32)[:n]).astype(np.float32)
    parts, out = encode("normfloat4_e4m3", x)
    shared = np.abs(x).max() / np.float32(448)
    assert parts["scale"].tolist() == [shared]
    numbers, levels = float8_e4m3()[:127], normal_float4()
    largest = np.array([np.abs(x[i : i + 32]).max() for i in range(0, n, 32)], np.float32)
    nearest = np.abs(numbers[:, np.newaxis] - largest / shared).min(0)
    found = numbers[parts["scales"]]
    np.testing.assert_allclose(np.abs(found - largest / shared), nearest, atol=1e-4)
    codes = np.stack([parts["codes"] >> 4, parts["codes"] & 15], axis=1).reshape(-1)[:n]
    scales = np.repeat(found * shared, 32)[:n]
    np.testing.assert_array_equal(out, levels[codes] * scales)
    off = np.abs(levels[:, np.newaxis] * scales - x).min(0)
    np.testing.assert_allclose(np.abs(out - x), off, rtol=1e-5, atol=1e-6 * np.abs(x).max())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 600), wide=st.booleans())
def test_no_value_is_off_by_more_than_itself(seed, n, wide):
    """So that error feedback converges: what is lost is never more than what was there."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 10.0 ** (rng.uniform(-8, 8, n) * wide)).astype(np.float32)
    _, out = encode("normfloat4_e4m3", x)
    assert (np.abs(out - x) <= np.abs(x) * np.float32(1 + 1e-6)).all()
    assert np.linalg.norm(out - x) < np.linalg.norm(x)


def test_small_blocks_and_small_values_become_zeros():
    x = np.full(96, 1e-7, np.float32)
    x[40] = 1
    parts, out = encode("normfloat4_e4m3", x)
    assert parts["scales"].tolist() == [0, 0x7E, 0]
    assert out[40] == 1
    assert not np.delete(out, 40).any()
    for tiny in (0, 1e-45, 1e-38, 7e-31):
        assert not encode("normfloat4_e4m3", np.full(100, -tiny, np.float32))[1].any()
    assert (encode("normfloat4_e4m3", np.full(100, 9e-31, np.float32))[1] > 8.9e-31).all()


def test_scales_that_no_encoder_makes_decode_to_zeros():
    codec, x = get_codec("normfloat4_e4m3"), np.ones(32, np.float32)
    encoded = np.empty(codec.encoded_nbytes(32), np.uint8)
    codec.encode_into(x, encoded)
    for code in range(127, 256):
        encoded[4] = code
        codec.decode_into(encoded, x)
        assert (x == 0).all()
