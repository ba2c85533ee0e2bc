"""Either side may be FLARE's own filter. Its `.cuda()` calls are made to do nothing, since tests run on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from tests.support.flares_filters import flares_dequantizer, flares_quantizer

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
    sent = from_shareable(encoded)
    sent = DXO(sent.data_kind, dict(sent.data), dict(sent.meta))  # FLARE's dequantizer changes its own
    return sent, from_shareable(dequantizer.process(encoded, FLContext()))


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
    _, reference = through(flares_quantizer(name), flares_dequantizer(), params)
    reference.data = {k: restore_shape(v, params[k]) for k, v in reference.data.items()}
    for quantizer, dequantizer in (
        (ModelQuantizer, flares_dequantizer),
        (flares_quantizer, ModelDequantizer),
        (ModelQuantizer, ModelDequantizer),
    ):
        _, got = through(quantizer(name), dequantizer(), params)
        for key, sent in params.items():
            value = restore_shape(got.data[key], sent) if dequantizer is flares_dequantizer else got.data[key]
            assert equal(value, reference.data[key]), (quantizer, dequantizer, key)
        assert "quant_state" not in got.meta


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", SHARED_TYPES)
def test_codes_and_metadata_are_those_of_flare(name, as_torch):
    params = model(as_torch)
    theirs = from_shareable(
        flares_quantizer(name).process(DXO(DataKind.WEIGHTS, data=dict(params)).to_shareable(), FLContext())
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
    _, got = through(ModelQuantizer(name), flares_dequantizer(), params)
    got.data = {k: restore_shape(v, params[k]) for k, v in got.data.items()}
    for key, sent in params.items():
        assert got.data[key].dtype == sent.dtype
        assert got.data[key].shape == sent.shape
        if key not in ("w", "large", "scalar"):
            np.testing.assert_array_equal(np.asarray(got.data[key]), np.asarray(sent))
    assert abs(float(got.data["scalar"]) - 1.5) < 0.01
    assert abs(float(got.data["large"][1]) - 1e30) < 1e28


@pytest.mark.parametrize("as_torch", [True, False])
def test_adaquant_goes_both_ways(as_torch):
    """FLARE compresses its codes and ours doesn't; and it rounds float64 to 16 bits once, not by way of float32."""
    params = model(as_torch) | {"constant": np.full((30, 40), 0.25, np.float32)}
    if as_torch:
        params = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in params.items()}
    sent, reference = through(flares_quantizer("adaquant"), flares_dequantizer(), params)
    assert "compressed_tensor" in sent.meta["quant_state"]["big"]
    for quantizer, dequantizer in (
        (ModelQuantizer, flares_dequantizer),
        (flares_quantizer, ModelDequantizer),
        (ModelQuantizer, ModelDequantizer),
    ):
        _, got = through(quantizer("adaquant"), dequantizer(), params)
        for key, value in reference.data.items():
            assert (got.data[key].dtype, got.data[key].shape) == (value.dtype, params[key].shape), key
            a, b = (np.asarray(torch.as_tensor(x).float()) for x in (got.data[key], value))
            np.testing.assert_allclose(a, b, rtol=2.0**-7 if key in ("bf16", "half") else 1e-6, atol=1e-6)


def test_adaquants_tensor_without_levels_is_not_nan():
    """FLARE finds no level for a range as small as this one, and its own dequantizer divides zero by zero."""
    sent, theirs = through(flares_quantizer("adaquant"), flares_dequantizer(), {"w": torch.linspace(1, 1 + 1e-5, 50)})
    assert sent.meta["quant_state"]["w"]["quantization_level"] == 0
    assert theirs.data["w"].isnan().all()
    _, ours = through(flares_quantizer("adaquant"), ModelDequantizer(), {"w": torch.linspace(1, 1 + 1e-5, 50)})
    assert torch.allclose(ours.data["w"], torch.ones(50), atol=2e-5)


@pytest.mark.parametrize("name", ["int8", "normfloat4_dq"])
def test_flare_refuses_what_it_does_not_know(name):
    with pytest.raises(ValueError, match="Invalid quantization type"):
        through(ModelQuantizer(name), flares_dequantizer(), {"w": torch.randn(64, 64)})


def test_flare_refuses_a_policy_of_several_codecs():
    mixed = ModelQuantizer("normfloat4", policy=[{"name": "a", "quantization_type": "float16"}])
    with pytest.raises(ValueError, match="Invalid quantization type: mixed"):
        through(mixed, flares_dequantizer(), {"a": torch.randn(64, 64), "b": torch.randn(64, 64)})


def test_flare_reads_a_policy_of_one_codec_and_ties():
    tied = torch.randn(64, 64)
    params = {"embed.weight": tied, "head.weight": tied, "norm.weight": torch.randn(64), "x.bias": torch.randn(4096)}
    sent, got = through(ModelQuantizer("blockwise8", policy=[]), flares_dequantizer(), params)
    assert sent.data["embed.weight"] is sent.data["head.weight"]
    for key in ("norm.weight", "x.bias"):
        assert torch.equal(got.data[key], params[key])
    for key in ("embed.weight", "head.weight"):
        assert got.data[key].dtype == torch.float32
        assert torch.allclose(got.data[key], tied, atol=0.05)


# What FLARE's own tests of its filters ask for, asked of ours.


def test_the_default_type_and_its_case():
    assert ModelQuantizer().quantization_type == "float16"
    assert ModelQuantizer(quantization_type="FLOAT16").quantization_type == "float16"
    assert ModelQuantizer("adaquant").quantization_type == "adaquant"
    with pytest.raises(ValueError, match="invalid_type"):
        ModelQuantizer(quantization_type="invalid_type")


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
@pytest.mark.parametrize("name", ["float16", "adaquant"])
@pytest.mark.parametrize("as_torch", [True, False])
def test_process_dxo_by_itself(kind, name, as_torch):
    params = {f"layer{i}": np.random.default_rng(i).standard_normal(s).astype("f4") for i, s in enumerate(SHAPES)}
    if as_torch:
        params = {k: torch.from_numpy(v) for k, v in params.items()}
    dxo, shareable, ctx = DXO(kind, data=params), Shareable(), FLContext()
    encoded = ModelQuantizer(name).process_dxo(dxo, shareable, ctx)
    assert encoded.get_meta_prop(MetaKey.PROCESSED_ALGORITHM) == name
    assert encoded.get_meta_prop("quantized_flag") is True
    assert encoded.get_meta_prop("quant_state").keys() == params.keys()
    assert set(encoded.get_meta_prop("source_datatype").values()) <= {"float32", "bool"}
    decoded = ModelDequantizer().process_dxo(encoded, shareable, ctx)
    assert decoded.meta == {}
    for key, sent in params.items():
        assert type(decoded.data[key]) is type(sent)
        assert (decoded.data[key].dtype, decoded.data[key].shape) == (sent.dtype, sent.shape)
        assert np.abs(np.asarray(decoded.data[key]) - np.asarray(sent)).max() < 0.1


SHAPES = [(1,), (100,), (10, 20), (5, 10, 15), (2, 3, 4, 5), (200, 200)]


def test_half_the_size_in_float16():
    encoded, _ = through(ModelQuantizer("float16"), ModelDequantizer(), {"w": torch.randn(1000, 1000)})
    assert encoded.data["w"].nbytes == 2_000_000
    assert encoded.data["w"].dtype == torch.float16


def test_a_16_bit_tensor_is_left_alone_by_float16():
    half = np.random.default_rng(0).standard_normal((10, 10)).astype(np.float16)
    encoded, decoded = through(ModelQuantizer("float16"), ModelDequantizer(), {"w": half})
    assert encoded.data["w"] is half
    assert decoded.data["w"] is half


def test_what_is_quantized_already_stays():
    dxo = DXO(DataKind.WEIGHTS, data={"w": torch.randn(10, 10).half()})
    dxo.set_meta_prop("quantized_flag", True)
    assert ModelQuantizer("float16").process_dxo(dxo, Shareable(), FLContext()) is None


def test_an_algorithm_that_nobody_knows_is_a_value_error():
    dxo = DXO(DataKind.WEIGHTS, data={"w": torch.randn(10, 10).half()})
    for key, value in ((MetaKey.PROCESSED_ALGORITHM, "invalid_type"), ("quant_state", {}), ("source_datatype", {})):
        dxo.set_meta_prop(key, value)
    with pytest.raises(ValueError, match="invalid_type"):
        ModelDequantizer().process_dxo(dxo, Shareable(), FLContext())


def test_values_beyond_float16_arrive_where_flare_would_clamp_them():
    values = np.array([1e10, -1e10], np.float32)
    _, decoded = through(ModelQuantizer("float16"), ModelDequantizer(), {"w": values})
    np.testing.assert_array_equal(decoded.data["w"], values)
