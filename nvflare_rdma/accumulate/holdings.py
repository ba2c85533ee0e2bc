"""Counts what is held encoded, and what became of it."""

from __future__ import annotations

import threading
import weakref
from typing import Any


class Holdings:
    """What a process holds of results that came in few bits.

    Results are kept encoded while there is somebody who has said `start`, and not yet `stop`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may die in any allocation, also in one under the lock
        self._runs = 0
        self._held = self._peak = self._added = self._decoded = 0

    def start(self) -> None:
        """A run begins whose results are to stay encoded."""
        with self._lock:
            self._runs += 1

    def stop(self) -> None:
        """Such a run has ended."""
        with self._lock:
            self._runs = max(self._runs - 1, 0)

    @property
    def wanted(self) -> bool:
        """Whether results are to stay encoded."""
        return self._runs > 0

    @property
    def held(self) -> int:
        """Bytes that are held encoded now."""
        return self._held

    def hold(self, owner: Any, nbytes: int) -> Any:
        """Count `nbytes` until `owner` is gone, or what this returns is called."""
        with self._lock:
            self._held += nbytes
            self._peak = max(self._peak, self._held)
        release = weakref.finalize(owner, self._release, nbytes)
        release.atexit = False
        return release

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self._held -= nbytes

    def note_added(self, nbytes: int) -> None:
        """Count values, by their bytes in a plain tensor, that were decoded into a sum."""
        with self._lock:
            self._added += nbytes

    def note_decoded(self, nbytes: int) -> None:
        """Count values, by their bytes, that were decoded to a tensor because something else was done with it."""
        with self._lock:
            self._decoded += nbytes

    def take(self) -> dict[str, int]:
        """Return the figures since this was called last, and begin anew: the most that was held encoded at once, what
        was added without being decoded first, and what was decoded first."""
        with self._lock:
            figures = {
                "results_held_peak_bytes": self._peak,
                "results_added_bytes": self._added,
                "results_decoded_bytes": self._decoded,
            }
            self._peak, self._added, self._decoded = self._held, 0, 0
            return figures
