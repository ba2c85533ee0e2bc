"""How many threads may work, or wait, for one site at once.

FLARE answers the requests of all sites in one pool of 64 threads. A request that waits for something takes one of them,
so a site with many requests could take them all. The same goes for threads of this package that a peer can start.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.addresses import site_of

log = get_logger(__name__)

#: Threads of FLARE's that may wait for a site, and streams that may be received from it at once.
PLACES, STREAMS = 2, 16
#: The log says at most once in so long that a site has none left.
_SAY_AGAIN_SECONDS = 600.0


class SitePlaces:
    """Gives each site so many places. A site is the first part of its cells' names: all its processes count together,
    and so do the sites behind one relay. `what` says in the log what is done in a place, and `otherwise` what becomes
    of those who get none."""

    def __init__(self, places: int, what: str, otherwise: str) -> None:
        self._places = places
        self._what = what
        self._otherwise = otherwise
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()
        #: Site -> when the log said last that it has no place left.
        self._said: dict[str, float] = {}

    @contextlib.contextmanager
    def place(self, cell: str) -> Iterator[bool]:
        """Take a place for as long as this lasts, if there is one for the site of `cell` (an FQCN). Says whether there
        was; without a place the caller answers at once that it is too early to say."""
        site = site_of(cell)
        with self._lock:
            free = self._taken[site] < self._places
            self._taken[site] += free
            say = not free and self._is_news(site)
        if say:
            log.info("%d %s '%s', which are the most; %s", self._places, self._what, site, self._otherwise)
        try:
            yield free
        finally:
            with self._lock:
                self._taken[site] -= free
                if not self._taken[site]:
                    del self._taken[site]

    def _is_news(self, site: str) -> bool:
        now = time.monotonic()
        self._said = {it: at for it, at in self._said.items() if now - at < _SAY_AGAIN_SECONDS}
        if site in self._said:
            return False
        self._said[site] = now
        return True


def waiting_places() -> SitePlaces:
    """For threads of FLARE's that wait for a site."""
    return SitePlaces(PLACES, "requests wait here for", "its others are answered at once that it is too early")


def stream_places() -> SitePlaces:
    """For streams that are received from a site."""
    return SitePlaces(STREAMS, "streams are being received from", "its others take the fallback")
