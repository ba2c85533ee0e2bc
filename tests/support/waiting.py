"""For what has no event to wait for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: How many times slower than others this machine may be, as a guest's emulated CPU: see `tests/guest/speed.py`.
PATIENCE = int(os.environ.get("RDMA_TEST_PATIENCE", "1"))


def eventually(condition: Callable[[], T], deadline: float = 60.0 * PATIENCE) -> T:
    """The first true value of ``condition``; fails when there was none for ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while True:
        before = time.thread_time()
        if value := condition():
            return value
        assert time.monotonic() < end, "it did not come true in time"
        # To ask takes no more than a fifth of a processor, which what is waited for may need.
        threading.Event().wait(max(0.0005, 4 * (time.thread_time() - before)))
