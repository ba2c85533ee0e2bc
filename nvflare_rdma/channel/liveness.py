"""Whether the peer of a link still answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from nvflare_rdma.channel.protocol import Connection


class Liveness:
    """Asks the peer of `core` for signs of life. All methods are called under the lock of `room`, which is the link's;
    `usable` says whether the link works, as far as is known."""

    def __init__(self, core: Connection, room: threading.Condition, usable: Callable[[], bool]) -> None:
        self._core = core
        self._room = room
        self._usable = usable
        self._asked_at = 0.0
        self._doubted = 0  # threads that wait for a sign of life

    def ask_locked(self, silence: float) -> None:
        """Ask if nothing has come from the peer for `silence` seconds."""
        if self._usable() and time.monotonic() - self._core.heard_at >= silence:
            self._core.ask()
            self._asked_at = time.monotonic()

    def heard_locked(self) -> None:
        """Tell those who wait that something has come."""
        if self._doubted:
            self._room.notify_all()

    def wait_locked(self, deadline: float) -> float | None:
        """Wait until something has come since the peer was asked, if it was, or until the link is of no use, or until
        `deadline`. Returns None, or if nothing came, for how many seconds nothing has."""
        self._doubted += 1
        self._room.wait_for(
            lambda: not self._usable() or self._core.heard_at >= self._asked_at,
            max(deadline - time.monotonic(), 0.0),
        )
        self._doubted -= 1
        if not self._usable() or self._core.heard_at >= self._asked_at:
            return None
        return time.monotonic() - self._core.heard_at
