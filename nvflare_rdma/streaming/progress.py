"""FLARE's progress callbacks for bytes that FLARE does not see pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer import Progress

log = get_logger(__name__)


class DirectProgress:
    """Calls a receiver's progress callback, which is None if nobody wants to know.

    It first tells of the direct part, then of the events with which FLARE ends the download, in one sequence.
    """

    def __init__(self, ref_id: str, callback: Callable[..., None] | None) -> None:
        self._ref_id = ref_id
        self._callback = callback
        self._sequence = 0
        self._done = Progress(0, 0)

    def moved(self, done: Progress) -> None:
        """Tell that `done` has arrived directly."""
        self._done = done
        self._tell("start" if not self._sequence else "active")

    def finish(self, **event: Any) -> None:
        """Pass on an event of FLARE's that knows of no bytes: the download of what has arrived directly."""
        if event["state"] != "start" or not self._sequence:
            self._tell(event["state"])

    def go_on(self, **event: Any) -> None:
        """Pass on an event of FLARE's own download, which began after the direct one had failed."""
        done = self._done
        self._done = Progress(max(done.nbytes, event["bytes_done"]), max(done.items, event["items_done"] or 0))
        self.finish(**event)

    def _tell(self, state: str) -> None:
        if self._callback is None:
            return
        self._sequence += 1
        try:
            self._callback(
                ref_id=self._ref_id,
                sequence=self._sequence,
                bytes_done=self._done.nbytes,
                items_done=self._done.items,
                timestamp=time.time(),
                state=state,
            )
        except Exception as error:  # noqa: BLE001 - somebody else's code, and no reason to lose the data
            log.warning("the progress callback of %s failed: %s", self._ref_id, error)
