"""Downloads that take the fallback, FLARE's own path, and what they and direct ones are recorded as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nvflare_rdma.transfer import Item, Meter, raw_bytes


def download_by_fallback(
    meter: Meter,
    reason: str,
    download: Callable[..., tuple[str | None, Any]],
    progress: Callable[..., None] | None,
) -> tuple[str | None, Any]:
    """Run FLARE's `download` and count it with `meter`. `reason` says why there is no direct one, and `progress` gets
    FLARE's events. Returns what `download` does: an error or None, and the tensors."""
    meter.fall_back(reason)
    before = meter.wire_bytes

    def count(**event: Any) -> None:
        meter.wire_bytes = before + event["bytes_done"]
        if progress is not None:
            progress(**event)

    failure, tensors = download(progress_cb=count)
    if failure or tensors is None:
        meter.end(failure=failure or "nothing came")
    else:  # what FLARE has put on disk is not to be loaded for this
        meter.end(len(tensors), raw_bytes(tensors) if type(tensors) is dict else meter.wire_bytes - before)
    return failure, tensors


def finish(meter: Meter, failure: str | None, items: Sequence[Item]) -> None:
    """End `meter`: `items` have arrived, or `failure` says why they have not."""
    if failure:
        meter.end(failure=failure)
    else:
        meter.end(len(items), sum(item.nbytes for item in items))
