"""Whether a peer still answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from nvflare_rdma.channel.protocol import Connection


class SignsOfLife:
    """Asks a link's peer for a sign of life and waits for it. All methods are called under the link's lock, which is
    that of `room`; `usable` says whether the link works, as far as is known."""

    def __init__(self, room: threading.Condition, core: Connection, usable: Callable[[], bool]) -> None:
        self._room = room
        self._core = core
        self._usable = usable
        self._asked_at = 0.0
        self._doubted = 0  # threads that wait for a sign

    def heard_locked(self) -> None:
        """Something has come."""
        if self._doubted:
            self._room.notify_all()

    def ask_locked(self, silence: float) -> None:
        """Ask the peer if nothing has come from it for `silence` seconds."""
        if self._usable() and time.monotonic() - self._core.heard_at >= silence:
            self._core.ask()
            self._asked_at = time.monotonic()

    def wait_locked(self, deadline: float) -> str:
        """Wait until something has come since the peer was asked, if it was, or the link has ended. If nothing comes
        until `deadline`, say so."""
        self._doubted += 1
        answered = self._room.wait_for(
            lambda: not self._usable() or self._core.heard_at >= self._asked_at,
            max(deadline - time.monotonic(), 0.0),
        )
        self._doubted -= 1
        silence = time.monotonic() - self._core.heard_at
        return "" if answered else f"nothing has come from the peer for {silence:.0f} s, and it does not answer"
