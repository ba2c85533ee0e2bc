"""Planes of bytes in Huffman's code: they arrive, take what their entropy says, and damage stays in its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs.kernels.huffman import CODED, CONSTANT, PLACES, STORED, WORK, read_plane, write_plane

MOST = 1 << 16
room = np.zeros(MOST + 8, np.uint8)
work, table = np.zeros(WORK, np.int64), np.zeros(PLACES, np.uint16)


def write(plane, begin=0):
    """What is written of a plane that lies at `begin`, and nothing beyond it."""
    placed = np.full(begin + plane.size + 3, 99, np.uint8)
    placed[begin : begin + plane.size] = plane
    out = np.full(5 + plane.size + 1 + 16, 0xAA, np.uint8)
    end = write_plane(placed, begin, plane.size, out, 5, room[: plane.size + 8], work)
    assert (out[:5] == 0xAA).all()
    assert (out[end:] == 0xAA).all()
    assert end - 5 <= plane.size + 1
    return out[5:end]


def read(written, n, begin=0):
    plane = np.full(begin + n + 16, 77, np.uint8)
    used = read_plane(written, 0, plane, begin, n, (room[: n + 8], work, table))
    assert (plane[:begin] == 77).all()
    assert (plane[begin + n :] == 77).all()
    return used, plane[begin : begin + n]


def assert_arrives(plane, begin=0):
    written = write(plane, begin)
    used, arrived = read(written, plane.size, begin)
    assert used == written.size
    np.testing.assert_array_equal(arrived, plane)
    return written


def geometric(rng, n, rate):
    """Bytes, each half as frequent, or less, or more, as the one before."""
    return np.minimum(rng.geometric(rate, n) - 1, 255).astype(np.uint8)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    n=st.one_of(st.integers(1, 400), st.sampled_from([4095, MOST - 1, MOST])),
    rate=st.floats(0.004, 0.999),
    shuffled=st.booleans(),
    begin=st.integers(0, 9),
)
def test_planes_arrive(seed, n, rate, shuffled, begin):
    rng = np.random.default_rng(seed)
    plane = geometric(rng, n, rate)
    assert_arrives(rng.permutation(256).astype(np.uint8)[plane] if shuffled else plane, begin)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5])
def test_planes_take_little_more_than_their_entropy(rate):
    plane = geometric(np.random.default_rng(0), MOST, rate)
    shares = np.bincount(plane) / MOST
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    written = assert_arrives(plane)
    assert written[0] == CODED
    assert written.size <= 150 + 1.03 * entropy * MOST / 8


def test_constant_and_random_planes():
    for n in (1, 2, 63, 64, 1000, MOST):
        assert assert_arrives(np.full(n, 200, np.uint8)).tolist() == [CONSTANT, 200]
        plane = np.random.default_rng(n).integers(0, 256, n, np.uint8)
        if n > 1:
            assert assert_arrives(plane).tolist() == [STORED, *plane]


def test_codes_that_would_be_too_long_are_shortened():
    """Frequencies as Fibonacci's numbers give the longest codes of all."""
    counts = [1, 1]
    while sum(counts) + counts[-1] + counts[-2] <= MOST:
        counts.append(counts[-1] + counts[-2])
    plane = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.uint8)
    assert len(counts) > 20
    assert assert_arrives(plane)[0] == CODED
    assert_arrives(np.uint8(255) - plane)
    every = np.append(np.zeros(MOST - 255, np.uint8), np.arange(1, 256, dtype=np.uint8))
    assert assert_arrives(every)[0] == CODED


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 2000), rate=st.floats(0.1, 0.9), cut=st.booleans())
def test_damage_is_refused_or_stays_in_its_place(seed, n, rate, cut):
    rng = np.random.default_rng(seed)
    written = write(geometric(rng, n, rate)).copy()
    if cut:
        written = written[: rng.integers(0, written.size)]
    else:
        places = rng.integers(0, min(written.size, 40 if rng.random() < 0.7 else written.size), 4)
        written[places] = rng.integers(0, 256, 4)
    used, _ = read(written, n)
    assert used == -1 or 0 < used <= written.size
    assert not cut or used == -1


def test_streams_longer_than_their_plane_are_refused():
    """Nothing but the plane's size says how much of `room` they may fill."""
    plane = geometric(np.random.default_rng(0), 1000, 0.5)
    written = assert_arrives(plane)
    assert written[0] == CODED
    sizes = 2 + written[1] // 2 + 1
    streams = written[sizes : sizes + 8].view("<u2").sum()
    longer = np.append(written, np.zeros(2000, np.uint8))
    for size, refused in ((plane.size, False), (plane.size + 1, True)):
        extra = np.array(written[sizes + 6 : sizes + 8]).view("<u2") + np.uint16(size - streams)
        longer[sizes + 6 : sizes + 8] = extra.view(np.uint8)
        used, _ = read(longer, plane.size)
        assert (used == -1) == refused, size
