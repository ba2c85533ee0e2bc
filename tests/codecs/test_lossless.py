"""lossless: every bit arrives, sizes, and damaged bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.runs import TILE
from nvflare_rdma.errors import CodecError

DTYPES = [np.float32, np.float16, np.uint16]


def encode(x):
    codec = get_codec("lossless")
    out = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    return codec, out[: codec.encode_into(x, out)]


def assert_arrives(x):
    codec, encoded = encode(x)
    out = np.empty_like(x)
    codec.decode_into(encoded, out)
    np.testing.assert_array_equal(out.view(np.uint8), x.view(np.uint8))
    return encoded.size


@settings(deadline=None, max_examples=100)
@given(
    x=st.sampled_from([np.uint32, np.uint16]).flatmap(lambda t: hnp.arrays(t, st.integers(0, 200))), half=st.booleans()
)
def test_any_bits_arrive(x, half):
    assert_arrives(x.view(np.float32) if x.dtype == np.uint32 else x.view(np.float16) if half else x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5])
def test_random_bits_take_no_more_than_promised(dtype, n):
    x = np.random.default_rng(n).integers(0, 256, n * np.dtype(dtype).itemsize, np.uint8).view(dtype)
    assert assert_arrives(x) <= 4 + x.nbytes + 4 * x.itemsize * -(-n // TILE)


def test_sizes_of_weights():
    x = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(np.float32)
    bfloat16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    widened = (bfloat16.astype(np.uint32) << 16).view(np.float32)
    assert assert_arrives(x) < 0.86 * x.nbytes
    assert assert_arrives(bfloat16) < 0.70 * bfloat16.nbytes
    assert assert_arrives(widened) < 0.37 * widened.nbytes
    assert assert_arrives(np.zeros(1 << 20, np.float32)) < 2000


def test_values_decode_to_their_own_type_only():
    for dtype in DTYPES:
        codec, encoded = encode(np.ones(10, dtype))
        for other in DTYPES:
            if other != dtype:
                with pytest.raises(CodecError, match="lossless"):
                    codec.decode_into(encoded, np.empty(10, other))


def test_damaged_bytes_are_refused_or_decode_to_something():
    import zstandard

    x = (np.random.default_rng(0).standard_normal(5000) * 0.02).astype(np.float32)
    codec, encoded = encode(x)
    out = np.empty_like(x)
    for size in [*range(40), encoded.size // 2, encoded.size - 1]:
        with pytest.raises(CodecError, match="lossless"):
            codec.decode_into(encoded[:size], out)
    with pytest.raises(CodecError, match="left over"):
        codec.decode_into(np.append(encoded, np.uint8(0)), out)
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = encoded.copy()
        damaged[rng.integers(0, 60 if rng.random() < 0.5 else damaged.size, 3)] = rng.integers(0, 256, 3)
        with contextlib.suppress(CodecError):
            codec.decode_into(damaged, out)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    damaged = np.concatenate([encoded[:4], np.array([len(bomb)], "<u4").view(np.uint8), np.frombuffer(bomb, np.uint8)])
    out = np.empty(TILE, np.float32)
    with pytest.raises(CodecError, match="another size"):
        codec.decode_into(damaged, out)
