"""Kernels that know their block's length, and encoding in one pass, give the bits of the ways that know nothing."""

from __future__ import annotations

import numpy as np
import pytest

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.kernels import blockwise, fourbit
from nvflare_rdma.codecs.runs import TILE

LENGTHS = [1, 2, 63, 64, 65, 255, 256, 257, 319, 320, 1023, 1025, 70_001]


def values(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, n).astype(np.float32) * np.float32(0.02)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["float4", "normfloat4"])
def test_codes_are_those_of_a_search(name, n):
    codec, x = get_codec(name), values(n)
    encoded = np.empty(codec.encoded_nbytes(n), np.uint8)
    codec.encode_into(x, encoded)
    parts = codec.parts(encoded, n)
    ascending = np.argsort(codec.table, kind="stable")
    wanted = np.full(-(-n // 64) * 64, ascending[np.searchsorted(codec.middles, np.float32(0))])
    for start in range(0, n, 64):
        block = x[start : start + 64]
        absmax = np.abs(block).max()
        assert parts["scales"][start // 64] == absmax
        scaled = block * (np.float32(1) / absmax) if block.size == 64 else block / absmax
        wanted[start : start + block.size] = ascending[np.searchsorted(codec.middles, scaled, side="left")]
    pairs = (wanted[::2] << 4 | wanted[1::2])[: -(-n // 2)]
    np.testing.assert_array_equal(parts["codes"], pairs)


@pytest.mark.parametrize("where", [0, 255, 256, 300, 575])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found_in_every_group(bad, where):
    codec, x = get_codec("normfloat4"), values(576)
    x[where] = bad
    scales, codes = np.empty(9, np.float32), np.empty(288, np.uint8)
    assert not fourbit.encode(x, codec.middles, codec.orders, scales, codes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n", [1, 65, 257, 70_001, 64 * TILE + 64 * 300 + 5])
def test_scales_of_scales_do_not_depend_on_the_passes(n, dtype):
    """One pass where memory for the scales is at hand, two where it isn't."""
    codec, x = get_codec("normfloat4_dq"), np.resize(values(70_001), n).astype(dtype)
    encoded, again = (np.empty(codec.encoded_nbytes(n), np.uint8) for _ in range(2))
    codec.encode_into(x, encoded)
    absmax = np.empty(-(-n // 64), np.float32)
    fourbit.absmax(x.astype(np.float32), absmax)
    sums = [float(absmax[i : i + TILE // 64].sum(dtype=np.float64)) for i in range(0, absmax.size, TILE // 64)]
    codec._encode_with(x, codec.parts(again, n), np.float32(sum(sums) / absmax.size))
    np.testing.assert_array_equal(encoded, again)
    whole = np.empty(n, np.float32)
    codec.decode_into(encoded, whole)
    part = np.empty(min(n, 64 * 256), np.float32)  # of which the scales share a scale
    codec.decode_parts_into(codec._slice(codec.parts(encoded, n), 0, part.size), part)
    np.testing.assert_array_equal(whole[: part.size], part)


@pytest.mark.parametrize("n", LENGTHS)
def test_four_values_a_byte_decode_as_any_number_does(n):
    codec, x = get_codec("int2"), values(n)
    encoded = np.empty(codec.encoded_nbytes(n), np.uint8)
    codec.encode_into(x, encoded)
    parts = codec.parts(encoded, n)
    decoded, wanted = np.empty(n, np.float32), np.empty(n, np.float32)
    codec.decode_into(encoded, decoded)
    blockwise.decode_packed(parts["codes"], parts["scales"], 256, 4, codec.table, wanted)
    np.testing.assert_array_equal(decoded, wanted)
    added, exact = x.copy(), x.astype(np.float64) + np.float64(np.float32(0.3)) * wanted
    codec.add_into(encoded, 0.3, added)
    np.testing.assert_array_equal(added, exact.astype(np.float32))
