"""Direct writes that this side reads: which of them the peer is told of, and when."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

#: Of a write that one thread may read while another receives: less is copied sooner than a thread wakes.
LARGE_BYTES = 256 * 1024
#: Small writes are acknowledged together while more of them wait: each message wakes a thread of the sender. Who is
#: about to wait calls `Reads.flush`. A large one is acknowledged by itself: the thread that waits may be another.
_TOGETHER = 16


@dataclass(slots=True)
class Read:
    """A write of the peer that this side has to read."""

    notification: int
    nbytes: int
    over: bool = False


class Reads:
    """The peer's writes that this side reads. They end in any order and are acknowledged in the order in which they
    came: `acknowledge(count, last)` says
    that so many more are over, of which `last` is the notification of the last. It never waits."""

    def __init__(self, acknowledge: Callable[[int, int], None]) -> None:
        self._acknowledge = acknowledge
        self._lock = threading.Lock()
        self._reads: deque[Read] = deque()
        self._count = self._nbytes = self._last = 0  # over, and not acknowledged

    def begin(self, notification: int, nbytes: int) -> Read:
        """Begin a read. They are begun in the order in which they came."""
        read = Read(notification, nbytes)
        with self._lock:
            self._reads.append(read)
        return read

    def end(self, read: Read) -> None:
        """End a read: the peer may have its memory back."""
        with self._lock:
            read.over = True
            while self._reads and self._reads[0].over:
                first = self._reads.popleft()
                self._count += 1
                self._nbytes += first.nbytes
                self._last = first.notification
            if self._count >= _TOGETHER or self._nbytes >= LARGE_BYTES:
                self._flush()

    def flush(self) -> None:
        """Acknowledge what is over."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._count:
            self._acknowledge(self._count, self._last)
            self._count = self._nbytes = 0
