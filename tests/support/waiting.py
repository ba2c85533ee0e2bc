"""For what has no event to wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(condition: Callable[[], T], deadline: float = 60.0) -> T:
    """The first true value of ``condition``; fails when there was none for ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while True:
        before = time.thread_time()
        if value := condition():
            return value
        assert time.monotonic() < end, "it did not come true in time"
        # To ask takes no more than a fifth of a processor, which what is waited for may need.
        threading.Event().wait(max(0.0005, 4 * (time.thread_time() - before)))
