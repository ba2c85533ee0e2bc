"""Tensors of a model that share their memory (tied weights) do so again after an aggregator has added them apart.

A language model's output layer often is its embedding, by another name. An aggregator makes a sum of its own for each
name: the sums are equal, bit for bit, and from then on the model travels, and is held and saved, with both.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from nvflare_rdma.accumulate import plain
from nvflare_rdma.codecs import identity, is_tensor, same_bits
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)


class Ties:
    """Knows which names of a job's model stand for one tensor. One thread of a job's fires the events."""

    def __init__(self) -> None:
        #: Name -> the first name of the same tensor.
        self._first: dict[str, str] = {}

    def learn(self, model: Mapping[str, Any]) -> None:
        """Note which tensors of a model share their memory."""
        seen: dict[tuple[Any, ...], str] = {}
        for name, value in model.items():
            if (key := identity(value)) is not None and (first := seen.setdefault(key, name)) != name:
                if name not in self._first:
                    log.info("%s and %s are one tensor of the model, and stay one when results are added", first, name)
                self._first[name] = first

    def tie(self, model: MutableMapping[str, Any]) -> None:
        """Have names that stood for one tensor do so again, where their tensors are equal bit for bit."""
        for name, first in self._first.items():
            one, other = plain(model.get(first)), plain(model.get(name))  # of a result that is sent on
            if one is not other and is_tensor(one) and is_tensor(other) and same_bits(one, other):
                model[name] = one

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Learn from the model that a job begins with; tie what is aggregated, and what is sent."""
        if event_type == AppEventType.INITIAL_MODEL_LOADED:
            self.learn(_params_of(fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)))
        elif self._first and event_type == AppEventType.AFTER_AGGREGATION:
            self.tie(_params_of(fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)))
        elif self._first and event_type == EventType.BEFORE_TASK_DATA_FILTER:
            # A workflow adds aggregated differences to its model after the event of their aggregation.
            self.tie(_params_of(fl_ctx.get_prop(FLContextKey.TASK_DATA)))


def _params_of(thing: Any) -> MutableMapping[str, Any]:
    """The tensors of a model, or of a difference of two, in whatever FLARE has it; none if it is something else."""
    found: Any = None
    if isinstance(thing, FLModel):
        found = thing.params
    elif isinstance(thing, ModelLearnable):
        found = thing.get(ModelLearnableKey.WEIGHTS)
    elif isinstance(thing, Shareable):
        try:
            dxo = from_shareable(thing)
        except ValueError:  # it is no model
            return {}
        found = dxo.data if dxo.data_kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF) else None
    return found if isinstance(found, MutableMapping) else {}
