"""What a site sends to another one is marked, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.codecs.marks import codec_of
from nvflare_rdma.filters import PeerQuantizer
from nvflare_rdma.flare_compat import TRANSFER_PROP


def model():
    tied = torch.randn(200, 300)
    return {
        "w": torch.randn(200, 300),
        "array": np.ones((50, 60), np.float32),
        "tied": {"a": tied, "b": tied},
        "steps": torch.tensor(3),
        "sparse": torch.eye(70).to_sparse(),
        "name": "x",
    }


def send(component, task, origin="SwarmClientController", transfer=True):
    """Fire FLARE's event as its controller does when a task is sent, or its runner when one has come."""
    ctx = FLContext()
    ctx.set_prop(FLContextKey.RUNNER, SimpleNamespace(name="ClientRunner"), private=True, sticky=False)
    ctx.set_prop(FLContextKey.EVENT_ORIGIN, origin, private=True, sticky=False)
    ctx.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
    if transfer:
        ctx.set_prop(TRANSFER_PROP, True, private=False, sticky=True)
    component.handle_event(EventType.BEFORE_TASK_DATA_FILTER, ctx)


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_the_message_itself_has_marked_views_and_what_it_was_made_of_has_not(kind):
    params = model()
    task = DXO(kind, data=params, meta={"round": 1}).to_shareable()
    send(PeerQuantizer("normfloat4"), task)
    made = from_shareable(task)
    assert (made.data_kind, made.meta["round"]) == (kind, 1)
    for got, sent in ((made.data["w"], params["w"]), (made.data["array"], params["array"])):
        assert codec_of(got).name == "normfloat4"
        assert codec_of(sent) is None
        assert np.shares_memory(np.asarray(got), np.asarray(sent))
    assert made.data["tied"]["a"] is made.data["tied"]["b"]
    assert all(made.data[name] is params[name] for name in ("steps", "sparse", "name"))


@pytest.mark.parametrize(
    ("task", "how"),
    [
        (DXO(DataKind.METRICS, data={"accuracy": 1.0}).to_shareable(), {}),
        (Shareable({"result": {"weights": torch.ones(100, 100)}}), {}),
        (DXO(DataKind.WEIGHTS, data=model()).to_shareable(), {"origin": "ClientRunner"}),
        (DXO(DataKind.WEIGHTS, data=model()).to_shareable(), {"transfer": False}),
        (None, {}),
    ],
    ids=["no weights", "a final model", "a task that has come", "without RdmaTransfer", "nothing"],
)
def test_all_else_stays_as_it_is(task, how, warnings_logged):
    before = dict(task or {})
    component = PeerQuantizer("normfloat4")
    for _ in range(2):
        send(component, task, **how)
    assert all(task[key] is before[key] for key in before)
    said = [line for line in warnings_logged if "PeerQuantizer needs RdmaTransfer in the same job" in line]
    assert len(said) == ("transfer" in how)


def test_the_policy_counts():
    task = DXO(DataKind.WEIGHTS, data=model()).to_shareable()
    send(PeerQuantizer("normfloat4", policy=[{"name": "w", "quantization_type": "int8"}]), task)
    made = from_shareable(task).data
    assert codec_of(made["w"]).name == "int8"
    assert codec_of(made["array"]).name == "normfloat4"


@pytest.mark.parametrize("idle", [True, False])
def test_a_run_without_a_model_is_said_at_its_end(idle, warnings_logged):
    component = PeerQuantizer("float16")
    component.handle_event(EventType.START_RUN, FLContext())
    if not idle:
        send(component, DXO(DataKind.WEIGHTS, data=model()).to_shareable())
    for _ in range(2):
        component.handle_event(EventType.END_RUN, FLContext())
    assert sum("had no model in this run" in line for line in warnings_logged) == idle
