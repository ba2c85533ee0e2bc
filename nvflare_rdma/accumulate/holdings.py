"""Counts what is held of results that are no tensors yet, and what became of it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from nvflare_rdma.accumulate.spool import DiskRoom


class Holdings:
    """What a process holds of results that wait to be added.

    Results are kept as they come while there is somebody who has said `start`, and not yet `stop`.

    Attributes:
        budget: how many bytes of memory received tensors may take meanwhile; what is beyond waits on disk.
        disk: shares the disk among them.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may die in any allocation, also in one under the lock
        self._runs = 0
        self.budget = 0
        self.disk = DiskRoom()
        self._held = self._peak = self._added = self._decoded = 0
        self._on_disk = self._on_disk_peak = 0

    def start(self, budget: int) -> None:
        """A run begins whose results are to stay as they come, in no more than `budget` bytes of memory."""
        with self._lock:
            self._runs += 1
            self.budget = budget

    def stop(self) -> None:
        """Such a run has ended."""
        with self._lock:
            self._runs = max(self._runs - 1, 0)

    @property
    def wanted(self) -> bool:
        """Whether results are to stay as they come."""
        return self._runs > 0

    @property
    def held(self) -> int:
        """Bytes of memory that they take now."""
        return self._held

    @property
    def on_disk(self) -> int:
        """Bytes that they take on disk now."""
        return self._on_disk

    def hold(self, owner: Any, nbytes: int, on_disk: int = 0) -> Any:
        """Count bytes in memory and on disk until `owner` is gone, or what this returns is called."""
        with self._lock:
            self._held += nbytes
            self._on_disk += on_disk
            self._peak = max(self._peak, self._held)
            self._on_disk_peak = max(self._on_disk_peak, self._on_disk)
        release = weakref.finalize(owner, self._release, nbytes, on_disk)
        release.atexit = False
        return release

    def _release(self, nbytes: int, on_disk: int) -> None:
        with self._lock:
            self._held -= nbytes
            self._on_disk -= on_disk

    def note_added(self, nbytes: int) -> None:
        """Count values, by their bytes in a plain tensor, that were decoded into a sum."""
        with self._lock:
            self._added += nbytes

    def note_decoded(self, nbytes: int) -> None:
        """Count values, by their bytes, that were decoded to a tensor because something else was done with it."""
        with self._lock:
            self._decoded += nbytes

    def take(self) -> dict[str, int]:
        """Return the figures since this was called last, and begin anew: the most that was held at once in memory and
        on disk, what was added without being decoded first, and what was decoded first."""
        with self._lock:
            figures = {
                "results_held_peak_bytes": self._peak,
                "results_on_disk_peak_bytes": self._on_disk_peak,
                "results_added_bytes": self._added,
                "results_decoded_bytes": self._decoded,
            }
            self._peak, self._added, self._decoded = self._held, 0, 0
            self._on_disk_peak = self._on_disk
            return figures
