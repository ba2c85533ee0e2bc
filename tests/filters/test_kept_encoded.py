"""Results that a server's dequantizer leaves encoded: they add up to the same bits as decoded ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

from nvflare_rdma.accumulate import Holdings, is_encoded_tensor, plain
from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, Policy, get_codec, to_array
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.correction import CorrectingEncoder
from nvflare_rdma.filters.decoding import Metadata, decode_params
from nvflare_rdma.filters.delta_base import Base
from nvflare_rdma.filters.encoding import TensorEncoder, encode_params
from nvflare_rdma.filters.quant_filter import flatten
from nvflare_rdma.flare_compat import ACCUMULATE_PROP
from tests.support.waiting_results import on_disk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: A difference in float16 is as large as what it is taken from.
SPLIT = [name for name in CODEC_NAMES if isinstance(get_codec(name), FixedSizeCodec)]


def model(seed=0):
    torch.manual_seed(seed)
    shared = torch.randn(70, 1000)
    tensors = {str(dtype): torch.randn(3, 12_345).to(dtype) for dtype in DTYPES}
    return {**tensors, "tied": {"a": shared, "b": shared}, "array": np.ones((50, 60), np.float32), "steps": 3}


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_what_a_server_keeps_encoded_adds_up_to_the_same(at, name):
    options = {"topk2": {"error_feedback": True}, "topk2_128": {"error_feedback": True}, "exact_delta": {"delta": True}}
    quantizer = ModelQuantizer(name, one_way=True, **options.get(name, {}))
    into, holdings = ModelDequantizer(), Holdings()
    sent = DXO(DataKind.WEIGHT_DIFF, data=model()).to_shareable()
    made = quantizer.process(sent, at("client out", quantizer))
    here = at("server in", into)
    wanted = from_shareable(into.process(made, here)).data
    here.set_prop(ACCUMULATE_PROP, holdings, private=True, sticky=False)
    got = from_shareable(into.process(made, here)).data
    fixed = isinstance(get_codec(name), FixedSizeCodec)
    assert is_encoded_tensor(got["torch.float32"]) == fixed
    assert got["tied"]["a"] is got["tied"]["b"]
    assert type(got["array"]) is np.ndarray
    flat = flatten(got)
    for key, value in flatten(wanted).items():
        sums = [WeightedAggregationHelper(), WeightedAggregationHelper()]
        for each, result in zip(sums, (flat[key], value), strict=True):
            for weight in (3, 0.7):
                each.add({key: result}, weight, "site", 0)
        one, other = (each.get_result()[key] for each in sums)
        close = {} if key in ("torch.float16", "torch.bfloat16", "steps") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(one, other, **close)
        torch.testing.assert_close(plain(flat[key]), value, rtol=0, atol=0)
    here.set_prop(ACCUMULATE_PROP, None, private=True, sticky=False)


def test_at_a_site_all_is_decoded(at):
    quantizer, into = ModelQuantizer("normfloat4", one_way=True), ModelDequantizer()
    made = quantizer.process(DXO(DataKind.WEIGHTS, data=model()).to_shareable(), at("server out", quantizer))
    here = at("client in", into)
    here.set_prop(ACCUMULATE_PROP, Holdings(), private=True, sticky=False)
    assert not any(map(is_encoded_tensor, from_shareable(into.process(made, here)).data.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPLIT)
def test_differences_are_added_to_their_base(name, dtype):
    before = {"w": torch.randn(3, 300_000).to(dtype)}
    after = {"w": before["w"] + 0.01 * torch.randn(3, 300_000).to(dtype)}
    base = Base.of({"w": to_array(before["w"]).reshape(-1)})
    encoder = CorrectingEncoder(before={}, whole=True, base=base, noise=None)
    params = encode_params(after, Policy(name, None), encoder)
    if "w" not in encoder.based:
        pytest.skip("the codec sends values of this dtype whole")
    params.quant_state["w"]["delta"] = True
    metadata = Metadata(params.algorithm, params.quant_state, params.source_datatype)
    wanted = decode_params(params.values, metadata, base).values["w"]
    got = decode_params(params.values, metadata, base, holdings=Holdings()).values["w"]
    assert is_encoded_tensor(got)
    sums = [torch.ones_like(wanted).add_(value, alpha=0.3) for value in (got, wanted)]
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(*sums, **(exact if dtype is torch.float32 else {}))
    assert is_encoded_tensor(got)
    torch.testing.assert_close(got.mul(3), wanted.mul(3), **exact)
    torch.testing.assert_close(plain(got), wanted, **exact)


def test_a_result_that_is_sent_on_is_encoded_anew(at):
    quantizer, into = ModelQuantizer("normfloat4", one_way=True), ModelDequantizer()
    made = quantizer.process(
        DXO(DataKind.WEIGHTS, data={"w": torch.randn(64, 100)}).to_shareable(), at("client out", quantizer)
    )
    here = at("server in", into)
    here.set_prop(ACCUMULATE_PROP, Holdings(), private=True, sticky=False)
    got = into.process(made, here)
    assert is_encoded_tensor(from_shareable(got).data["w"])
    again = from_shareable(quantizer.process(got, at("server out", quantizer)))
    assert again.data["w"].dtype is torch.uint8


@pytest.mark.parametrize("kept", [True, False], ids=["kept encoded", "decoded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_codes_and_scales_that_waited_on_disk_stand_for_the_same(at, name, dtype, kept):
    """A transfer takes codes of 16 bits, and scales, for results as any other."""
    holdings = Holdings()
    sent = {"w": torch.randn(3, 12_345).to(dtype), "exact": torch.tensor([float("nan"), 1.0], dtype=dtype)}
    params = encode_params(sent, Policy(name), TensorEncoder())
    meta = {
        MetaKey.PROCESSED_ALGORITHM: params.algorithm,
        "quant_state": params.quant_state,
        "source_datatype": params.source_datatype,
        "quantized_flag": True,
    }
    into = ModelDequantizer()
    here = at("server in", into)
    wanted = from_shareable(into.process(DXO(DataKind.WEIGHTS, params.values, meta).to_shareable(), here)).data
    here.set_prop(ACCUMULATE_PROP, holdings if kept else None, private=True, sticky=False)
    waiting = {**meta, "quant_state": on_disk(params.quant_state, holdings)}
    came = DXO(DataKind.WEIGHTS, on_disk(params.values, holdings), waiting).to_shareable()
    got = from_shareable(into.process(came, here)).data
    for key, value in wanted.items():
        assert got[key].dtype is dtype
        torch.testing.assert_close(plain(got[key]), value, rtol=0, atol=0, equal_nan=True)


def test_what_flares_quantizer_left_alone_keeps_waiting(at):
    into, holdings = ModelDequantizer(), Holdings()
    here = at("server in", into)
    meta = {
        MetaKey.PROCESSED_ALGORITHM: "adaquant",
        "quant_state": {"w": {}},
        "source_datatype": {"w": "float32"},
        "quantized_flag": True,
    }
    came = DXO(DataKind.WEIGHTS, {"w": on_disk(torch.randn(64, 100), holdings)}, meta).to_shareable()
    got = from_shareable(into.process(came, here)).data["w"]
    assert is_encoded_tensor(got)
    assert holdings.on_disk == 64 * 100 * 4


def test_a_result_that_waits_is_quantized_apart_from_any_message(fl_ctx):
    values = {"w": torch.randn(64, 100)}
    quantizer = ModelQuantizer("normfloat4")
    wanted = quantizer.quantization(values, fl_ctx)
    got = quantizer.quantization(on_disk(values), fl_ctx)
    torch.testing.assert_close(got[0]["w"], wanted[0]["w"], rtol=0, atol=0)


def test_metadata_that_waits_is_told_of(at, warnings_logged):
    quantizer = ModelQuantizer("normfloat4", one_way=True)
    meta = {"control": on_disk({"w": torch.zeros(1024, 1024)})}
    quantizer.process(
        DXO(DataKind.WEIGHTS, {"w": torch.ones(64, 100)}, meta).to_shareable(), at("server out", quantizer)
    )
    assert "4.00 MB of tensors in the message's metadata (control) travel exact" in "".join(warnings_logged)
