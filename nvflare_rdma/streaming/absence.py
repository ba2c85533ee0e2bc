"""Whether a peer that does not answer has ended, or can't be reached for now.

A process that is gone does not come back under its name, so nobody waits for it. What tells is its parent's cell: where
the parent answers and the process does not, for longer than FLARE takes to connect a process again, the process has
ended. Where neither answers, nothing is known: the host is out of reach, or sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from nvflare.fuel.f3.cellnet.fqcn import FQCN

from nvflare_rdma.flare_compat import answers

_ANSWER_SECONDS = 10.0
#: FLARE's cells wait for up to a minute before they connect again.
_GRACE_SECONDS = 90.0


class Absences:
    """Knows since when peers of a cell don't answer, though their parents do."""

    def __init__(
        self, cell: Any, grace: float = _GRACE_SECONDS, ended: Callable[[str], object] = lambda peer: None
    ) -> None:
        """`ended` is called with each peer that has ended, whenever that is found."""
        self._cell = cell
        self._grace = grace
        self._ended = ended
        self._lock = threading.Lock()
        self._since: dict[str, float] = {}

    def has_ended(self, peer: str) -> bool:
        """Whether the process whose cell is `peer` has ended, as far as can be told. It is to be asked now and then
        while the peer is missed, and takes some seconds."""
        *above, _ = FQCN.split(peer)
        if not above:
            return False
        parent = FQCN.join(above)
        if answers(self._cell, peer, _ANSWER_SECONDS) or not answers(self._cell, parent, _ANSWER_SECONDS):
            with self._lock:
                self._since.pop(peer, None)
            return False
        with self._lock:
            since = self._since.setdefault(peer, time.monotonic())
        if time.monotonic() - since < self._grace:
            return False
        self._ended(peer)
        return True
