"""With `RdmaTransfer` on both sides tensors are marked, not encoded; what the receiver then gets is left as it is."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, make_copy
from nvflare.app_opt.tensor_stream.client import TensorClientStreamer
from nvflare.app_opt.tensor_stream.server import TensorServerStreamer

from nvflare_rdma.codecs.marks import codec_of, note_decoded
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.flare_compat import TRANSFER_PROP
from tests.support.flares_filters import flares_dequantizer


def model() -> dict:
    shared = torch.randn(200, 300)
    return {
        "w": torch.randn(200, 300),
        "tied": {"a": shared, "b": shared},
        "half": torch.randn(100, 100).half(),
        "array": np.ones((50, 60), np.float32),
        "steps": torch.tensor(3),
    }


def contexts(at, quantizer, here=True, there=True, point="server out") -> FLContext:
    ctx, peer = at(point, quantizer), FLContext()
    for side, present in ((ctx, here), (peer, there)):
        if present:
            side.set_prop(TRANSFER_PROP, True, private=False, sticky=True)
    ctx.set_peer_context(peer)
    return ctx


def message(params) -> object:
    shareable = DXO(DataKind.WEIGHTS, data=params).to_shareable()
    shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, "task-1")
    return shareable


@pytest.mark.parametrize("point", ["server out", "client out"])
def test_tensors_are_marked_and_share_their_memory(at, point):
    quantizer, params = ModelQuantizer("normfloat4", one_way=True), model()
    made = from_shareable(quantizer.process(message(params), contexts(at, quantizer, point=point)))
    for got, sent in ((made.data["w"], params["w"]), (made.data["array"], params["array"])):
        assert codec_of(got).name == "normfloat4"
        assert codec_of(sent) is None
        assert np.shares_memory(np.asarray(got), np.asarray(sent))
    assert made.data["tied"]["a"] is made.data["tied"]["b"]
    assert made.data["steps"] is params["steps"]
    assert made.meta[MetaKey.PROCESSED_ALGORITHM] == "normfloat4"


@pytest.mark.parametrize("dequantizer", [ModelDequantizer, flares_dequantizer])
def test_a_dequantizer_finds_it_done(at, dequantizer):
    quantizer, params = ModelQuantizer("normfloat4", one_way=True), model()
    del params["tied"]  # FLARE's takes no dicts
    made = quantizer.process(message(params), contexts(at, quantizer))
    into = dequantizer()
    got = from_shareable(into.process(made, at("client in", into)))
    for name, sent in params.items():
        assert np.array_equal(np.asarray(got.data[name]), np.asarray(sent)), name
    assert "quant_state" not in (got.meta or {})


def test_a_dequantizer_that_finds_it_done_does_not_say_that_nothing_came(at, caplog):
    caplog.set_level(logging.INFO)
    quantizer, into = ModelQuantizer("normfloat4", one_way=True), ModelDequantizer()
    made = quantizer.process(message({"w": torch.randn(200, 300)}), contexts(at, quantizer))
    into.process(made, at("client in", into))
    (line,) = [line for line in caplog.messages if "Dequantized from normfloat4" in line]
    assert "1 params were to be encoded on their way" in line
    assert "0/1" not in line
    assert "0.00 MB" not in line


@pytest.mark.parametrize(
    ("here", "there", "kinds"),
    [
        (True, False, {}),
        (False, True, {}),
        (True, True, {"error_feedback": True, "delta": True}),
        (True, True, {"quantization_type": "lossless"}),
        (True, True, {"quantization_type": "int8", "stochastic_rounding": True}),
    ],
)
def test_all_else_is_encoded_at_once(at, here, there, kinds):
    quantizer = ModelQuantizer(**{"quantization_type": "normfloat4", "one_way": True, **kinds})
    made = from_shareable(quantizer.process(message(model()), contexts(at, quantizer, here, there)))
    assert codec_of(made.data["w"]) is None
    assert made.meta["quant_state"]["w"]


def test_all_sites_get_the_same_views_and_one_without_transfer_gets_codes(at):
    quantizer, task = ModelQuantizer("normfloat4", one_way=True), message(model())
    first, second = (
        from_shareable(quantizer.process(make_copy(task), contexts(at, quantizer))).data["w"] for _ in range(2)
    )
    assert first is second
    plain = from_shareable(quantizer.process(make_copy(task), contexts(at, quantizer, there=False)))
    assert plain.data["w"].dtype == torch.uint8


def test_a_mixed_policy_marks_what_can_be_cut_and_encodes_the_rest(at):
    policy = [{"name": "half", "quantization_type": "lossless"}]
    quantizer, params = ModelQuantizer("normfloat4", one_way=True, policy=policy), model()
    made = quantizer.process(message(params), contexts(at, quantizer))
    data = from_shareable(made).data
    assert codec_of(data["w"]).name == "normfloat4"
    assert data["half"].dtype == torch.uint8
    into = ModelDequantizer()
    got = from_shareable(into.process(made, at("client in", into))).data
    assert torch.equal(got["half"], params["half"])
    assert torch.equal(got["w"], params["w"])


@pytest.mark.parametrize("as_torch", [True, False])
def test_a_model_is_not_kept_alive_by_its_marks(at, as_torch):
    values = np.ones((200, 300), np.float32)
    quantizer, params = (
        ModelQuantizer("normfloat4", one_way=True),
        {"w": torch.from_numpy(values) if as_torch else values},
    )
    alive = weakref.ref(params["w"])
    made = quantizer.process(message(params), contexts(at, quantizer))
    del params, values, made
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("point", ["server out", "client out"])
@pytest.mark.parametrize("streams", [True, False])
def test_what_flare_streams_is_encoded_at_once(at, point, streams):
    """FLARE's streamers save the tensors of a task as they leave the filters: marks are nothing to them."""
    task = "train" if streams else "validate"
    made = TensorServerStreamer(tasks=[task]) if point == "server out" else TensorClientStreamer(tasks=[task])
    components = {"other": ModelDequantizer(), "streamer": made}
    quantizer = ModelQuantizer("normfloat4", one_way=True)
    ctx = contexts(at, quantizer, point=point)
    on_client = SimpleNamespace(get_all_components=lambda: components)
    on_server = SimpleNamespace(run_manager=SimpleNamespace(components=components))
    ctx.get_engine = lambda *args, **kwargs: on_server if point == "server out" else on_client
    sent = from_shareable(quantizer.process(message(model()), ctx)).data["w"]
    assert (codec_of(sent) is None) == (sent.dtype == torch.uint8) == streams


@pytest.mark.parametrize("came", [True, False, None])
def test_the_log_says_decoded_of_what_was_decoded(at, came, caplog):
    quantizer, params = ModelQuantizer("normfloat4", one_way=True), model()
    made = quantizer.process(message(params), contexts(at, quantizer))
    if came:
        note_decoded(from_shareable(made).data["w"])
    if came is None:  # in files, as with FLARE's disk offload
        dxo = from_shareable(made)
        dxo.data = {"w": "in a file"}
        dxo.meta["source_datatype"] = {"w": "bool"}
        dxo.meta["nvflare_rdma"] = {"on_the_way": 5}
        made = dxo.to_shareable()
    into = ModelDequantizer()
    with caplog.at_level(logging.INFO):
        into.process(made, at("client in", into))
    line = next(text for text in caplog.messages if "Dequantized from" in text)
    assert ("1 of 4 params that were to be encoded on their way came so, and are decoded already" in line) == bool(came)
    assert ("4 params were to be encoded on their way, but nothing here has decoded any" in line) == (came is False)
    assert ("5 params were to be encoded on their way. " in line) == (came is None)


def test_a_message_with_what_is_no_plain_tensor_is_encoded_at_once(at):
    quantizer = ModelQuantizer("normfloat4", one_way=True)
    params = {"w": torch.randn(200, 300), "names": np.array(["a", "b"])}
    made = from_shareable(quantizer.process(message(params), contexts(at, quantizer)))
    assert made.data["w"].dtype == torch.uint8
