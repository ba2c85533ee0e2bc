"""How many values a receiver expects a tensor to have: those of the model that it has sent, or got before.

A few bytes may stand for any number of equal values, or of values that compress well: updates that are all zero, a
fresh adapter. What is expected may come; all else has to be in proportion to its bytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.accumulate import is_encoded_tensor
from nvflare_rdma.codecs import is_plain, is_tensor
from nvflare_rdma.filters.points import kept_in_run
from nvflare_rdma.filters.quant_filter import QUANT_STATE, QUANTIZED_FLAG, flatten

Sizes = Mapping[str, int]

_PROP = "nvflare_rdma.expected"
_FORMS = 2  # models in a result that were not apart in the task's data: weights, and what an algorithm adds to them


def sizes_of(values: Mapping[str, Any]) -> Sizes:
    """Return how many values each of the tensors has. Those of a result that a server sends on may be encoded still."""
    return {
        name: math.prod(value.shape)
        for name, value in values.items()
        if is_tensor(value) and (is_plain(value) or is_encoded_tensor(value))
    }


class Expected:
    """What one process in one job expects, by task and peer and by the place in a collection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], dict[str, Sizes]] = {}

    def note(self, task: str, peer: str, path: str, sizes: Sizes) -> None:
        """Expect these sizes of the peer's next messages of a task. The last ones count."""
        with self._lock:
            self._known.setdefault((task, peer), {})[path] = sizes

    def note_sent(self, task: str, peer: str, message: Any) -> None:
        """Expect what is in a message that goes to the peer to come back, in the size that any peer got it in."""
        try:
            dxo = from_shareable(message) if isinstance(message, Shareable) else None
        except ValueError:
            return
        found = {} if dxo is None else {path: _sizes_before_encoding(leaf) for path, leaf in _models(dxo, "")}
        if not found:
            return
        with self._lock:
            # FLARE's quantizer may be about to put codes into the data, which other sites get too: none says so yet.
            before = {id(known): known for (of, _), known in self._known.items() if of == task}
            for path, sizes in found.items():
                earlier = [known[path] for known in before.values() if path in known]
                found[path] = {name: max(size, *(e.get(name, 0) for e in earlier), 0) for name, size in sizes.items()}
            same = next((known for known in self._known.values() if known == found), found)  # most sites get the same
            self._known[task, peer] = same

    def of(self, task: str, peer: str, path: str, count: int = 1) -> Sizes:
        """Return what is expected at a place of a message with `count` models; nothing if nothing is known."""
        with self._lock:
            known = self._known.get((task, peer), {})
            if path in known:
                return known[path]
            if count > _FORMS:  # else each of many models would have room for all that is known
                return {}
            return _largest(known.values())  # a result may have another form than the task's data


def _largest(several: Iterable[Sizes]) -> Sizes:
    merged: dict[str, int] = {}
    for sizes in several:
        for name, size in sizes.items():
            merged[name] = max(size, merged.get(name, 0))
    return merged


def _sizes_before_encoding(model: DXO) -> Sizes:
    """Return the sizes of the tensors of a model that is sent. FLARE's quantizer may have put codes in their place:
    it changes the data that all sites share."""
    sizes = dict(sizes_of(flatten(model.data)))
    states = model.get_meta_prop(QUANT_STATE) if model.get_meta_prop(QUANTIZED_FLAG) else None
    for name, state in states.items() if isinstance(states, dict) else ():
        shape = state.get("tensor_shape", state.get("shape")) if isinstance(state, dict) else None
        if name in sizes and shape is not None:
            sizes[name] = math.prod(shape)
    return sizes


def _models(dxo: DXO, path: str) -> Iterator[tuple[str, DXO]]:
    if dxo.data_kind == DataKind.COLLECTION and isinstance(dxo.data, dict):
        for key, part in dxo.data.items():
            if isinstance(part, DXO):
                yield from _models(part, f"{path}/{key}")
    elif dxo.data_kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF) and isinstance(dxo.data, dict):
        yield path, dxo


def expected_of(fl_ctx: FLContext) -> Expected:
    """Return what this process's filters share."""
    return kept_in_run(_PROP, Expected, fl_ctx)
