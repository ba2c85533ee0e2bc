"""Tied tensors of a model are one tensor again after they have been aggregated apart."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from nvflare_rdma.accumulate import plain
from nvflare_rdma.codecs import same_bits
from nvflare_rdma.streaming.ties import Ties
from tests.support.waiting_results import on_disk


def model(kind):
    embedding = kind(12).reshape(3, 4)
    return {"embed": embedding, "bias": kind(4), "other": kind(4), "head": embedding[:]}


def floats(n):
    return torch.arange(n, dtype=torch.float32)


def arrays(n):
    return np.arange(n, dtype=np.float32)


def copied(values):
    return {name: value * 1 for name, value in values.items()}


def fire(ties, event, prop, thing):
    context = FLContext()
    context.set_prop(prop, thing)
    ties.handle_event(event, context)


@pytest.fixture(params=[floats, arrays], ids=["torch", "numpy"])
def kind(request):
    return request.param


@pytest.fixture
def ties(kind, caplog):
    made = Ties()
    with caplog.at_level(logging.INFO, "nvflare_rdma"):
        fire(made, AppEventType.INITIAL_MODEL_LOADED, AppConstants.GLOBAL_MODEL, make_model_learnable(model(kind), {}))
    assert "embed and head are one tensor of the model" in caplog.text
    return made


def test_what_an_aggregator_has_added_apart_is_tied(ties, kind):
    result = FLModel(params=copied(model(kind)))
    fire(ties, AppEventType.AFTER_AGGREGATION, AppConstants.AGGREGATION_RESULT, result)
    assert result.params["head"] is result.params["embed"]
    assert result.params["bias"] is not result.params["other"]  # equal, but two tensors of the model
    assert list(result.params) == list(model(kind))


@pytest.mark.parametrize("data_kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
@pytest.mark.parametrize(
    ("event", "prop"),
    [
        (AppEventType.AFTER_AGGREGATION, AppConstants.AGGREGATION_RESULT),
        (EventType.BEFORE_TASK_DATA_FILTER, FLContextKey.TASK_DATA),
    ],
)
def test_so_it_is_in_flares_messages(data_kind, event, prop, ties, kind):
    message = DXO(data_kind, data=copied(model(kind))).to_shareable()
    fire(ties, event, prop, message)
    data = from_shareable(message).data
    assert data["head"] is data["embed"]


def test_a_result_that_is_sent_on_while_it_waits_is_tied(ties):
    one = {"embed": torch.ones(3, 5), "head": torch.ones(3, 5)}
    waiting = on_disk(one)
    ties.tie(waiting)
    assert plain(waiting["embed"]) is waiting["head"]


def test_what_has_become_different_stays_so(ties, kind):
    for change in (lambda x: x[0].__setitem__(0, 7.0), lambda x: x[0].__setitem__(0, -0.0)):
        params = copied(model(kind))
        change(params["head"])
        ties.tie(params)
        assert params["head"] is not params["embed"]


def test_a_part_of_the_model_is_left_as_it_is(ties, kind):
    for params in ({"head": kind(12)}, {"embed": kind(12)}, {"head": kind(12), "embed": kind(3)}, {"head": "x"}, {}):
        before = dict(params)
        ties.tie(params)
        assert params.keys() == before.keys()
        assert all(params[name] is before[name] for name in params)


@pytest.mark.parametrize(
    "thing", [None, Shareable(), FLModel(metrics={"loss": 1.0}), DXO("STATISTICS", {"a": 1}).to_shareable()]
)
def test_what_is_no_model_is_left_alone(thing, ties):
    fire(ties, AppEventType.AFTER_AGGREGATION, AppConstants.AGGREGATION_RESULT, thing)
    fire(ties, EventType.BEFORE_TASK_DATA_FILTER, FLContextKey.TASK_DATA, thing)
    fire(Ties(), AppEventType.INITIAL_MODEL_LOADED, AppConstants.GLOBAL_MODEL, thing)


@given(st.binary(min_size=8, max_size=64).map(lambda raw: raw[: len(raw) // 4 * 4]), st.integers(0, 1 << 20))
def test_bits_are_compared_and_not_values(raw, where):
    one = np.frombuffer(raw, np.float32)
    assert same_bits(one, one.copy())
    assert same_bits(torch.from_numpy(one.copy()), torch.from_numpy(one.copy()))
    changed = bytearray(raw)
    changed[where % len(raw)] ^= 1 << where % 8
    assert not same_bits(one, np.frombuffer(changed, np.float32))
    assert not same_bits(one, torch.from_numpy(one.copy()))
    assert not same_bits(one, one.reshape(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_runs_of_a_large_tensor_are_compared(dtype):
    one = torch.zeros((1 << 20) + 5, dtype=dtype)
    other = one.clone()
    assert same_bits(one, other)
    other[-1] = 1
    assert not same_bits(one, other)
    assert same_bits(one[::2], one[::2].clone())
