"""Policies: roles, rules in order, the defaults behind them, and what is exact whatever the rules say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, get_codec
from nvflare_rdma.codecs.policy import EXACT_BELOW, ROLES, Policy, role_of
from nvflare_rdma.errors import ConfigError

MATRIX = (64, 64)


def decide(policy, name, dtype="float32", shape=MATRIX):
    decision = policy.decide(name, dtype, shape)
    return decision.codec.name if decision.codec else "exact"


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.layers.0.input_layernorm.weight", (2048,), "norm"),
        ("transformer.h.0.ln_1.weight", (768,), "norm"),
        ("ln_f.weight", (768,), "norm"),
        ("layer1.0.bn2.weight", (64,), "norm"),
        ("layer1.0.bn2.running_var", (64,), "norm"),
        ("layer1.0.downsample.1.weight", (64,), "norm"),
        ("encoder.layers.3.norm1.weight", (512,), "norm"),
        ("LayerNorm.weight", (512,), "norm"),
        ("BatchNorm_0/scale", (512,), "norm"),
        ("normalizer.proj.weight", MATRIX, "other"),
        ("fc.bias", (10,), "bias"),
        ("bn1.bias", (10,), "bias"),
        ("lstm.bias_ih_l0", (400,), "bias"),
        ("attn.in_proj_bias", (400,), "bias"),
        ("relative_attention_bias.weight", (32, 8), "other"),
        ("model.embed_tokens.weight", (1000, 64), "embedding"),
        ("transformer.wte.weight", (1000, 64), "embedding"),
        ("pos_embed", (1, 196, 768), "embedding"),
        ("lm_head.weight", (1000, 64), "head"),
        ("classifier.weight", (10, 64), "head"),
        ("q_proj.lora_A.default.weight", (8, 64), "other"),
        ("head.proj.weight", MATRIX, "head"),
        ("logit_scale", (), "other"),
        ("conv1.weight", (64, 3, 7, 7), "other"),
    ],
)
def test_roles_of_names_in_use(name, shape, role):
    assert role in ROLES
    assert role_of(name, shape) == role


def test_the_first_rule_that_fits_decides():
    policy = Policy(
        "normfloat4",
        [
            {"name": "*.q_proj.*", "quantization_type": "INT8"},
            {"name": "*_proj.*", "quantization_type": "float16"},
            {"name": "*.q_proj.*", "quantization_type": "exact"},
        ],
    )
    assert decide(policy, "a.q_proj.weight") == "int8"
    assert decide(policy, "a.k_proj.weight") == "float16"
    assert decide(policy, "a.mlp.weight") == "normfloat4"


def test_all_conditions_of_a_rule_must_hold():
    rule = {"name": "a.*", "dtype": "float32", "role": "head", "min_elements": 2000, "max_elements": 5000}
    policy = Policy("normfloat4", [{**rule, "quantization_type": "int8"}])
    assert decide(policy, "a.head.weight") == "int8"
    assert decide(policy, "b.head.weight") == "normfloat4"
    assert decide(policy, "a.head.weight", "float16") == "normfloat4"
    assert decide(policy, "a.body.weight") == "normfloat4"
    for n, expected in ((1999, "normfloat4"), (2000, "int8"), (5000, "int8"), (5001, "normfloat4")):
        assert decide(policy, "a.head.weight", shape=(1, n)) == expected


def test_the_default_rules_come_last():
    defaults = Policy("normfloat4", [])
    for name in ("ln.weight", "x.bias"):
        assert decide(defaults, name, shape=(4096,)) == "exact"
        assert decide(Policy("normfloat4"), name, shape=(4096,)) == "normfloat4"
    assert decide(defaults, "w", shape=(1, EXACT_BELOW - 1)) == "exact"
    assert decide(defaults, "w", shape=(1, EXACT_BELOW)) == "normfloat4"
    assert decide(Policy("normfloat4"), "w", shape=(1, EXACT_BELOW - 1)) == "normfloat4"
    everything = Policy("normfloat4", [{"quantization_type": "normfloat4"}])
    assert decide(everything, "ln.weight", shape=(99,)) == "normfloat4"
    norms = Policy("normfloat4", [{"role": "norm", "quantization_type": "bfloat16"}])
    assert decide(norms, "ln.weight", shape=(99,)) == "bfloat16"


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool", "float64", "complex64", "float8_e4m3fn"])
def test_other_dtypes_are_exact_whatever_the_rules_say(dtype):
    assert decide(Policy("int8", [{"quantization_type": "int8"}]), "w", dtype) == "exact"


def test_what_would_not_get_smaller_is_exact():
    assert decide(Policy("float16"), "w", "bfloat16") == "exact"
    assert decide(Policy("bfloat16"), "w", "float16") == "exact"
    assert decide(Policy("int8"), "w", "float32", (1,)) == "exact"
    assert decide(Policy("int8"), "w", "float32", (0, 5)) == "exact"
    assert decide(Policy("float16"), "w", "float32", ()) == "float16"


@settings(deadline=None)
@given(
    st.sampled_from(CODEC_NAMES),
    st.sampled_from(["float32", "float16", "bfloat16", "int32"]),
    st.lists(st.integers(0, 60), max_size=3),
    st.text(max_size=20),
    st.booleans(),
)
def test_whatever_is_encoded_is_a_float_and_gets_smaller(name, dtype, shape, tensor, careful):
    decision = Policy(name, [] if careful else None).decide(tensor, dtype, shape)
    assert decision.reason
    n = math.prod(shape)
    if decision.codec is None:
        return
    assert decision.codec is get_codec(name)
    assert dtype != "int32"
    assert n >= (EXACT_BELOW if careful else 1)
    if isinstance(decision.codec, FixedSizeCodec):
        assert decision.codec.encoded_nbytes(n) < n * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"role": "norms", "quantization_type": "exact"}], "role must be one of: norm, bias, embedding"),
        ([{"dtype": "int8", "quantization_type": "exact"}], "dtype must be one of: float32"),
        ([{"pattern": "*", "quantization_type": "exact"}], "unknown key 'pattern'; allowed: quantization_type, name"),
        ([{"name": "*"}], "has no quantization_type"),
        ([{"quantization_type": "int3"}], "'int3' is unknown"),
        ([{"quantization_type": None}], "must be of type str"),
        ([{"min_elements": "5", "quantization_type": "exact"}], "min_elements must be of type int, not '5'"),
        ([{"min_elements": True, "quantization_type": "exact"}], "min_elements must be of type int"),
        (["exact"], "'exact' is not a dict"),
        ("exact", "must be a list of rules"),
        ({"quantization_type": "exact"}, "must be a list of rules"),
        (5, "must be a list of rules"),
    ],
)
def test_bad_rules_are_refused_and_named(rules, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        Policy("int8", rules)


def test_a_decision_says_why():
    rules = [{"name": "lm_*", "min_elements": 10, "quantization_type": "int8"}]
    decision = Policy("normfloat4", rules).decide("lm_head.weight", "float32", MATRIX)
    assert decision.reason == "name lm_*, min_elements 10"
    assert Policy("normfloat4").decide("x", "float32", MATRIX).reason == "everything else"


def test_another_type_leaves_the_rules():
    rule = {"role": "embedding", "quantization_type": "int8"}
    policy = Policy("float16", [rule]).with_type("normfloat4")
    assert decide(policy, "embed.weight") == "int8"
    assert decide(policy, "norm.weight", shape=(4096,)) == "exact"
    assert decide(policy, "q_proj.weight") == "normfloat4"
    assert policy.codec.name == "normfloat4"
    with pytest.raises(ConfigError, match="int3"):
        policy.with_type("int3")
