"""`max_relative_error`: no receiver gets a tensor that has lost more, whichever way it goes."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import make_copy

from nvflare_rdma.codecs import codec_of, codes_in
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer, PeerQuantizer
from nvflare_rdma.flare_compat import TRANSFER_PROP

TYPES = ["ternary", "int2", "float4", "normfloat4", "normfloat4_dq", "normfloat4_e4m3", "int8", "blockwise8", "float16"]


def quantizer(kind="normfloat4", limit=0.05, **options):
    return ModelQuantizer(kind, one_way=True, max_relative_error=limit, **options)


def sent(q, ctx, params, kind=DataKind.WEIGHT_DIFF):
    return q.process(DXO(kind, data=params).to_shareable(), ctx)


def arrived(encoded):
    return from_shareable(ModelDequantizer().process(make_copy(encoded), FLContext())).data


def relative(x, y):
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    return math.sqrt(((x - y) ** 2).sum() / (x**2).sum()) if x.any() else float((x != y).any())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(TYPES),
    st.floats(1e-4, 1),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(1, 90_000),
    st.floats(0, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_limit_holds_for_what_arrives(at, kind, limit, dtype, n, tail, feedback, seed):
    """`tail` makes some values larger than the rest, which takes the bits from these."""
    w = (normal(n, seed=seed) * torch.exp(tail * normal(n, seed=seed + 1))).clamp(-6e4, 6e4).to(dtype)
    q = quantizer(kind, limit, error_feedback=feedback)
    made = sent(q, at("client out", q), {"w": w})
    assert relative(w, arrived(made)["w"]) <= limit * (1 + 1e-9)
    codes = codes_in(from_shareable(made).data["w"])
    assert (codes is None) == (from_shareable(made).data["w"] is w)
    if codes is not None:
        assert codes.error.value == pytest.approx(relative(w, arrived(made)["w"]), rel=1e-6)
        assert not codes.error.estimated


def test_without_a_limit_codes_say_what_they_lose(at):
    q = ModelQuantizer("normfloat4", one_way=True)
    small, large = normal(200, 100), normal(400, 500)
    made = sent(q, at("client out", q), {"small": small, "large": large})
    got, data = arrived(made), from_shareable(made).data
    assert codes_in(data["small"]).error.value == pytest.approx(relative(small, got["small"]), rel=1e-6)
    assert not codes_in(data["small"]).error.estimated
    assert codes_in(data["large"]).error.value == pytest.approx(relative(large, got["large"]), rel=0.05)
    assert codes_in(data["large"]).error.estimated


def test_what_a_sample_does_not_show_is_measured(at):
    """Values between the runs of the sample that are larger than the rest."""
    w = normal(400_000)
    w[5000:6000] *= 3000  # the rest of their blocks becomes zeros
    q = quantizer("int8", 1e-3)
    got = arrived(sent(q, at("client out", q), {"w": w}))["w"]
    assert relative(w, got) <= 1e-3


@pytest.mark.parametrize("side", ["client out", "server out"])
def test_the_next_better_type_is_named_once(at, caplog, side):
    caplog.set_level(logging.INFO)
    q = quantizer()
    for _ in range(3):
        made = sent(q, at(side, q), {"wide": normal(100, 100), "flat": torch.ones(100, 100)})
    state = from_shareable(made).meta["quant_state"]
    assert (state["wide"]["codec"], state["flat"]["codec"]) == ("blockwise8", "normfloat4")
    (line,) = [text for text in caplog.messages if "travel in a better type" in text]
    assert "1 tensor(s)" in line
    assert "max_relative_error=0.05" in line
    assert "wide: blockwise8, as normfloat4 would lose 0.09" in line
    assert all("Largest relative error: 0.0" in text for text in caplog.messages if "Quantized to" in text)


def test_what_no_type_carries_well_enough_travels_exact(at, caplog):
    caplog.set_level(logging.INFO)
    q, w = quantizer(limit=1e-6), normal(100, 100)
    made = from_shareable(sent(q, at("client out", q), {"w": w}))
    assert made.data["w"] is w
    assert any("w: exact, as normfloat4 would lose 0.09" in text for text in caplog.messages)


def test_with_delta_the_limit_is_for_the_model_and_not_for_the_difference(at):
    """4 bits of a small difference are far more exact than 4 bits of the model."""
    server, site = quantizer(delta=True), FLContext()
    ctx = at("server out", server)
    w, step = normal(100, 100), normal(100, 100, seed=1) * 1e-3
    first = sent(server, ctx, {"w": w}, DataKind.WEIGHTS)
    meta = from_shareable(first).meta
    assert relative(w, arrived(first)["w"]) <= 0.05
    site.set_prop("nvflare_rdma.held", {"train": meta["nvflare_rdma"]["leaves"]}, private=False)
    ctx.set_peer_context(site)
    second = from_shareable(sent(server, ctx, {"w": w + step}, DataKind.WEIGHTS))
    assert second.meta["quant_state"]["w"]["delta"]
    assert codes_in(second.data["w"]).codec == "normfloat4"
    assert codes_in(second.data["w"]).error.value < 0.01


def test_a_codec_that_was_tried_leaves_nothing_behind(at):
    """The residual is that of the type that was sent."""
    q, w = quantizer("int2", error_feedback=True), normal(100, 100)
    ctx = at("client out", q)
    made = sent(q, ctx, {"w": w})
    lacks = q._encoder.residuals._staged["train"]["w"]
    left = torch.from_numpy(lacks.view(np.int16)).view(torch.bfloat16).float()
    torch.testing.assert_close(left, w - torch.as_tensor(arrived(made)["w"]), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize(
    "values",
    [torch.zeros(50, 50), torch.full((50, 50), 1e-41), torch.full((50, 50), math.inf), torch.full((50, 50), math.nan)],
)
@pytest.mark.parametrize("direct", [False, True])
def test_zeros_denormals_infinities_and_nan_arrive(at, values, direct, warnings_logged):
    q = quantizer("normfloat4", 0.05)
    ctx = at("client out", q)
    if direct:
        transferring(ctx)
    made = sent(q, ctx, {"w": values})
    if not direct or codec_of(from_shareable(made).data["w"]) is None:
        got = torch.as_tensor(arrived(made)["w"])
        torch.testing.assert_close(got, values, rtol=0.05, atol=0, equal_nan=True)


def transferring(ctx):
    peer = FLContext()
    for side in (ctx, peer):
        side.set_prop(TRANSFER_PROP, True, private=False, sticky=True)
    ctx.set_peer_context(peer)


def test_marked_tensors_have_the_type_that_a_sample_allows(at, caplog):
    caplog.set_level(logging.INFO)
    q = quantizer(limit=0.05)
    ctx = at("client out", q)
    transferring(ctx)
    data = from_shareable(sent(q, ctx, {"wide": normal(400, 500), "flat": torch.ones(100, 100)})).data
    assert codec_of(data["wide"]).name == "blockwise8"
    assert codec_of(data["flat"]).name == "normfloat4"
    assert any("(estimated from a sample)" in text for text in caplog.messages if "Quantized to" in text)


def test_between_sites_the_limit_holds_too():
    component = PeerQuantizer("normfloat4", max_relative_error=0.05)
    data = component._marker.process_values({"w": normal(100, 100)}, DXO(DataKind.WEIGHTS, data={}), None, FLContext())[
        0
    ]
    assert codec_of(data["w"]).name == "blockwise8"


@pytest.mark.parametrize("make", [ModelQuantizer, PeerQuantizer])
@pytest.mark.parametrize("limit", ["0.05", True, -0.1, 0, 0.0, 1.5, math.nan, math.inf, [0.1]])
def test_a_limit_that_is_none_is_refused(make, limit):
    with pytest.raises(
        ConfigError, match=r"max_relative_error must be a number above 0 and up to 1, such as 0\.05, but"
    ):
        make("normfloat4", max_relative_error=limit)


@pytest.mark.parametrize(("kind", "options"), [("lossless", {}), ("exact_delta", {"delta": True})])
def test_a_limit_is_refused_where_nothing_is_lost(kind, options):
    with pytest.raises(ConfigError, match=rf"has no effect with {kind}, which loses nothing"):
        ModelQuantizer(kind, max_relative_error=0.1, **options)


def test_a_policy_may_have_both():
    rules = [{"role": "embedding", "quantization_type": "lossless"}]
    assert ModelQuantizer("normfloat4", policy=rules, max_relative_error=0.1).max_relative_error == 0.1
