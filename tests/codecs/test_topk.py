"""topk2: what is chosen, how it is packed, and what error feedback needs of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import get_codec

NAMES = {"topk2": 64, "topk2_128": 128}
CHUNK = 4096


def encode(name, x):
    codec = get_codec(name)
    encoded = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    codec.encode_into(x, encoded)
    out = np.empty(x.size, np.float32)
    codec.decode_into(encoded, out)
    return codec.parts(encoded, x.size), out


def read(parts, chunk, most, n):
    """The places and codes of a chunk of `n` values, read as the docs say they are packed."""
    count = -(-n * most // CHUNK)
    packed = parts["places"][chunk * most * 3 // 2 :][: -(-count * 3 // 2)].astype(int)
    whole = np.append(packed, [0, 0, 0])
    places = [
        whole[k // 2 * 3] | (whole[k // 2 * 3 + 1] & 15) << 8
        if k % 2 == 0
        else whole[k // 2 * 3 + 1] >> 4 | whole[k // 2 * 3 + 2] << 4
        for k in range(count)
    ]
    signs = parts["signs"][chunk * most // 4 :].astype(int)
    return places, [signs[k // 4] >> 2 * (k % 4) & 3 for k in range(count)]


@pytest.mark.parametrize(("name", "nbytes"), [("topk2", 118), ("topk2_128", 230)])
def test_sizes_are_fixed(name, nbytes):
    codec = get_codec(name)
    assert codec.encoded_nbytes(CHUNK) == nbytes
    assert codec.encoded_nbytes(1000 * CHUNK) == 1000 * nbytes
    assert [codec.encoded_nbytes(n) for n in (0, 1, 64)] == [0, 9, 10 if name == "topk2_128" else 9]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["normal", "one exponent", "few different", "denormal", "wide"])
@pytest.mark.parametrize("n", [1, 63, 65, 4095, 4096, 4097, 10_000])
def test_the_largest_are_chosen_whatever_the_values_are(name, kind, n):
    most, rng = NAMES[name], np.random.default_rng(n)
    x = {
        "normal": rng.standard_normal(n),
        "one exponent": 1 + rng.random(n) * 2.0**-12,
        "few different": rng.choice([-3.0, -1.0, 0.0, 1.0, 3.0], n),
        "denormal": rng.standard_normal(n) * 1e-42,
        "wide": rng.standard_normal(n) * 10.0 ** rng.uniform(-44, 37, n),
    }[kind].astype(np.float32)
    parts, out = encode(name, x)
    for chunk, start in enumerate(range(0, n, CHUNK)):
        block, decoded = x[start : start + CHUNK], out[start : start + CHUNK]
        places, codes = read(parts, chunk, most, block.size)
        found = np.unique(places)
        nonzero = np.count_nonzero(block)
        assert found.size == min(len(places), nonzero) or not nonzero
        by_size = np.argsort(-np.abs(block), kind="stable")[: min(len(places), nonzero)]
        if nonzero:
            np.testing.assert_array_equal(found, np.sort(by_size))
        high, low = parts["high"][chunk], parts["low"][chunk]
        small = float(high) * (int(low) / 65535)
        levels = np.array([small, high, -small, -high]).astype(np.float32)
        wanted = np.zeros_like(block)
        wanted[places] = levels[codes]
        np.testing.assert_allclose(decoded, wanted, rtol=1e-6)
        assert (decoded * np.sign(block) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_the_means_of_the_larger_and_the_smaller_ones(name):
    most = NAMES[name]
    x = np.zeros(CHUNK, np.float32)
    x[::17][: most // 2] = 3
    x[5::17][: most // 2] = -1
    parts, out = encode(name, x)
    np.testing.assert_allclose(out, x, rtol=1e-5)
    assert parts["high"] == 3
    assert parts["low"] == round(65535 / 3)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 9000), sparse=st.sampled_from([1, 0.5, 0.005]), wide=st.booleans())
def test_what_is_lost_is_smaller_than_what_was_there(name, seed, n, sparse, wide):
    """The contraction that error feedback needs, chunk by chunk, however uneven the chunk is."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * (rng.random(n) < sparse) * 10.0 ** (rng.uniform(-8, 8, n) * wide)
    x = x.astype(np.float32)
    _, out = encode(name, x)
    for start in range(0, n, CHUNK):
        block, lost = (a[start : start + CHUNK].astype(float) for a in (x, x - out))
        assert (lost @ lost) < (block @ block) or not block.any()
        assert not lost.any() or block.any()


@pytest.mark.parametrize("name", NAMES)
def test_error_feedback_brings_the_mean_through(name):
    x = np.random.default_rng(1).standard_normal(2 * CHUNK).astype(np.float32)
    rest, total, off = np.zeros_like(x), np.zeros_like(x), {}
    for rounds in range(1, 401):
        _, out = encode(name, x + rest)
        rest += x - out
        total += out
        off[rounds] = np.linalg.norm(total / rounds - x) / np.linalg.norm(x)
    assert off[1] > 0.8
    assert off[400] < 0.35


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 100, 4096, 4097, 9000])
def test_places_beyond_an_incomplete_chunk_are_left_out(name, n):
    codec, rng = get_codec(name), np.random.default_rng(n)
    for _ in range(20):
        encoded = rng.integers(0, 256, codec.encoded_nbytes(n), np.uint8)
        guarded = np.full(n + 8192, 77, np.float32)
        codec.decode_into(encoded, guarded[4096 : 4096 + n])
        assert (guarded[:4096] == 77).all()
        assert (guarded[4096 + n :] == 77).all()
