"""Lets go of models that FLARE's server holds and nobody will read.

FLARE holds the model that a job began with, and the last round's, until the job ends, in two places:

- `FLContext` keeps what was asked of it last, also of sticky properties, which it asks its manager for each time. The
  context of a workflow lives as long as that, and the poster of federated events has its last one until the next event.
- A persistor's `torch.nn.Module` has the values that a job began with, which are asked for when a workflow loads its
  model. They go to a file without a name, of which they are a view, and are read when somebody wants them.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.fuel.utils.memory_utils import cleanup_memory

from nvflare_rdma.accumulate import DiskRoom, Spool
from nvflare_rdma.codecs import to_array
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

#: Smaller tensors stay where they are, and others begin at multiples of so many bytes.
_SMALL, _ALIGNED = 1 << 20, 64


class Leftovers:
    """What is done at a server for one run. Events come from several threads."""

    def __init__(self, room: DiskRoom) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._contexts: weakref.WeakSet[FLContext] = weakref.WeakSet()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Let go of a model when it is no longer the global one."""
        with self._lock:
            self._contexts.add(fl_ctx)
        if event_type == AppEventType.INITIAL_MODEL_LOADED:
            persistor = fl_ctx.get_engine().get_component(AppConstants.DEFAULT_PERSISTOR_ID)
            put_on_disk(getattr(persistor, "model", None), self._room)
        elif event_type == AppEventType.AFTER_SHAREABLE_TO_LEARNABLE:
            with self._lock:
                contexts = list(self._contexts)
            for context in contexts:
                context.get_prop(AppConstants.GLOBAL_MODEL)  # so it has the one of now
            # Requests leave cycles of objects, and the allocator keeps what is free: together another model.
            cleanup_memory()


def put_on_disk(module: Any, room: DiskRoom) -> int:
    """Have the parameters of a `torch.nn.Module` on the CPU, which stay what they are, read from a file from now on.
    What is written to them later is in memory. Returns how many bytes that were: 0 if it is no module, or if the disk
    has no room.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        return 0
    tensors = list(_large(module))
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    if not tensors:
        return 0
    try:
        place = Spool(room, "").reserve(end)
        for tensor, start in zip(tensors, starts, strict=True):
            place.write(start, to_array(tensor.detach()).reshape(-1).view(np.uint8).data)
        pages = place.map(end)
    except OSError as error:
        log.info("the model that the job begins with stays in memory: %s", error)
        return 0
    for tensor, start in zip(tensors, starts, strict=True):
        view = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        tensor.data = view.view(tensor.shape)
    return end


def _large(module: Any) -> Iterator[Any]:
    """The parameters that are worth it: plain ones that share their memory with nothing, each once."""
    import torch

    owners = Counter(
        tensor.untyped_storage().data_ptr()
        for tensor in (*module.parameters(), *module.buffers())
        if type(tensor) in (torch.nn.Parameter, torch.Tensor) and tensor.layout is torch.strided
    )
    for parameter in module.parameters():
        plain = type(parameter) is torch.nn.Parameter and parameter.layout is torch.strided
        if (
            plain
            and parameter.device.type == "cpu"
            and parameter.dtype in (torch.float32, torch.float16, torch.bfloat16)
        ):
            whole = parameter.is_contiguous() and not parameter.is_neg()
            storage = parameter.untyped_storage()
            own = storage.nbytes() == parameter.numel() * parameter.element_size() and not parameter.is_shared()
            own = own and owners[storage.data_ptr()] == 1
            if whole and own and parameter.numel() * parameter.element_size() >= _SMALL:
                yield parameter
