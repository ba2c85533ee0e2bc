"""What is left for when a link's lock is released: calls that leave the link, and messages to deliver."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

Delivery: TypeAlias = bytes | memoryview
_POLL = 0.1


class DeferredCalls:
    """Keeps calls and messages until no lock is held. `lock` is the link's: `append` and `bring` are called under it,
    `run` is not. Each call is made inside `guarded()`. If `closing()`, what can't be delivered at once is not waited
    for."""

    def __init__(
        self,
        lock: threading.Lock,
        deliver: Callable[[Delivery], None],
        guarded: Callable[[], AbstractContextManager[None]],
        closing: Callable[[], bool],
    ) -> None:
        self._lock = lock
        self._deliver = deliver
        self._guarded = guarded
        self._closing = closing
        self._calls: list[Callable[[], None]] = []
        self._deliveries: deque[Delivery] = deque()
        self._delivering = threading.RLock()

    def append(self, call: Callable[[], None]) -> None:
        """Have `call` done when the lock is released."""
        self._calls.append(call)

    def bring(self, message: Delivery) -> None:
        """Deliver a message, after those before it."""
        self._deliveries.append(message)

    def run(self) -> None:
        """Make the calls and deliver the messages that were left, by this thread or another."""
        while True:
            with self._lock:
                todo = self._calls[:]
                self._calls.clear()
            if not todo:
                break
            for call in todo:
                with self._guarded():
                    call()
                del call  # it may hold memory, and who is delivered to below may take long
        while self._deliveries:
            # One at a time, so that messages keep their order; a receiver that blocks holds up every thread that
            # brings it more. Reentrant: it may close the link.
            if not self._delivering.acquire(timeout=_POLL):
                if self._closing():
                    return
                continue
            try:
                with self._lock:
                    message = self._deliveries.popleft() if self._deliveries else None
                if message is not None:
                    with self._guarded():
                        self._deliver(message)
            finally:
                self._delivering.release()
