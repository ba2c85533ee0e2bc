"""The controllers by name."""

from __future__ import annotations

from nvflare_rdma.channel.controllers.adaptive import MAX_GRANTS, AdaptiveController
from nvflare_rdma.channel.controllers.base import Controller, FixedController

__all__ = ["CONTROLLERS", "MAX_GRANTS", "AdaptiveController", "Controller", "FixedController", "make_controller"]

CONTROLLERS: dict[str, type[Controller]] = {c.name: c for c in (FixedController, AdaptiveController)}


def make_controller(name: str, chunk_bytes: int, depth: int, max_window_bytes: int) -> Controller:
    """Make the controller called `name`, a key of `CONTROLLERS` (else KeyError).

    It starts with `depth` chunks of `chunk_bytes` and never has more than `max_window_bytes` in flight.
    """
    return CONTROLLERS[name](chunk_bytes, depth, max_window_bytes)
