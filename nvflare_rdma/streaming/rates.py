"""How fast messages go to each site, as the transfers of a run tell."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable

from nvflare_rdma.transfer import Ledger, TransferRecord, site_of

#: Smaller transfers tell of round trips, and not of a rate.
_LEAST_BYTES = 256 * 1024
#: So many transfers of each direction count: the link of an hour ago may have been another one.
_KEPT = 3
_MOST_SITES = 4096


class LinkRates:
    """Bytes a second to each site: the median of the last transfers to it or, while there is none, from it."""

    def __init__(self, ledger: Ledger) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str], deque[float]] = {}
        self.stop: Callable[[], None] = ledger.subscribe(self._ended)

    def to(self, site: str) -> float | None:
        """Bytes a second on the way to `site` ("" or "server" at a site: the server). None if that is not known."""
        with self._lock:
            for direction in ("sent", "received"):
                if rates := self._found.get((direction, site)):
                    return statistics.median(rates)
        return None

    def _ended(self, record: TransferRecord) -> None:
        if record.failed or record.wire_bytes < _LEAST_BYTES or record.seconds <= 0:
            return
        key = record.direction, site_of(record.peer)
        with self._lock:
            if key in self._found or len(self._found) < _MOST_SITES:
                self._found.setdefault(key, deque(maxlen=_KEPT)).append(record.wire_bytes / record.seconds)
