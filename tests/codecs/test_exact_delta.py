"""exact_delta: every bit arrives, sizes, and what is found out: another base, damaged bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.kernels import difference_groups
from nvflare_rdma.codecs.kernels.difference_groups import MOST
from nvflare_rdma.codecs.kernels.difference_runs import ALL, GAPS, PLACES, SAME
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


def most(x):
    """Bytes that values may take: their own, the header, and what each run, or each of its groups, has besides."""
    runs = -(-x.size // TILE)
    return 12 + x.nbytes + runs * (24 if x.itemsize == 4 else 25 if x.size < 1024 else 25 * MOST)


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
    taken = assert_arrives(x, base)
    assert taken <= 12 + x.nbytes + 25 * -(-n // TILE), "there is nothing to gain by groups"


def steps(n=1 << 20, bfloat16=False):
    """Weights, and what a small step of training makes of them."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(n) * 0.02).astype(np.float32)
    y = (x + rng.standard_normal(n) * 1e-5).astype(np.float32)
    return [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (x, y)] if bfloat16 else [x, y]


def test_sizes_of_small_steps():
    x, y = steps()
    assert assert_arrives(y, x) < 0.52 * y.nbytes
    assert encode(y)[1].size > 0.80 * y.nbytes
    x, y = steps(bfloat16=True)
    assert assert_arrives(y, x) < 0.085 * y.nbytes
    x, y = steps()
    y = np.where(np.arange(y.size) % 128, x, y)  # less than 1 % has changed
    assert assert_arrives(y, x) < 0.03 * y.nbytes
    assert assert_arrives(x, x) == 12 + x.size // TILE


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


def test_what_is_too_much_is_refused_before_it_is_read():
    """No number in the bytes is believed: not of values, of bits, of those that have more, nor of a stream's bytes."""
    codec, out, header = get_codec("exact_delta"), np.empty(TILE, np.float32), np.zeros(12, np.uint8)
    for run in (
        [GAPS, *number(TILE), 0, 0, 1, 0, 1, 0, 1],
        [GAPS, *number(TILE // 20 + 1), 0, 0, 1, 0, 1, 0, 1],
        [GAPS, *number(0), 0, 0, 1, 0, 1],
        [PLACES, *number(TILE + 1), 0, 0, 255, 0, 1, *number(0)],
        [PLACES, *number(0xFFFFFFFF), 0, 0, 255, 0, 1, *number(0)],
        [PLACES, *number(TILE - 1), 0, 0, 255, 0, 1, *number(0)],
        [ALL, 28, 0, 1],
        [ALL, 6, 0, 1, *number(0)],
        [ALL, 0, 0, 255, *number(TILE), 0, 1, 0, 1, 0, 1, 0, 1],
        [ALL, 0, 0, 255, *number(0)],
        [ALL, 0, 0, 1, *number(1), 0, 1, 0, 1, 0, 1, 0, 1],
        [ALL, 0, 1, 1, 2, 3],
        [ALL, 0, 2, 1, 0x11, *[0xFF] * 8, *[0] * 99],
        [ALL, 0, 2, 255, *[0x11] * 128, *[1, 0] * 4, *[0] * 99],
        [ALL, 0, 2, 1, 0xFF, *[1, 0] * 4, *[0] * 99],
        [ALL, 0, 7, 1],
        [9, 0, 0, 1],
    ):
        encoded = np.concatenate([header, np.array(run, np.uint8)])
        with pytest.raises(CodecError, match="end too early, or are damaged"):
            codec.decode_into(encoded, out)


def number(n):
    return np.array([n], "<u4").view(np.uint8).tolist()


def test_changed_values_beyond_the_last_one_are_refused():
    x = np.zeros(1000, np.float32)
    y = x.copy()
    y[995:] = 1
    codec, encoded = encode(y, x)
    assert encoded[12] == GAPS
    gaps = np.flatnonzero(encoded == (995 & 0xFF))
    damaged = encoded.copy()
    damaged[gaps[0]] += 1
    with pytest.raises(CodecError, match="end too early, or are damaged"):
        codec.decode_against(damaged, x, y)


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    n=st.one_of(st.integers(1, 300), st.integers(2000, 9000), st.sampled_from([TILE - 1, TILE])),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0, 0.005, 0.03, 0.3, 0.54, 0.6, 1]),
    size=st.integers(0, 31),
    tail=st.sampled_from([0, 0.001, 0.02, 0.2]),
    pattern=st.sampled_from([0, 3, 8, 13, 16]),
)
def test_differences_of_each_form_and_size_arrive(seed, n, dtype, share, size, tail, pattern):
    """Differences of about `size` bits, some far larger, some multiples of a power of two, and some zeros."""
    rng, bits = np.random.default_rng(seed), 8 * np.dtype(dtype).itemsize
    word = np.dtype(f"u{bits // 8}")
    steps = (rng.standard_normal(n) * 2.0 ** min(size, bits - 2)).astype(np.int64)
    steps = np.where(rng.random(n) < tail, rng.integers(-(2**31), 2**31, n), steps) >> pattern << pattern
    base = bits_of_weights(rng, n, dtype)
    y = (base.view(word) + np.where(rng.random(n) < share, steps, 0).astype(word)).view(dtype)
    assert assert_arrives(y, base) <= most(y)


def bits_of_weights(rng, n, dtype):
    x = (rng.standard_normal(n) * 0.02).astype(np.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else x.astype(dtype)


def tuned(seed, n, dtype, rate):
    """Weights in two bytes, and what training makes of them that moves each by about `rate`, whatever it is."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 0.02).astype(np.float32)
    y = (x + rng.standard_normal(n) * rate).astype(np.float32)
    if dtype == np.float16:
        return x.astype(dtype), y.astype(dtype)
    return [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (x, y)]


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
@pytest.mark.parametrize("rate", [1e-6, 2e-4])
@pytest.mark.parametrize("n", [1024, 20000, TILE, 3 * TILE + 700])
def test_differences_are_grouped_by_how_large_the_base_is(n, rate, dtype):
    x, y = tuned(n, n, dtype, rate)
    _, encoded = encode(y, x)
    taken = assert_arrives(y, x)
    if n >= 20000 and rate == 2e-4:
        assert encoded[12] > 1
        mixed = np.random.default_rng(0).permutation(n)  # in another order, no base is known for any
        shuffled = (x.view(np.uint16)[mixed] + (y.view(np.uint16) - x.view(np.uint16))).view(dtype)
        assert taken < 0.95 * assert_arrives(shuffled, x[mixed])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    n=st.one_of(st.integers(1020, 9000), st.sampled_from([TILE - 1, TILE, TILE + 1030])),
    dtype=st.sampled_from([np.float16, np.uint16]),
    rate=st.sampled_from([1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0]),
    special=st.sampled_from([0, 0.001, 0.3]),
)
def test_grouped_differences_arrive(seed, n, dtype, rate, special):
    rng, (x, y) = np.random.default_rng(seed), tuned(seed, n, dtype, rate)
    for values in (x, y):
        chosen = rng.random(n) < special
        values.view(np.uint16)[chosen] = rng.choice(np.array(SPECIAL, np.uint16), int(chosen.sum()))
    assert assert_arrives(y, x) <= most(y)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_damaged_groups_are_refused_always(dtype):
    x, y = tuned(0, 20000, dtype, 2e-4)
    codec, encoded = encode(y, x)
    out, groups = np.empty_like(y), int(encoded[12])
    assert groups > 4
    for place, value in [(12, 0), (12, MOST + 1), (12, 255), (13, 255), (14, encoded[13] - 1), (13, encoded[14] + 1)]:
        damaged = encoded.copy()
        damaged[place] = value
        with pytest.raises(CodecError, match="damaged"):
            codec.decode_against(damaged, x, out)
    for size in range(12, 13 + groups):
        with pytest.raises(CodecError, match="exact_delta"):
            codec.decode_against(encoded[:size], x, out)
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = encoded.copy()
        damaged[rng.integers(12, 20 + groups if rng.random() < 0.5 else damaged.size, 3)] ^= rng.integers(
            1, 256, 3
        ).astype("u1")
        with contextlib.suppress(CodecError):
            codec.decode_against(damaged, x, out)
            assert out.tobytes() == y.tobytes(), "the digest has not found it out"


@pytest.mark.parametrize(
    ("share", "form"), [(0, SAME), (0.002, GAPS), (0.045, GAPS), (0.06, PLACES), (0.5, PLACES), (0.6, ALL)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype, share, form):
    rng = np.random.default_rng(0)
    base = bits_of_weights(rng, TILE, dtype)
    steps = np.zeros(TILE, np.uint16)
    steps[: int(share * TILE)] = rng.integers(1, 5, int(share * TILE))
    y = base.copy()
    y.view(f"u{y.itemsize}")[:] += rng.permutation(steps)
    _, encoded = encode(y, base)
    assert encoded[12:].tolist()[: 3 - y.itemsize // 2] == ([form] if dtype == np.float32 else [1, form])
    assert_arrives(y, base)
    entropy = 0 if not share else -share * np.log2(share / 8) - (1 - share) * np.log2(1 - share)
    assert encoded.size <= 12 + 300 + 1.1 * entropy * TILE / 8


def test_values_of_a_smaller_type_take_no_more_than_in_it():
    """Low bits that have a pattern are not written as they are."""
    x = steps(1 << 18)[0]
    bfloat16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    widened = (bfloat16.astype(np.uint32) << 16).view(np.float32)
    taken, own = assert_arrives(widened), assert_arrives(bfloat16)
    assert taken < own + 2 * 1.01 * x.size / 8  # a sign for each of the two bytes below
    halves = x.astype(np.float16).astype(np.float32)
    assert assert_arrives(halves) < 0.57 * halves.nbytes


def test_a_change_of_rows_takes_what_the_rows_take():
    rng = np.random.default_rng(0)
    x = steps(1 << 18)[0].reshape(-1, 256)
    y = x.copy()
    y[::8] += rng.standard_normal(y[::8].shape).astype(np.float32) * np.float32(1e-5)
    assert assert_arrives(y.reshape(-1), x.reshape(-1)) < 0.54 * y.nbytes / 8 + y.size / 8 / 7


def test_a_base_that_is_changed_meanwhile_leads_nowhere(monkeypatch):
    """Where a difference goes is read of the base twice, without bounds checks."""
    x, y = tuned(0, 20000, np.uint16, 2e-4)
    codec, encoded = encode(y, x)
    seen = []

    def noting(kernel, base_at):
        def call(*arguments):
            seen.append(np.shares_memory(arguments[base_at], x))
            return kernel(*arguments)

        return call

    monkeypatch.setattr(difference_groups, "write_groups", noting(difference_groups.write_groups, 1))
    monkeypatch.setattr(difference_groups, "read_groups", noting(difference_groups.read_groups, 2))
    assert encode(y, x)[1].tobytes() == encoded.tobytes()
    codec.decode_against(encoded, x, np.empty_like(y))
    assert seen == [False, False]
