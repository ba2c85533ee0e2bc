"""Threads of a fabric or a link, and their end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable


def join_threads(threads: Iterable[threading.Thread], seconds: float) -> None:
    """Wait until all of these threads have ended, for at most so many seconds together. The calling thread may be one
    of them."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), 0.0))
