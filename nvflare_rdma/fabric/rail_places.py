"""How many rails peers may open to this process: each takes descriptors and threads, which others need, too."""

from __future__ import annotations

import math
import resource
import threading
from collections import Counter
from collections.abc import Callable


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

    def take(self, site: str, first: bool) -> bool:
        """Take a place for a rail of `site`, if there is one. `first` says that it is one of its link's first."""
        most = self._descriptors() / 2
        of_site = most / 2
        if not first:
            most, of_site = most * 3 / 4, of_site / 2
        with self._lock:
            if self._total >= most or self._taken.get(site, 0) >= of_site:
                return False
            self._taken[site] += 1
            self._total += 1
        return True

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
