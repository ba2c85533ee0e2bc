"""How many rails peers may open to this process: each takes descriptors and threads, which others need, too."""

from __future__ import annotations

import logging
import math
import resource
import threading
from collections import Counter
from collections.abc import Callable

from nvflare_rdma.logs import Seldom, get_logger

log = get_logger(__name__)


def descriptors() -> float:
    """How many descriptors this process may have (getrlimit(2), RLIMIT_NOFILE)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else float(soft)


class RailPlaces:
    """The places of rails that peers have opened: half of the descriptors of the process are theirs at most, and half
    of these one site's. The last quarter of all, and the last half of a site's, is for the first rails of links: a link
    without any is slow, while others make it faster only where the way is long or loses packets."""

    def __init__(self, descriptors: Callable[[], float] = descriptors) -> None:
        self._descriptors = descriptors
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()
        self._total = 0
        self._refused = Seldom()

    def take(self, site: str, first: bool) -> bool:
        """Take a place for a rail of `site`, if there is one. `first` says that it is one of its link's first."""
        descriptors = self._descriptors()
        most, of_site = (descriptors / 2, descriptors / 4) if first else (descriptors * 3 / 8, descriptors / 8)
        with self._lock:
            total, its = self._total, self._taken.get(site, 0)
            if total < most and its < of_site:
                self._taken[site] += 1
                self._total += 1
                return True
        log.log(
            self._refused.level(logging.WARNING),
            "a rail of %s is refused: it has %d, all sites have %d, and this process may have %g descriptors; if there "
            "are that many sites, raise the limit (ulimit -n, LimitNOFILE of systemd)",
            *(site, its, total, descriptors),
        )
        return False

    def free(self, site: str, count: int) -> None:
        """Give places back."""
        with self._lock:
            self._taken[site] -= count
            self._total -= count
            if not self._taken[site]:
                del self._taken[site]

    @property
    def taken(self) -> dict[str, int]:
        """How many places each site has, of those that have some."""
        with self._lock:
            return {site: count for site, count in self._taken.items() if count}
