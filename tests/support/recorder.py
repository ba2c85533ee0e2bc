"""What a fabric reports, for a test to wait for."""

from __future__ import annotations

import queue


class Recorder:
    """A CompletionHandler that queues what it is told."""

    def __init__(self) -> None:
        self.landings: queue.Queue[tuple[int, int, int]] = queue.Queue()
        self.writes: queue.Queue[int] = queue.Queue()
        self.down: queue.Queue[tuple[int, Exception]] = queue.Queue()
        self.up: queue.Queue[int] = queue.Queue()
        self.failures: queue.Queue[Exception] = queue.Queue()

    def landed(self, notification: int, length: int, digest: int) -> None:
        self.landings.put((notification, length, digest))

    def written(self, notification: int) -> None:
        self.writes.put(notification)

    def rail_down(self, rail: int, error: Exception) -> None:
        self.down.put((rail, error))

    def admits(self, first: bool) -> bool:
        return True

    def rail_up(self, rail: int) -> None:
        self.up.put(rail)

    def failed(self, error: Exception) -> None:
        self.failures.put(error)
