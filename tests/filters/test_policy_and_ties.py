"""Messages under a policy: several codecs, exact tensors, ties, adapters, dicts in dicts."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.utils import fobs

from nvflare_rdma.codecs import CODEC_NAMES
from nvflare_rdma.errors import CodecError, ConfigError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.options import with_needed

#: Types that need no other option.
ALONE = [name for name in CODEC_NAMES if not with_needed(name, [], {})]


def encode(params, name="normfloat4", kind=DataKind.WEIGHTS, **kwargs):
    return from_shareable(ModelQuantizer(name, **kwargs).process(DXO(kind, data=params).to_shareable(), FLContext()))


def decode(dxo):
    return from_shareable(ModelDequantizer().process(dxo.to_shareable(), FLContext())).data


def llama(tied=True, as_torch=True):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(200, 64, generator=generator)
    params = {
        "model.embed_tokens.weight": embedding,
        "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64, generator=generator),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(2048, generator=generator),
        "model.layers.0.input_layernorm.weight": torch.randn(2048, generator=generator),
        "model.layers.0.small.weight": torch.randn(8, 8, generator=generator),
        "lm_head.weight": embedding if tied else embedding.clone(),
        "steps": torch.tensor(3),
    }
    return params if as_torch else {k: v.numpy() for k, v in params.items()}


def test_without_a_policy_all_floats_are_encoded():
    dxo = encode(llama())
    assert {k for k, v in dxo.meta["source_datatype"].items() if v == "bool"} == {"steps"}


def test_the_default_rules_keep_norms_biases_and_small_tensors_exact():
    params = llama()
    dxo = encode(params, policy=[])
    exact = {k for k, v in dxo.meta["source_datatype"].items() if v == "bool"}
    assert exact == {
        "steps",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.small.weight",
    }
    assert dxo.meta[MetaKey.PROCESSED_ALGORITHM] == "normfloat4"
    got = decode(dxo)
    for key in exact:
        assert torch.equal(got[key], params[key])


def test_each_tensor_by_its_own_codec():
    rules = [
        {"role": "embedding", "quantization_type": "blockwise8"},
        {"name": "*q_proj.weight", "quantization_type": "float16"},
        {"role": "norm", "quantization_type": "lossless"},
        {"name": "*.bias", "quantization_type": "adaquant"},
    ]
    params = llama(tied=False)
    params["model.layers.0.input_layernorm.weight"] = torch.ones(2048)
    dxo = encode(params, policy=rules)
    assert dxo.meta[MetaKey.PROCESSED_ALGORITHM] == "mixed"
    codecs = {k.split(".")[-2]: s["codec"] for k, s in dxo.meta["quant_state"].items() if s}
    assert codecs == {
        "embed_tokens": "blockwise8",
        "input_layernorm": "lossless",
        "lm_head": "normfloat4",
        # Two tensors end in q_proj: the bias comes last.
        "q_proj": "adaquant",
    }
    got = decode(dxo)
    worst = {k: float((got[k] - v).abs().max()) for k, v in params.items()}
    assert worst["model.layers.0.input_layernorm.weight"] == worst["steps"] == 0
    assert 0 < worst["model.layers.0.self_attn.q_proj.weight"] < 2e-3
    assert 0 < worst["model.layers.0.self_attn.q_proj.bias"] < 0.02
    assert 0.01 < worst["lm_head.weight"] < 0.6
    assert 0 < worst["model.embed_tokens.weight"] < 0.04


def test_a_mixed_message_that_names_no_codec_is_refused():
    dxo = encode(llama(), policy=[{"role": "embedding", "quantization_type": "int8"}])
    dxo.meta["quant_state"]["model.embed_tokens.weight"]["codec"] = "int3"
    with pytest.raises(CodecError, match=r"'model\.embed_tokens\.weight'.*'int3'"):
        decode(dxo)
    del dxo.meta["quant_state"]["model.embed_tokens.weight"]["codec"]
    with pytest.raises(CodecError, match="None"):
        decode(dxo)


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", ALONE)
def test_tied_tensors_travel_once_and_arrive_tied(name, as_torch):
    from nvflare.app_common.decomposers import numpy_decomposers
    from nvflare.app_opt.pt.decomposers import TensorDecomposer

    fobs.register(TensorDecomposer)
    numpy_decomposers.register()
    params = llama(as_torch=as_torch)
    dxo = encode(params, name)
    assert dxo.data["lm_head.weight"] is dxo.data["model.embed_tokens.weight"]
    assert dxo.meta["nvflare_rdma"]["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    # What goes over the wire are copies: the tie has to be told.
    received = from_shareable(fobs.loads(fobs.dumps(dxo.to_shareable())))
    got = decode(received)
    assert got["lm_head.weight"] is got["model.embed_tokens.weight"]
    assert got["lm_head.weight"].shape == (200, 64)
    untied = decode(encode(llama(tied=False, as_torch=as_torch), name))
    assert untied["lm_head.weight"] is not untied["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(untied["lm_head.weight"]), np.asarray(got["lm_head.weight"]))


def test_exact_tensors_stay_tied_too_and_others_apart():
    buffer, matrix = torch.arange(10), torch.randn(64, 64)
    params = {"a": buffer, "b": buffer, "m": matrix, "m.t": matrix.t(), "m.part": matrix[:32], "e": torch.zeros(0)}
    params["e2"] = params["e"]
    dxo = encode(params)
    assert dxo.meta["nvflare_rdma"]["tied"] == {"b": "a"}
    dxo.data["b"] = buffer.clone()
    got = decode(dxo)
    assert got["b"] is got["a"]


def test_a_tie_is_encoded_as_its_first_name_says():
    dxo = encode(llama(), policy=[{"role": "head", "quantization_type": "exact"}])
    assert dxo.meta["source_datatype"]["lm_head.weight"] == "float32"
    assert dxo.data["lm_head.weight"].dtype == torch.uint8


@pytest.mark.parametrize(
    "tied", [{"a": "gone"}, {"gone": "a"}, {"a": "b", "b": "a"}, {"a": "a"}, ["a"], {1: "a"}, {"a": ["b"]}, "x"]
)
def test_a_forged_tie_is_refused(tied):
    dxo = encode({"a": torch.randn(99), "b": torch.randn(99)})
    dxo.meta["nvflare_rdma"] = {"tied": tied}
    with pytest.raises(CodecError, match="tied"):
        decode(dxo)


@pytest.mark.parametrize("ours", [["tied"], "x", 7])
def test_forged_metadata_of_ours_is_refused(ours):
    dxo = encode({"a": torch.randn(99)})
    dxo.meta["nvflare_rdma"] = ours
    with pytest.raises(CodecError, match="nvflare_rdma must be a dict"):
        decode(dxo)


def test_a_difference_from_nothing_is_refused():
    dxo = encode({"a": torch.randn(99)})
    dxo.meta["quant_state"]["a"]["delta"] = True
    with pytest.raises(CodecError, match=r"'a'.*isn't here"):
        decode(dxo)
    dxo.meta["nvflare_rdma"] = {"base": "0" * 32}
    with pytest.raises(CodecError, match="digest '0000"):
        decode(dxo)


LORA = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


def adapters(rank=8, hidden=256, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = {}
    for layer in range(2):
        for projection in ("q_proj", "v_proj"):
            a = torch.randn(rank, hidden, generator=generator) / math.sqrt(hidden)
            params[LORA.format(layer, projection, "A")] = a.to(dtype)
            params[LORA.format(layer, projection, "B")] = torch.zeros(hidden, rank, dtype=dtype)
    return params


@pytest.mark.parametrize("policy", [None, []])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
@pytest.mark.parametrize("name", ALONE)
def test_adapters_alone_travel_with_every_codec(name, kind, dtype, policy):
    """B starts as zeros. Constants and zeros are where scales and levels divide by nothing."""
    params = adapters(dtype=dtype)
    dxo = encode(params, name, kind, policy=policy)
    got = decode(dxo)
    for key, sent in params.items():
        assert (got[key].dtype, got[key].shape) == (sent.dtype, sent.shape)
        assert torch.isfinite(got[key]).all()
        assert (got[key].float() - sent.float()).norm() <= 0.6 * sent.float().norm() + 1e-30, key
        if key.endswith("lora_B.weight"):
            assert (got[key] == 0).all(), "an adapter that does nothing must do nothing after the transfer"


@pytest.mark.parametrize("as_torch", [True, False])
def test_a_dict_per_adapter(as_torch):
    given = {"summarize": adapters(), "translate": adapters(rank=16), "steps": torch.tensor(4)}
    if not as_torch:
        given = {
            k: {n: v.numpy() for n, v in d.items()} if isinstance(d, dict) else d.numpy() for k, d in given.items()
        }
    dxo = encode(given, "int8")
    a = LORA.format(0, "q_proj", "A")
    assert dxo.meta["source_datatype"][f"summarize/{a}"] == "float32"
    assert dxo.data["summarize"][a].dtype == (torch.uint8 if as_torch else np.uint8)
    got = decode(dxo)
    assert got.keys() == given.keys()
    for adapter in ("summarize", "translate"):
        assert list(got[adapter]) == list(given[adapter])
        for key, sent in given[adapter].items():
            assert got[adapter][key].shape == sent.shape
            assert np.abs(np.asarray(got[adapter][key]) - np.asarray(sent)).max() < 0.002
    assert given["summarize"][a] is not dxo.data["summarize"][a]


def test_two_params_of_one_name_and_bottomless_dicts_are_refused():
    with pytest.raises(CodecError, match="a/b"):
        encode({"a/b": torch.randn(99), "a": {"b": torch.randn(99)}})
    deep: dict = {"w": torch.randn(99)}
    for _ in range(20):
        deep = {"d": deep}
    with pytest.raises(CodecError, match="nested"):
        encode(deep)


def test_peft_itself():
    peft = pytest.importorskip("peft")  # slow to import
    model = torch.nn.Sequential()
    model.add_module("proj", torch.nn.Linear(256, 256))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["proj"], r=8))
    state = peft.get_peft_model_state_dict(adapted)
    for name in ALONE:
        peft.set_peft_model_state_dict(adapted, decode(encode(dict(state), name, policy=[])))


def test_a_bad_policy_is_refused_when_made():
    with pytest.raises(ConfigError, match="'rol'"):
        ModelQuantizer("int8", policy=[{"rol": "norm", "quantization_type": "exact"}])


@pytest.mark.parametrize("size", [10**12, 2**62])
@pytest.mark.parametrize("name", ["adaquant", "lossless", "int8", "normfloat4_dq"])
def test_a_shape_beyond_the_codes_is_refused_before_memory_is_taken(name, size):
    values = torch.arange(4096.0) if name == "adaquant" else torch.ones(4096)  # a constant has no codes
    dxo = encode({"w": values}, name)
    state = dxo.meta["quant_state"]["w"]
    state["tensor_shape" if name == "adaquant" else "shape"] = [size]
    with pytest.raises(CodecError, match="'w'"):
        decode(dxo)


def test_a_compressed_bomb_is_refused():
    import bz2

    dxo = encode({"w": torch.arange(4096.0)}, "adaquant")
    state = dxo.meta["quant_state"]["w"]
    state["compressed_tensor"] = torch.from_numpy(np.frombuffer(bz2.compress(bytes(50 << 20)), np.uint8).copy())
    state["new_dtype"] = "u1"
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="not the 4096 bytes"):
            decode(dxo)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def test_views_of_one_memory_that_mean_other_values_are_not_tied():
    z = torch.randn(64, 64, dtype=torch.complex64)
    params = {"imag": z.imag, "negative": z.conj().imag, "z": z, "conjugate": z.conj()}
    dxo = encode(params, "int8")
    assert "nvflare_rdma" not in dxo.meta
    got = decode(dxo)
    for name in params:
        assert torch.allclose(got[name], params[name], atol=0.05)
