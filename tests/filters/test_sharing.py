"""One encoding serves all sites that are sent one message, and only those."""

from __future__ import annotations

import copy
import gc
import threading

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, make_copy

from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer, message_encoder


@pytest.fixture
def encodings(monkeypatch):
    """The params of every call that really encodes."""
    calls, encode = [], message_encoder.encode_params
    monkeypatch.setattr(message_encoder, "encode_params", lambda *args: calls.append(args[0]) or encode(*args))
    return calls


def message(params, root="task-1", kind=DataKind.WEIGHTS):
    shareable = DXO(kind, data=params).to_shareable()
    shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, root)
    return shareable


def params(seed=0, as_torch=True):
    arrays = {f"w{i}": np.random.default_rng(seed + i).standard_normal((60, 70)).astype("f4") for i in range(3)}
    return {k: torch.from_numpy(v) for k, v in arrays.items()} if as_torch else arrays


def to_sites(quantizer, task, at, n=3):
    """Each site's message, as FLARE's server makes it: a copy of the Shareable with the DXO's contents shared."""
    ctx = at("server out", quantizer)
    return [from_shareable(quantizer.process(make_copy(task), ctx)) for _ in range(n)]


@pytest.mark.parametrize("as_torch", [True, False])
def test_one_encoding_for_all_sites(encodings, at, as_torch):
    quantizer = ModelQuantizer("int8", one_way=True)
    messages = to_sites(quantizer, message(params(as_torch=as_torch)), at)
    assert len(encodings) == 1
    for key in ("w0", "w2"):
        assert messages[0].data[key] is messages[1].data[key] is messages[2].data[key]
    for part in ("data", "meta"):
        assert getattr(messages[0], part) is not getattr(messages[1], part)
    messages[0].data.clear()
    messages[0].meta["quant_state"].clear()
    assert len(messages[1].data) == len(messages[1].meta["quant_state"]) == 3
    assert len(to_sites(quantizer, message(params()), at, 1)[0].data) == 3


def test_sites_that_ask_at_once_wait_for_one_encoding(encodings, at):
    quantizer, task = ModelQuantizer("int8", one_way=True), message(params())
    ctx = [at("server out", quantizer) for _ in range(8)]
    results = []
    threads = [
        threading.Thread(target=lambda c=c: results.append(from_shareable(quantizer.process(make_copy(task), c))))
        for c in ctx
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(encodings) == 1
    assert len({id(r.data["w1"]) for r in results}) == 1


def test_the_next_task_is_another_message_even_with_the_same_tensors(encodings, at):
    """A controller may have changed its tensors in place."""
    quantizer, model = ModelQuantizer("float16", one_way=True), params(as_torch=False)
    to_sites(quantizer, message(model, "task-1"), at)
    model["w0"][:] = 7
    (second, *_) = to_sites(quantizer, message(model, "task-2"), at)
    assert len(encodings) == 2
    assert (second.data["w0"] == 7).all()


@pytest.mark.parametrize("change", ["value", "name", "more", "less", "nested"])
def test_another_model_under_the_same_id_is_another_message(encodings, at, change):
    quantizer, model = ModelQuantizer("int8", one_way=True), params()
    to_sites(quantizer, message(model), at, 1)
    other = dict(model)
    if change == "value":
        other["w1"] = copy.deepcopy(model["w1"])
    elif change == "name":
        other = {k.replace("w1", "v1"): v for k, v in model.items()}
    elif change == "more":
        other["w9"] = model["w1"]
    elif change == "less":
        del other["w1"]
    else:
        other = {"adapter": model}
    to_sites(quantizer, message(other), at, 1)
    assert len(encodings) == 2


def test_messages_without_an_id_or_from_a_client_are_not_shared(encodings, at):
    quantizer, model = ModelQuantizer("int8", one_way=True), params()
    for _ in range(2):
        quantizer.process(DXO(DataKind.WEIGHTS, data=model).to_shareable(), at("server out", quantizer))
    for _ in range(2):
        quantizer.process(message(model), at("client out", quantizer))
    assert len(encodings) == 4


def test_the_model_is_not_kept_alive_and_its_codes_go_with_it(at):
    quantizer, model = ModelQuantizer("int8", one_way=True), params()
    to_sites(quantizer, message(model), at)
    (shared,) = quantizer._encoder._shared.values()
    assert shared.results
    del model
    gc.collect()
    assert not shared.results


def test_error_feedback_counts_a_broadcast_once(encodings, at):
    quantizer = ModelQuantizer("ternary", one_way=True, error_feedback=True, delta=False)
    a, b, c = to_sites(quantizer, message(params()), at)
    assert a.data["w0"] is b.data["w0"] is c.data["w0"]
    (staged,) = quantizer._encoder.residuals._staged.values()
    arrived = from_shareable(ModelDequantizer().process(b.to_shareable(), FLContext())).data["w0"]
    expected = (params()["w0"] - arrived).bfloat16()
    assert torch.equal(torch.from_numpy(staged["w0"].view(np.int16)).view(torch.bfloat16), expected)
