"""Tensors on a GPU are encoded there, with the same result. Without one, CPU tensors take that path here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext

from nvflare_rdma.codecs import CODEC_NAMES, is_torch, on_device
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer, encoding
from nvflare_rdma.filters.options import with_needed

#: Types that need no other option.
ALONE = [name for name in CODEC_NAMES if not with_needed(name, [], {})]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
ON_CPU = ("adaquant", "lossless")


def model(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(130, 67, generator=generator)
    spoiled = torch.randn(5000, generator=generator)
    spoiled[4000] = np.nan
    state = {
        "embedding": embedding,
        "half": torch.randn(3, 4097, generator=generator).half(),
        "turned": torch.randn(70, 80, generator=generator).bfloat16().T,
        "parameter": torch.nn.Parameter(torch.randn(2048, generator=generator)),
        "spoiled": spoiled,
        "huge": torch.full((3000,), 3e38),
        "steps": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    moved = {name: value.to(device) for name, value in state.items()}
    return {**moved, "head": moved["embedding"], "array": np.linspace(-1, 1, 3000, dtype=np.float32)}


def quantize(params, name, **arguments):
    return ModelQuantizer(name, **arguments).process(DXO(DataKind.WEIGHTS, data=params).to_shareable(), FLContext())


def assert_same_message(got, wanted):
    got, wanted = from_shareable(got), from_shareable(wanted)
    assert got.meta.keys() == wanted.meta.keys()
    assert_same(got.meta, wanted.meta)
    assert_same(got.data, wanted.data)


def assert_same(got, wanted):
    assert isinstance(got, torch.Tensor) == isinstance(wanted, torch.Tensor)
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key, value in wanted.items():
            assert_same(got[key], value)
    elif isinstance(wanted, torch.Tensor):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got.cpu().nan_to_num(7), wanted.nan_to_num(7))
    else:
        np.testing.assert_array_equal(got, wanted)


@pytest.fixture
def by_torch(monkeypatch):
    """All torch tensors count as being on a GPU; gives a list of the codecs that encode there."""
    calls, encode = [], on_device.encode_on_device
    monkeypatch.setattr(encoding, "is_on_gpu", is_torch)
    monkeypatch.setattr(on_device, "encode_on_device", lambda codec, x: calls.append(codec.name) or encode(codec, x))
    return calls


@pytest.mark.parametrize("name", ALONE)
def test_a_message_is_the_same_from_where_the_tensors_are(name, by_torch):
    got = quantize(model(), name)
    assert bool(by_torch) == (name not in ON_CPU)
    assert set(by_torch) <= {name}
    with pytest.MonkeyPatch.context() as context:
        context.setattr(encoding, "is_on_gpu", lambda value: False)
        assert_same_message(got, quantize(model(), name))


@pytest.mark.parametrize("feature", ["error_feedback", "delta", "stochastic_rounding"])
def test_what_looks_at_the_values_stays_on_the_cpu(feature, by_torch, at):
    quantizer = ModelQuantizer("int8", one_way=True, **{feature: True})
    ctx = at("server out", quantizer)
    quantizer.process(DXO(DataKind.WEIGHTS, data=model()).to_shareable(), ctx)
    assert by_torch == []


@needs_cuda
@pytest.mark.parametrize("name", ALONE)
def test_cuda_tensors_give_the_message_of_cpu_tensors(name):
    params = model("cuda")
    before = {key: value.clone() for key, value in params.items() if isinstance(value, torch.Tensor)}
    got, wanted = quantize(params, name), quantize(model(), name)
    assert_same_message(got, wanted)
    for key, value in before.items():
        sent = from_shareable(got).data[key]
        assert sent is params[key] or sent.device.type == "cpu"
        assert torch.equal(params[key].nan_to_num(7), value.nan_to_num(7))
    back, wanted_back = (from_shareable(ModelDequantizer().process(message, FLContext())) for message in (got, wanted))
    assert_same(back.data, wanted_back.data)


@needs_cuda
@pytest.mark.parametrize("feature", ["error_feedback", "delta", "stochastic_rounding"])
def test_cuda_tensors_with_a_past_are_encoded_on_the_cpu(feature, at):
    messages = []
    for device in ("cuda", "cpu"):
        quantizer = ModelQuantizer("int8", one_way=True, **{feature: True})
        ctx = at("server out", quantizer)
        messages.append(quantizer.process(DXO(DataKind.WEIGHTS, data=model(device)).to_shareable(), ctx))
    assert_same_message(*messages)
