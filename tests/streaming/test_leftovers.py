"""A server holds no model that is not the global one any more, and a persistor's module stays what it is."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from nvflare.apis.fl_context import FLContextManager
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from nvflare_rdma.accumulate import DiskRoom
from nvflare_rdma.streaming.leftovers import Leftovers, put_on_disk


class Model(torch.nn.Module):
    """Two layers of one weight, one of 16 bits, one that is small, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(700, 500)
        self.head = torch.nn.Linear(500, 700)
        self.head.weight = self.embedding.weight
        self.narrow = torch.nn.Linear(1000, 600).half()
        self.register_buffer("mean", torch.randn(1000, 1000))


def manager(module):
    engine = types.SimpleNamespace(
        get_component=lambda name: types.SimpleNamespace(model=module) if name == "persistor" else None
    )
    return FLContextManager(engine, "server", "job-1", {}, {})


def mapped_bytes():
    """Bytes of this process's memory that are files without a name."""
    with open("/proc/self/smaps") as file:
        lines = file.read().split("\n")
    sizes = [
        lines[i + 1].split()[1] for i, line in enumerate(lines) if "nvflare_results" in line or "(deleted)" in line
    ]
    return sum(map(int, sizes)) * 1024


def test_a_context_that_is_there_for_long_holds_no_model_that_is_not_the_global_one():
    contexts = manager(None)
    leftovers, workflow = Leftovers(DiskRoom()), contexts.new_context()
    first = make_model_learnable({"w": torch.zeros(10)}, {})
    old = weakref.ref(first["weights"]["w"])
    workflow.set_prop(AppConstants.GLOBAL_MODEL, first, private=True, sticky=True)
    leftovers.handle_event(AppEventType.INITIAL_MODEL_LOADED, workflow)
    request = contexts.new_context()
    second = make_model_learnable({"w": torch.ones(10)}, {})
    request.set_prop(AppConstants.GLOBAL_MODEL, second, private=True, sticky=True)
    del first
    assert old() is not None  # FLARE's context of the workflow has it still
    leftovers.handle_event(AppEventType.AFTER_SHAREABLE_TO_LEARNABLE, request)
    assert old() is None
    assert workflow.get_prop(AppConstants.GLOBAL_MODEL) is second


def test_a_module_on_disk_has_its_values_and_ties_and_takes_no_memory():
    module, room = Model(), DiskRoom()
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    before, memory = mapped_bytes(), module.narrow.weight.data_ptr()
    contexts = manager(module)
    Leftovers(room).handle_event(AppEventType.INITIAL_MODEL_LOADED, contexts.new_context())
    assert module.narrow.weight.data_ptr() != memory
    assert mapped_bytes() - before >= 700 * 500 * 4 + 1000 * 600 * 2
    assert dict(module.named_parameters()).keys() == parameters.keys()
    assert all(module.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert module.head.weight is module.embedding.weight
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())
    with torch.no_grad():  # it can be written to and trained, as ever
        module.embedding.weight.add_(1)
    module.head(torch.randn(2, 500)).sum().backward()
    assert torch.equal(module.embedding.weight, wanted["embedding.weight"] + 1)
    assert module.head.weight.grad is not None
    with pytest.raises(OSError, match="No space left"):
        room.take("", 1 << 20, 1 << 20)  # it counts
    del module, contexts, parameters
    gc.collect()
    room.take("", 1 << 20, 1 << 22)


def test_a_model_that_the_disk_has_no_room_for_stays_in_memory():
    module, room = Model(), DiskRoom()
    room.take("", 1 << 60, 1 << 62)
    memory = module.narrow.weight.data_ptr()
    assert put_on_disk(module, room) == 0
    assert module.narrow.weight.data_ptr() == memory


def test_what_shares_its_memory_goes_on_sharing_it():
    module = torch.nn.Sequential(*(torch.nn.Linear(600, 600, bias=False) for _ in range(4)))
    module[1].weight.data = module[0].weight.data  # one memory, and two parameters
    module[2].share_memory()
    places = [layer.weight.data_ptr() for layer in module]
    assert put_on_disk(module, DiskRoom()) == 600 * 600 * 4
    assert [layer.weight.data_ptr() == place for layer, place in zip(module, places, strict=True)] == [
        *[True] * 3,
        False,
    ]
    assert module[2].weight.is_shared()


@pytest.mark.parametrize("thing", [None, "model.pt", {"w": 1}, torch.nn.Linear(2, 2)])
def test_what_is_no_large_module_is_left_alone(thing):
    assert put_on_disk(thing, DiskRoom()) == 0
