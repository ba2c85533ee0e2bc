"""exact_delta: every bit arrives, sizes, and what is found out: another base, damaged bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.runs import TILE
from nvflare_rdma.errors import CodecError

DTYPES = [np.float32, np.float16, np.uint16]
SPECIAL = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x7C00, 0x7F80, 0xFF80]


def encode(x, base=None):
    codec = get_codec("exact_delta")
    out = np.full(codec.encoded_nbytes(x.size) + 8, 0xAA, np.uint8)
    room = out[:-8]
    used = codec.encode_into(x, room) if base is None else codec.encode_against(x, base, room)
    assert (out[used:] == 0xAA).all()
    return codec, out[:used]


def assert_arrives(x, base=None):
    codec, encoded = encode(x, base)
    guarded = np.full(x.size + 64, 77, x.dtype)
    out = guarded[32 : 32 + x.size]
    if base is None:
        codec.decode_into(encoded, out)
    else:
        codec.decode_against(encoded, base, out)
    assert out.tobytes() == x.tobytes()
    assert (guarded[:32] == 77).all()
    assert (guarded[32 + x.size :] == 77).all()
    return encoded.size


def bits(seed, n, dtype):
    """Random bits with many of the patterns at which signs, exponents and words end."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, n * np.dtype(dtype).itemsize, np.uint8).view(np.uint16)
    special = rng.random(words.size) < 0.5
    words[special] = rng.choice(np.array(SPECIAL, np.uint16), int(special.sum()))
    return words.view(dtype)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    n=st.one_of(st.integers(0, 500), st.sampled_from([TILE - 1, TILE, TILE + 1])),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0, 0.002, 0.0099, 0.02, 0.5, 1]),
    has_base=st.booleans(),
)
def test_any_bits_arrive(seed, n, dtype, share, has_base):
    x, changed = bits(seed, n, dtype), np.random.default_rng(seed).random(n) < share
    base = x.copy()
    base[changed] = bits(seed + 1, n, dtype)[changed]
    assert_arrives(x, base if has_base else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5])
def test_random_bits_take_no_more_than_promised(dtype, n):
    rng = np.random.default_rng(n)
    x, base = (rng.integers(0, 256, n * np.dtype(dtype).itemsize, np.uint8).view(dtype) for _ in range(2))
    assert assert_arrives(x, base) <= 12 + x.nbytes + 24 * -(-n // TILE)


def steps(n=1 << 20, bfloat16=False):
    """Weights, and what a small step of training makes of them."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(n) * 0.02).astype(np.float32)
    y = (x + rng.standard_normal(n) * 1e-5).astype(np.float32)
    return [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (x, y)] if bfloat16 else [x, y]


def test_sizes_of_small_steps():
    x, y = steps()
    assert assert_arrives(y, x) < 0.54 * y.nbytes
    assert encode(y)[1].size > 0.80 * y.nbytes
    x, y = steps(bfloat16=True)
    assert assert_arrives(y, x) < 0.13 * y.nbytes
    x, y = steps()
    y = np.where(np.arange(y.size) % 128, x, y)  # less than 1 % has changed
    assert assert_arrives(y, x) < 0.03 * y.nbytes
    assert assert_arrives(x, x) == 12 + 4 * (x.size // TILE)


def test_strided_values_and_any_threads_of_one_base():
    x, y = steps(300 * 700)
    strided = np.repeat(y.reshape(700, 300), 2, axis=0)[::2].T
    flat = np.ascontiguousarray(strided).reshape(-1)
    codec, encoded = encode(strided, x)
    np.testing.assert_array_equal(encoded, encode(flat, x)[1])
    out = np.empty((700, 300), np.float32).T
    codec.decode_against(encoded, x, out)
    np.testing.assert_array_equal(out, strided)


def test_another_base_is_found_out():
    x, y = steps(5000)
    codec, encoded = encode(y, x)
    other = x.copy()
    other[77] = np.nextafter(other[77], 1)
    for wrong in (other, np.zeros_like(x)):
        with pytest.raises(CodecError, match="other values came out"):
            codec.decode_against(encoded, wrong, np.empty_like(y))
    with pytest.raises(CodecError, match="other values came out"):
        codec.decode_into(encoded, np.empty_like(y))


def test_bases_and_outputs_of_another_kind_are_refused():
    x, y = steps(100)
    codec, encoded = encode(y, x)
    room = np.empty(codec.encoded_nbytes(100), np.uint8)
    for base in (x[:99], x.astype(np.float16), x.view(np.uint32), np.repeat(x, 2)[::2], x.reshape(10, 10)):
        with pytest.raises(CodecError, match="the base of 100 values"):
            codec.encode_against(y, base, room)
        with pytest.raises(CodecError, match="the base of 100 values"):
            codec.decode_against(encoded, base, y.copy())
    with pytest.raises(CodecError, match="buffer of"):
        codec.encode_against(y, x, room[:-1])
    with pytest.raises(CodecError, match="read-only"):
        codec.encode_against(y, x, bytes(room))
    with pytest.raises(CodecError, match="the encoded type is float32"):
        codec.decode_against(encoded, x.astype(np.float16), np.empty(100, np.float16))


@pytest.mark.parametrize("share", [1, 128])
def test_damaged_bytes_are_refused_always(share):
    x, y = steps(5000)
    y = np.where(np.arange(y.size) % share, x, y)
    codec, encoded = encode(y, x)
    out = np.empty_like(y)
    for size in [*range(60), encoded.size // 2, encoded.size - 1]:
        with pytest.raises(CodecError, match="exact_delta"):
            codec.decode_against(encoded[: min(size, encoded.size - 1)], x, out)
    with pytest.raises(CodecError, match="left over"):
        codec.decode_against(np.append(encoded, np.uint8(0)), x, out)
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = encoded.copy()
        damaged[rng.integers(0, 60 if rng.random() < 0.5 else damaged.size, 3)] ^= rng.integers(1, 256, 3).astype("u1")
        with contextlib.suppress(CodecError):
            codec.decode_against(damaged, x, out)
            assert out.tobytes() == y.tobytes(), "the digest has not found it out"


def test_bombs_are_refused_before_anything_is_unpacked():
    import zstandard

    bomb = np.frombuffer(zstandard.ZstdCompressor().compress(bytes(1 << 30)), np.uint8)
    length = np.array([bomb.size], "<u4").view(np.uint8)
    dense = np.concatenate([np.zeros(12, np.uint8), np.full(4, 0xFF, np.uint8), np.zeros(1, np.uint8), length, bomb])
    few = dense.copy()
    few[12:16] = np.array([600], "<u4").view(np.uint8)
    codec, out = get_codec("exact_delta"), np.empty(TILE, np.float32)
    for encoded in (dense, few):
        with pytest.raises(CodecError, match="another size"):
            codec.decode_into(encoded, out)
    few[12:16] = np.array([TILE], "<u4").view(np.uint8)
    with pytest.raises(CodecError, match="said to be few"):
        codec.decode_into(few, out)


def test_changed_values_beyond_the_last_one_are_refused():
    x = np.zeros(1000, np.float32)
    y = x.copy()
    y[990:] = 1
    codec, encoded = encode(y, x)
    gaps = encoded[17:].view(np.uint8)
    found = np.flatnonzero(gaps == (990 & 0xFF))
    assert found.size
    damaged = encoded.copy()
    damaged[17 + found[0]] = 0xFF
    with pytest.raises(CodecError, match="exact_delta"):
        codec.decode_against(damaged, x, y)
