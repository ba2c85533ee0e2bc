"""The relative error: what is measured is what decoded values say, and what is estimated is close to that."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, estimate_error, get_codec, measure_error, to_flat
from nvflare_rdma.codecs.fidelity import (
    SAMPLED,
    PieceNotes,
    RelativeError,
    SampledLoss,
    Squares,
    sample_of,
    sample_runs,
    squares_of,
)
from nvflare_rdma.codecs.policy import BETTER, better_types
from nvflare_rdma.codecs.runs import TILE
from nvflare_rdma.errors import UnrepresentableError

LOSSY = [name for name in CODEC_NAMES if name not in ("lossless", "exact_delta")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(n, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def encoded(codec, tensor):
    out = np.empty(codec.encoded_nbytes(tensor.numel()), np.uint8)
    return out[: codec.encode_into(to_flat(tensor), out)]


def by_hand(codec, codes, tensor):
    """The relative error as its definition says it, in torch."""
    flat = to_flat(tensor)
    arrived = np.empty_like(flat)
    codec.decode_into(codes, arrived)
    wide = [
        torch.from_numpy(each.view(np.int16)).view(torch.bfloat16)
        if each.dtype == np.uint16
        else torch.from_numpy(each)
        for each in (flat, arrived)
    ]
    x, y = (each.double() for each in wide)
    return math.sqrt(((x - y) ** 2).sum() / (x**2).sum())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(LOSSY), st.sampled_from(DTYPES), st.integers(1, 3000), st.integers(-30, 30), st.integers(0, 99))
def test_what_is_measured_is_what_decoded_values_say(name, dtype, n, exponent, seed):
    codec, tensor = get_codec(name), (random(n, seed) * 2.0 ** min(exponent, 10)).to(dtype)
    if not tensor.any():
        return
    try:
        codes = encoded(codec, tensor)
    except UnrepresentableError:  # adaquant, where it would take too many bits
        return
    assert measure_error(codec, codes, tensor).value == pytest.approx(by_hand(codec, codes, tensor), rel=1e-9)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_measured_over_all_runs_and_strides_of_a_large_tensor(name, dtype):
    codec, tensor = get_codec(name), random(2 * TILE + 5000, 1, dtype)
    tensor[-1] *= 50
    strided = torch.stack([tensor, tensor], 1)[:, 0]
    for each in (tensor, strided):
        codes = encoded(codec, each)
        found = measure_error(codec, codes, each)
        assert not found.estimated
        assert found.value == pytest.approx(by_hand(codec, codes, each), rel=1e-9)


@pytest.mark.parametrize("name", ["lossless", "exact_delta"])
def test_types_without_loss_have_no_error(name):
    codec, tensor = get_codec(name), random(5000)
    assert measure_error(codec, encoded(codec, tensor), tensor) == RelativeError(0.0)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([n for n in LOSSY if n not in ("adaquant", "topk2", "topk2_128")]), st.integers(0, 2**31))
def test_an_estimate_is_within_a_twentieth_for_normal_values(name, seed):
    codec, tensor = get_codec(name), random(20 * SAMPLED // 8 + 17, seed)
    found = estimate_error(codec, tensor)
    assert found.estimated
    assert found.value == pytest.approx(measure_error(codec, encoded(codec, tensor), tensor).value, rel=0.05)
    assert estimate_error(codec, tensor) == found, "the same tensor, the same estimate"


@pytest.mark.parametrize("name", LOSSY)
def test_an_estimate_of_few_values_is_measured(name):
    codec, tensor = get_codec(name), random(SAMPLED, 3)
    found = estimate_error(codec, tensor)
    assert not found.estimated
    assert found.value == pytest.approx(by_hand(codec, encoded(codec, tensor), tensor), rel=1e-9)


@given(st.integers(1, 1 << 26))
def test_a_sample_is_bounded_and_spread_over_the_tensor(n):
    runs = sample_runs(n)
    assert sum(run.stop - run.start for run in runs) == min(n, SAMPLED)
    assert all(run.start % 4096 == 0 and run.stop <= n for run in runs)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(runs))
    assert runs[0].start == 0
    assert n - runs[-1].stop < 4096


@pytest.mark.parametrize("turned", [False, True])
def test_a_sample_is_of_the_tensors_own_values(turned):
    tensor = random(300 * 1000).reshape(300, 1000)
    tensor = tensor.T if turned else tensor
    flat = tensor.reshape(-1).numpy()
    np.testing.assert_array_equal(sample_of(tensor), np.concatenate([flat[run] for run in sample_runs(flat.size)]))


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_have_no_error(name):
    codec, zeros = get_codec(name), torch.zeros(5000)
    assert measure_error(codec, encoded(codec, zeros), zeros).value == 0


def test_zeros_that_arrive_as_something_have_all_error():
    assert squares_of(np.zeros(5, np.float32), np.ones(5, np.float32)).relative == math.inf


@pytest.mark.parametrize("name", ["normfloat4", "int8", "float8_e4m3", "normfloat4_e4m3"])
def test_denormals_that_become_zeros_are_lost(name):
    codec, tiny = get_codec(name), torch.full((5000,), 1e-41)
    assert measure_error(codec, encoded(codec, tiny), tiny).value == pytest.approx(1, rel=1e-6)


def test_huge_values_do_not_overflow():
    huge = random(5000) * 1e37
    found = measure_error(get_codec("normfloat4"), encoded(get_codec("normfloat4"), huge), huge)
    assert 0.05 < found.value < 0.15


def test_nan_and_infinities_that_arrive_are_left_out():
    codec, tensor = get_codec("bfloat16"), random(5000)
    usual = measure_error(codec, encoded(codec, tensor), tensor).value
    tensor[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert measure_error(codec, encoded(codec, tensor), tensor).value == pytest.approx(usual, rel=0.01)


@pytest.mark.parametrize(
    ("values", "arrived"),
    [([1.0, math.nan], [1.0, 0.0]), ([1.0, 2.0], [1.0, math.inf]), ([math.inf, 1.0], [-math.inf, 1.0])],
)
def test_nan_and_infinities_that_come_or_go_are_all_error(values, arrived):
    assert squares_of(np.array(values, np.float32), np.array(arrived, np.float32)).relative == math.inf


def test_each_better_type_loses_less():
    tensor = random(1 << 15)
    errors = [estimate_error(get_codec(name), tensor).value for name in BETTER if name != "float8_e4m3"]
    assert errors == sorted(errors, reverse=True)
    assert all(isinstance(get_codec(name), FixedSizeCodec) for name in BETTER), "peers encode them on the way"


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("int2", "float32", ["normfloat4_e4m3", "blockwise8", "int8", "float8_e4m3", "bfloat16", "float16"]),
        ("normfloat4", "bfloat16", ["blockwise8", "int8", "float8_e4m3"]),
        ("float16", "float32", ["bfloat16"]),
        ("int8", "float16", ["float8_e4m3"]),
    ],
)
def test_better_types_are_no_smaller_and_save_something(name, dtype, expected):
    assert [codec.name for codec in better_types(get_codec(name), dtype, 100_000)] == expected


@pytest.mark.parametrize("n", [1000, SAMPLED, 5 * SAMPLED + 123])
@pytest.mark.parametrize("name", ["normfloat4", "int8", "normfloat4_dq"])
def test_values_that_come_by_are_estimated_as_those_at_hand(name, n):
    """In any order, and more than once."""
    codec, tensor = get_codec(name), random(n)
    loss, values = SampledLoss(codec, n), tensor.numpy()
    assert loss.error is None
    for first in [*range(0, n, SAMPLED)[::-1], 0]:
        loss.note(first, values[first : first + SAMPLED])
    found, expected = loss.error, estimate_error(codec, tensor)
    assert found.estimated == expected.estimated == (n > SAMPLED)
    assert found.value == pytest.approx(expected.value, rel=0.02)


def near_the_largest() -> np.ndarray:
    """Halves that a codec with two levels of scales can carry, but not the first 4096 of them alone."""
    values = np.zeros(1 << 17, np.float16)
    values[: 58 * 64] = np.finfo(np.float16).max
    return values


def test_a_run_that_can_not_be_carried_alone_is_left_out():
    codec, values = get_codec("normfloat4_dq"), near_the_largest()
    encoded = np.empty(codec.encoded_nbytes(values.size), np.uint8)
    codec.encode_into(values, encoded)
    with pytest.raises(UnrepresentableError):
        codec.encode_into(values[:4096], encoded[: codec.encoded_nbytes(4096)])
    loss = SampledLoss(codec, values.size)
    loss.note(0, values[:8192])
    assert loss.error is None
    loss.note(0, values)
    assert loss.error == RelativeError(0.0, True)


def test_what_turns_out_to_travel_exact_is_forgotten():
    values, codec = random(1 << 18).numpy(), get_codec("int8")
    loss, other = SampledLoss(codec, values.size), SampledLoss(codec, values.size)
    values[: 1 << 17 : 64] = 100.0
    loss.note(0, values)
    assert loss.error.value > 0.01
    loss.leave_out(0, 1 << 17)
    loss.note(0, values)  # late, by another thread
    other.note(1 << 17, values[1 << 17 :])
    assert loss.error == other.error
    loss.leave_out(1 << 17, 1 << 17)
    assert loss.error is None


def test_pieces_are_measured_when_all_of_them_are_known():
    notes = PieceNotes(RelativeError(0.09, True), 0.1)
    notes.note(100, b"second", Squares(1.0, 4.0))
    assert notes.error(2) == RelativeError(0.09, True)
    assert (notes.digest(2), notes.excess(2)) == (None, None)
    notes.note(0, b"first", Squares(0.0, 5.0))
    assert notes.error(2) == RelativeError(1 / 3)
    assert notes.excess(2) == 1 / 3
    other = PieceNotes()
    other.note(0, b"first", None)
    other.note(100, b"second", None)
    assert notes.digest(2) == other.digest(2) is not None
    assert other.error(2) is None
