"""Counts downloads that go on FLARE's own path, and sizes of what was moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nvflare_rdma.codecs.tensors import is_torch
from nvflare_rdma.metrics.transfers import Meter


def raw_bytes(tensors: Mapping[str, Any]) -> int:
    """Bytes of tensors and arrays in memory; a sparse tensor counts as if it were dense."""
    sizes = (t.numel() * t.element_size() if is_torch(t) else getattr(t, "nbytes", 0) for t in tensors.values())
    return int(sum(sizes))


def flares_own(
    meter: Meter,
    reason: str,
    download: Callable[..., tuple[str | None, Any]],
    progress: Callable[..., None] | None,
) -> tuple[str | None, Any]:
    """FLARE's ``download``, counted by ``meter``; ``reason`` says why it is not a direct one."""
    meter.fall_back(reason)
    before = meter.wire_bytes

    def count(**event: Any) -> None:
        meter.wire_bytes = before + event["bytes_done"]
        if progress is not None:
            progress(**event)

    failure, items = download(progress_cb=count)
    finish(meter, failure, items, meter.wire_bytes - before)
    return failure, items


def finish(meter: Meter, failure: str | None, items: Any, on_disk: int = 0) -> None:
    """End ``meter`` with what a download has given. ``on_disk``: bytes of what is not in memory, and stays so."""
    if failure or items is None:
        meter.end(failure=failure or "nothing came")
    else:
        meter.end(len(items), raw_bytes(items) if type(items) is dict else on_disk)
