"""Says once for each peer and reason what would else be said with every transfer."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter

from nvflare_rdma.transfer.addresses import site_of

#: What a reason has anew each time: numbers, and when a peer was tried that is not tried again yet (`PeerLinks`).
_PASSING = re.compile(r" \(tried [^)]*\)|\d+")
#: Reasons may have a peer's words in them: no peer makes this grow without end, or takes others' places.
_MOST, _MOST_OF_PEER, _REASON_CHARACTERS = 16384, 64, 200


class Notices:
    """Knows what was said already. Any number of threads may use it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: set[tuple[str, str, str]] = set()
        self._count: Counter[str] = Counter()  # by site

    def level(self, what: str, peer: str, reason: object, first: int = logging.WARNING) -> int:
        """The level to log with that `what` happens with `peer`, for `reason`: `first` the first time, and that of
        debug messages from then on. Reasons that differ in numbers only (ports, seconds) are the same."""
        known = what, peer, _PASSING.sub("", str(reason))[:_REASON_CHARACTERS]
        site = site_of(peer)
        with self._lock:
            if known in self._said or self._count[site] >= _MOST_OF_PEER or len(self._said) >= _MOST:
                return logging.DEBUG
            self._said.add(known)
            self._count[site] += 1
        return first

    def clear(self) -> None:
        """Forget what was said: another run begins."""
        with self._lock:
            self._said.clear()
            self._count.clear()
