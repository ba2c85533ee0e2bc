"""Stochastic rounding: no mean error, nothing beyond a step, the same noise for the same round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.correction import encode_corrected
from nvflare_rdma.filters.dither import dither_of

INT8 = get_codec("int8")


def scales(values):
    encoded = np.empty(INT8.encoded_nbytes(values.size), np.uint8)
    INT8.encode_into(values, encoded)
    return INT8.parts(encoded, values.size)["scales"].copy()


def test_the_mean_over_many_rounds_is_the_value():
    count = INT8.block_size + 500
    values = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    rounds = 1000
    total = np.zeros(count)
    for i in range(rounds):
        total += encode_corrected(INT8, values, None, None, dither_of(INT8, str(i))).arrived
    step = np.repeat(scales(values), INT8.block_size)[:count]
    # The error of one round has at most half a step of standard deviation.
    error = (total / rounds - values) / step
    assert (np.abs(error) < 5 * 0.5 / np.sqrt(rounds) + 1e-4).all()
    assert abs(error.mean()) < 5 * 0.5 / np.sqrt(rounds * count) + 1e-5


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**32 - 1), st.sampled_from([1e-25, 1e-3, 1.0, 1e30]))
def test_the_step_stays_and_no_error_exceeds_it(n, seed, size):
    values = (np.random.default_rng(seed).standard_normal(n) * size).astype(np.float32)
    noisy = dither_of(INT8, str(seed))(values)
    np.testing.assert_array_equal(scales(noisy), scales(values))
    arrived = encode_corrected(INT8, values, None, None, dither_of(INT8, str(seed))).arrived
    step = np.repeat(scales(values), INT8.block_size)[:n]
    assert (np.abs(arrived - values) <= step * 1.0001 + 1e-38).all()


def test_pieces_of_a_tensor_get_noise_of_their_own(monkeypatch):
    monkeypatch.setattr("nvflare_rdma.filters.correction.PIECE", 2048)
    values = np.tile(np.random.default_rng(0).standard_normal(2048).astype(np.float32), 4)
    arrived = encode_corrected(INT8, values, None, None, dither_of(INT8, "s")).arrived.reshape(4, 2048)
    assert len({row.tobytes() for row in arrived}) == 4


def encode(quantizer, params, round_=0, site="site-1", job="job"):
    ctx = FLContextManager(None, site, job, {}, {}).new_context()
    shareable = DXO(DataKind.WEIGHTS, data=params).to_shareable()
    shareable.set_header("current_round", round_)
    return quantizer.process(shareable, ctx)


def codes(*args, **kwargs):
    encoded = from_shareable(encode(ModelQuantizer("int8", stochastic_rounding=True), *args, **kwargs))
    return {k: np.asarray(v).tobytes() for k, v in encoded.data.items()}


def test_the_noise_is_that_of_job_site_round_and_tensor():
    w = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    first = codes({"w": w, "v": w.copy()})
    assert codes({"w": w, "v": w.copy()}) == first
    assert first["w"] != first["v"]
    for other in ({"round_": 1}, {"site": "site-2"}, {"job": "other"}):
        assert codes({"w": w, "v": w.copy()}, **other)["w"] != first["w"], other


def test_outside_of_rounds_each_task_has_its_own():
    w = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    found = set()
    for task in ("a", "b"):
        ctx = FLContext()
        ctx.set_prop(ReservedKey.TASK_ID, task, private=True, sticky=False)
        shareable = DXO(DataKind.WEIGHTS, data={"w": w}).to_shareable()
        encoded = from_shareable(ModelQuantizer("int8", stochastic_rounding=True).process(shareable, ctx))
        found.add(encoded.data["w"].tobytes())
    assert len(found) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_differs_from_rounding_to_nearest_and_decodes_as_ever(dtype):
    params = {"w": torch.randn(60, 70).to(dtype), "bad": torch.tensor([1.0, float("nan")] * 500)}
    encoded = encode(ModelQuantizer("int8", stochastic_rounding=True), params)
    nearest = encode(ModelQuantizer("int8"), params)
    assert not torch.equal(from_shareable(encoded).data["w"], from_shareable(nearest).data["w"])
    got = from_shareable(ModelDequantizer().process(encoded, FLContext())).data
    assert got["w"].dtype == dtype
    assert (got["w"].float() - params["w"].float()).abs().max() < 0.07
    assert torch.equal(got["bad"].nan_to_num(7), params["bad"].nan_to_num(7))


def test_where_it_makes_no_sense_it_is_refused():
    with pytest.raises(ConfigError, match="leave out one"):
        ModelQuantizer("int8", error_feedback=True, stochastic_rounding=True)
    with pytest.raises(ConfigError, match="int8 only"):
        ModelQuantizer("normfloat4", stochastic_rounding=True)
    ModelQuantizer("normfloat4", policy=[{"role": "head", "quantization_type": "int8"}], stochastic_rounding=True)
