"""Either side may be FLARE's own filter. Its `.cuda()` calls are made to do nothing, since tests run on a CPU."""

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext

pytest.importorskip("bitsandbytes")

from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer as FlareDequantizer
from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer as FlareQuantizer

from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer

SHARED_TYPES = ["float16", "blockwise8", "float4", "normfloat4"]


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)


def model(as_torch):
    gen = torch.Generator().manual_seed(1)
    params = {
        "conv": torch.randn(8, 4, 3, 4, generator=gen),
        "big": torch.randn(130, 64, generator=gen),
        "vector": torch.randn(4098, generator=gen),
        "half": torch.randn(40, 66, generator=gen).half(),
        "flag": torch.tensor([True, False]),
    }
    if as_torch:
        params["bf16"] = torch.randn(50, 64, generator=gen).bfloat16()
        return params
    return {k: v.numpy() for k, v in params.items()}


def through(quantizer, dequantizer, params):
    encoded = quantizer.process(DXO(DataKind.WEIGHTS, data=dict(params)).to_shareable(), FLContext())
    return from_shareable(encoded), from_shareable(dequantizer.process(encoded, FLContext()))


def equal(a, b):
    return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def restore_shape(decoded, sent):
    """bitsandbytes 0.50 on a CPU gives a vector that was in 4 bits back as one row, and FLARE leaves it so."""
    row = decoded.ndim == 2 and sent.ndim == 1 and decoded.shape[0] == 1
    return decoded.reshape(sent.shape) if row else decoded


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", SHARED_TYPES)
def test_all_four_pairs_give_the_same_tensors(name, as_torch):
    params = model(as_torch)
    _, reference = through(FlareQuantizer(name), FlareDequantizer(), params)
    reference.data = {k: restore_shape(v, params[k]) for k, v in reference.data.items()}
    for quantizer, dequantizer in (
        (ModelQuantizer, FlareDequantizer),
        (FlareQuantizer, ModelDequantizer),
        (ModelQuantizer, ModelDequantizer),
    ):
        _, got = through(quantizer(name), dequantizer(), params)
        for key, sent in params.items():
            value = restore_shape(got.data[key], sent) if dequantizer is FlareDequantizer else got.data[key]
            assert equal(value, reference.data[key]), (quantizer, dequantizer, key)
        assert "quant_state" not in got.meta


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", SHARED_TYPES)
def test_codes_and_metadata_are_those_of_flare(name, as_torch):
    params = model(as_torch)
    theirs = from_shareable(
        FlareQuantizer(name).process(DXO(DataKind.WEIGHTS, data=dict(params)).to_shareable(), FLContext())
    )
    ours = from_shareable(
        ModelQuantizer(name).process(DXO(DataKind.WEIGHTS, data=dict(params)).to_shareable(), FLContext())
    )
    assert ours.meta.keys() == theirs.meta.keys()
    for key in ("source_datatype", "quantized_flag", "PROCESSED_ALGORITHM"):
        assert ours.meta[key] == theirs.meta[key]
    for key in params:
        assert equal(ours.data[key], theirs.data[key]), key
        a, b = ours.meta["quant_state"][key], theirs.meta["quant_state"][key]
        assert list(a) == list(b)
        for item in a:
            if isinstance(b[item], torch.Tensor | np.ndarray):
                assert equal(a[item], b[item]), (key, item)
            elif item == "shape":
                assert tuple(a[item]) == tuple(b[item])
            else:
                assert a[item] == b[item]


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", SHARED_TYPES)
def test_flare_leaves_our_exact_tensors_alone(name, as_torch):
    """FLARE's quantizer refuses these or breaks them; its dequantizer must still pass what ours sends exact."""
    params = {
        "w": torch.randn(64, 66),
        "steps": torch.tensor(12),
        "ids": torch.arange(10),
        "double": torch.randn(10).double(),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(1.5),
        "broken": torch.tensor([1.0, float("nan")] * 300),
        "large": torch.tensor([1.0, 1e30] * 300),
    }
    if not as_torch:
        params = {k: v.numpy() for k, v in params.items()}
    _, got = through(ModelQuantizer(name), FlareDequantizer(), params)
    got.data = {k: restore_shape(v, params[k]) for k, v in got.data.items()}
    for key, sent in params.items():
        assert got.data[key].dtype == sent.dtype
        assert got.data[key].shape == sent.shape
        if key not in ("w", "large", "scalar"):
            np.testing.assert_array_equal(np.asarray(got.data[key]), np.asarray(sent))
    assert abs(float(got.data["scalar"]) - 1.5) < 0.01
    assert abs(float(got.data["large"][1]) - 1e30) < 1e28
