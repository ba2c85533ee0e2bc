"""Tensors that are to be encoded when they are sent, and not before.

A mark belongs to one Python object, which is why `marked` makes a new one (a view of the same memory): the same weights
may also be sent somewhere else as they are.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from nvflare_rdma.codecs.base import FixedSizeCodec
from nvflare_rdma.codecs.tensors import is_torch

_lock = threading.RLock()  # a tensor may die in any allocation, also in one under the lock
_marks: dict[int, tuple[Any, FixedSizeCodec]] = {}


def marked(tensor: Any, codec: FixedSizeCodec) -> Any:
    """Return a view of `tensor` (numpy or torch, encodable) that `codec_of` knows."""
    view = tensor.detach() if is_torch(tensor) else tensor.view()
    key = id(view)

    def forget(_: Any) -> None:
        with _lock:
            _marks.pop(key, None)

    with _lock:
        _marks[key] = weakref.ref(view, forget), codec
    return view


def codec_of(tensor: Any) -> FixedSizeCodec | None:
    """Return the codec that `tensor` is to be encoded with, or None if it is not marked."""
    with _lock:
        entry = _marks.get(id(tensor))
    return entry[1] if entry is not None and entry[0]() is tensor else None
