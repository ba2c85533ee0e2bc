"""Where in a job a filter runs, and whether the other filters that it needs are there.

FLARE applies filters at four points: task data as it leaves the server and as it reaches a client, task results as
they leave a client and as they reach the server. A filter instance belongs to one chain, and learns the direction
from the context of each call (`nvflare.apis.utils.task_utils.apply_filters`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nvflare.apis.filter import Filter, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.apis.utils.task_utils import get_filters

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.flare_compat import filters_of

DECODED = "nvflare_rdma.decoded"  # public context property of a site: the tasks whose data it decodes
FILTERED = "nvflare_rdma.filtered"  # likewise: the tasks for whose data it has any filter
DXO_COUNT = "nvflare_rdma.dxo_count"  # context property: how many DXOs of the message are filtered
DXO_PATH = "nvflare_rdma.dxo_path"  # context property: where in a collection the filtered DXO is, "" at the top

_OTHER_CHAIN = {
    FilterChainType.TASK_DATA_CHAIN: FilterChainType.TASK_RESULT_CHAIN,
    FilterChainType.TASK_RESULT_CHAIN: FilterChainType.TASK_DATA_CHAIN,
}
_OTHER_DIRECTION = {FilterKey.IN: FilterKey.OUT, FilterKey.OUT: FilterKey.IN}
_SERVER_POINTS = {
    (FilterChainType.TASK_DATA_CHAIN, FilterKey.OUT),
    (FilterChainType.TASK_RESULT_CHAIN, FilterKey.IN),
}
_SERVER_CONFIG = "config_fed_server.json"
_CLIENT_CONFIG = "config_fed_client.json"
_FILTERS = "nvflare_rdma.filters"
_DATA_FILTERS = "task_data_filters"
_ANY_TASK = "*"  # what a site's own filters are for

_Kept = TypeVar("_Kept")
_creation = threading.Lock()


@dataclass(frozen=True)
class FilterPoint:
    """Where a filter is being called: at which of FLARE's points, and for which task and peer.

    Attributes:
        chain: `task_data`, `task_result`, or None if unknown (outside a job).
        direction: `in`, `out`, or None if unknown.
        task: the task's name, "?" if unknown.
        peer: the site or server at the other end, if known.
        path: where in a collection the filtered DXO is, "" if it is the message itself.
        count: how many DXOs of the message are filtered.
    """

    chain: str | None
    direction: str | None
    task: str
    peer: str
    path: str = ""
    count: int = 1

    @classmethod
    def of(cls, component: Filter, shareable: Shareable, fl_ctx: FLContext) -> FilterPoint:
        """Return the point at which `component` is being called."""
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME) or shareable.get_header(ReservedHeaderKey.TASK_NAME) or "?"
        peer = fl_ctx.get_peer_context()
        return cls(
            chain=component.get_prop(FilterContextKey.CHAIN_TYPE),
            direction=fl_ctx.get_prop(FLContextKey.FILTER_DIRECTION),
            task=task,
            peer=peer.get_identity_name() if peer is not None else "",
            path=fl_ctx.get_prop(DXO_PATH, ""),
            count=fl_ctx.get_prop(DXO_COUNT, 1),
        )

    @property
    def stream(self) -> str:
        """What the messages of one kind have in common, in both directions: task and place in the collection."""
        return f"{self.task}{self.path}"

    @property
    def on_server(self) -> bool:
        """Whether this is one of the server's two points."""
        return (self.chain, self.direction) in _SERVER_POINTS

    @property
    def known(self) -> bool:
        """Whether chain and direction are known, as they are inside a job."""
        return self.chain in _OTHER_CHAIN and self.direction in _OTHER_DIRECTION

    @property
    def section(self) -> str:
        """The config section of this point's filters."""
        return f"{self.chain}_filters" if self.known else "task_data_filters/task_result_filters"

    @property
    def config(self) -> str:
        """The config file of this side."""
        return _SERVER_CONFIG if self.on_server else _CLIENT_CONFIG if self.known else "this side's config"

    @property
    def other_config(self) -> str:
        """The config file of the other side."""
        return _CLIENT_CONFIG if self.on_server else _SERVER_CONFIG if self.known else "the other side's config"

    @property
    def message(self) -> str:
        """What is filtered here, in words."""
        what = {"task_data": "the data", "task_result": "the results"}.get(self.chain or "", "the model")
        sender = f" from {self.peer}" if self.peer and self.direction == FilterKey.IN else ""
        return f"{what} of task '{self.task}'{sender}"

    def opposite(self) -> FilterPoint:
        """Return the same side's point for messages of the same task that go the other way. Needs `known`."""
        assert self.chain is not None
        assert self.direction is not None
        return FilterPoint(_OTHER_CHAIN[self.chain], _OTHER_DIRECTION[self.direction], self.task, self.peer)


def require_dequantizer(point: FilterPoint, fl_ctx: FLContext) -> None:
    """Check that a side which sends codes also decodes those that it gets; outside a running job there is no telling.

    Raises:
        ConfigError: there is no ModelDequantizer for messages that go the other way; the message says what to add.
    """
    back = point.opposite() if point.known else point
    if _filters_at(back, fl_ctx) is None or _decodes(back, fl_ctx):
        return
    raise ConfigError(
        f"{point.config} has ModelQuantizer in {point.section} for task '{point.task}' but no "
        f"ModelDequantizer in {back.section}: add {_FILTERS}.ModelDequantizer to {back.section} of "
        f"{point.config} (and {_FILTERS}.ModelQuantizer to {back.section} of {point.other_config}), or pass "
        "one_way=true to ModelQuantizer if the other direction is meant to travel unquantized"
    )


def tell_what_is_decoded(fl_ctx: FLContext) -> None:
    """Tell the server, with each task request, for which tasks this site has a ModelDequantizer, or any filter at all.

    Any part of this package may do so, as the run starts. The server's side has nobody to tell.
    """
    runner: Any = fl_ctx.get_prop(FLContextKey.RUNNER)
    if not hasattr(runner, _DATA_FILTERS):
        return
    ends = f"{FilterKey.DELIMITER}{FilterKey.IN}"
    tasks = {key.removesuffix(ends) for key in filters_of(runner, _DATA_FILTERS) if key.endswith(ends)}
    for_data = FilterPoint(FilterChainType.TASK_DATA_CHAIN, FilterKey.IN, _ANY_TASK, "")
    points = {task: replace(for_data, task=task) for task in sorted(tasks | {_ANY_TASK})}
    decoded = [task for task, point in points.items() if _decodes(point, fl_ctx)]
    filtered = [task for task, point in points.items() if _filters_at(point, fl_ctx)]
    fl_ctx.set_prop(DECODED, decoded, private=False, sticky=True)
    fl_ctx.set_prop(FILTERED, filtered, private=False, sticky=True)


def require_decoding_site(point: FilterPoint, fl_ctx: FLContext) -> str | None:
    """Check at the server that the site which is to get codes decodes them.

    Returns:
        A warning if there is no telling: the site says nothing of it, as it has no part of this package or an older
        one, or it has other filters, of which one may decode.

    Raises:
        ConfigError: the site has no filter for data of this task; the message says what to add.
    """
    peer = fl_ctx.get_peer_context()
    if peer is None or not point.on_server:
        return None
    decoded, filtered = peer.get_prop(DECODED), peer.get_prop(FILTERED)
    add = f"add {_FILTERS}.ModelDequantizer to {point.section} of the site's {point.other_config}"
    if not isinstance(decoded, list):
        return (
            f"{point.peer} does not say that it decodes {point.message}; unless it has an older version of this "
            f"package, FLARE's ModelDequantizer, or another filter that decodes, it takes codes for a model: {add}"
        )
    if _has_task(decoded, point.task):
        return None
    if not isinstance(filtered, list) or _has_task(filtered, point.task):
        return (
            f"{point.peer} has no ModelDequantizer for {point.message}; unless another of its filters decodes, it "
            f"takes codes for a model: {add}"
        )
    raise ConfigError(
        f"{point.peer} has no ModelDequantizer for {point.message}, which {point.config} quantizes, and would take "
        f"codes for a model: {add}, or remove ModelQuantizer from {point.section} of {point.config}"
    )


def _has_task(tasks: list[Any], task: str) -> bool:
    return task in tasks or _ANY_TASK in tasks


def _decodes(point: FilterPoint, fl_ctx: FLContext) -> bool:
    return any(map(_is_dequantizer, _filters_at(point, fl_ctx) or ()))


def kept_in_run(name: str, make: Callable[[], _Kept], fl_ctx: FLContext) -> _Kept:
    """Return what this process's filters share under a name: a property of the run's context, made when it is first
    asked for."""
    with _creation:
        kept: _Kept | None = fl_ctx.get_prop(name)
        if kept is None:
            kept = make()
            fl_ctx.set_prop(name, kept, private=True, sticky=True)
        return kept


def place_of(component: Filter, fl_ctx: FLContext) -> tuple[str, str]:
    """Return, for a message, the config section that `component` is in, and the tasks that it is for there."""
    chain, runner = component.get_prop(FilterContextKey.CHAIN_TYPE), fl_ctx.get_prop(FLContextKey.RUNNER)
    if chain not in _OTHER_CHAIN or runner is None:
        return "a filter chain", "its tasks"
    table = filters_of(runner, f"{chain}_filters")
    keys = [key.rpartition(FilterKey.DELIMITER) for key, filters in table.items() if component in filters]
    on_server = any((chain, direction) in _SERVER_POINTS for _, _, direction in keys)
    tasks = ", ".join(sorted({f"'{task}'" for task, _, _ in keys}))
    return f"{chain}_filters of {_SERVER_CONFIG if on_server else _CLIENT_CONFIG}", f"task {tasks}"


def _filters_at(point: FilterPoint, fl_ctx: FLContext) -> list[Filter] | None:
    """Return the job's and the site's filters at `point` of this process, or None outside a running job.

    Reads the filter tables of FLARE's ServerRunner (in its config) or ClientRunner (its own attributes).
    """
    runner: Any = fl_ctx.get_prop(FLContextKey.RUNNER)
    if runner is None or not point.known:
        return None
    table = filters_of(runner, point.section)
    found: list[Filter] = get_filters(point.section, fl_ctx, table, point.task, point.direction)
    return found


def _is_dequantizer(component: Filter) -> bool:
    """Return whether it undoes quantization: ours or FLARE's own, told by name so as not to import bitsandbytes."""
    return any(c.__name__ == "ModelDequantizer" for c in type(component).__mro__)
