from __future__ import annotations

import logging

import pytest
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext


@pytest.fixture
def fl_ctx():
    return FLContext()


@pytest.fixture
def warnings_logged():
    """Messages of level WARNING and above that the filters log."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    root = logging.getLogger()
    root.addHandler(handler)
    yield messages
    root.removeHandler(handler)


def place(component, chain, direction, runner=None, task="train"):
    """Put a filter where FLARE's config would, and return a context of a call at that point."""
    component.set_prop(FilterContextKey.CHAIN_TYPE, chain)
    ctx = FLContext()
    ctx.set_prop(FLContextKey.FILTER_DIRECTION, direction, private=True, sticky=False)
    ctx.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
    if runner is not None:
        ctx.set_prop(FLContextKey.RUNNER, runner, private=True, sticky=False)
    return ctx


POINTS = {
    "server out": (FilterChainType.TASK_DATA_CHAIN, FilterKey.OUT),
    "client in": (FilterChainType.TASK_DATA_CHAIN, FilterKey.IN),
    "client out": (FilterChainType.TASK_RESULT_CHAIN, FilterKey.OUT),
    "server in": (FilterChainType.TASK_RESULT_CHAIN, FilterKey.IN),
}


@pytest.fixture
def at():
    """at("server out", filter, runner=...) -> FLContext"""
    return lambda point, component, **kwargs: place(component, *POINTS[point], **kwargs)
