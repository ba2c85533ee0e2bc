"""How many connections a driver has to each site."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from nvflare.fuel.f3.drivers.driver_params import DriverParams

from nvflare_rdma.channel import source_of
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

MAX_CONNECTIONS_OF_SITE = 64


class Counted(Protocol):
    """A connection, or the link that it is on, that has its place among those of its site."""

    @property
    def usable(self) -> bool:
        """Whether it has not ended."""

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way over it, as far as that is known."""

    def close(self, linger: float) -> None:
        """End it; it may wait so many seconds for its peer."""


def certified_site_of(properties: dict[str, Any]) -> str:
    """The name in the certificate of who is at the other end, as FLARE is told it; "" without a certificate."""
    common_name = properties.get(DriverParams.PEER_CN.value)
    return str(common_name) if common_name and common_name != "N/A" else ""


def site_of(properties: dict[str, Any]) -> str:
    """Who is at the other end, as far as that is known from what FLARE is told of a connection: the name in the
    certificate, else where its address is from, which on this host is nobody in particular ("")."""
    if name := certified_site_of(properties):
        return name
    host = str(properties[DriverParams.PEER_ADDR.value]).rpartition(":")[0]
    own = str(properties[DriverParams.LOCAL_ADDR.value]).rpartition(":")[0]
    # By the address itself, whoever has an IPv6 network would be as many sites as he likes.
    return "" if host == own or not host else source_of(host.strip("[]"))


class SiteConnections:
    """The connections of a driver, by site."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Site -> its connections, the oldest first; "" has those that are nobody's in particular.
        self._sites: dict[str, list[Counted]] = {}

    @property
    def sites(self) -> list[str]:
        """The sites that have connections."""
        with self._lock:
            return list(self._sites)

    @contextlib.contextmanager
    def counted(self, site: str, connection: Counted) -> Iterator[None]:
        """Count a connection of a site as long as this lasts, and close the oldest if there are too many: one that is
        idle first."""
        with self._lock:
            others = [other for other in self._sites.setdefault(site, []) if other.usable]
            self._sites[site].append(connection)
        try:
            while site and len(others) >= MAX_CONNECTIONS_OF_SITE:
                oldest = next((other for other in others if other.idle), others[0])
                text = "%s has %d connections, which are the most for one site; the oldest is closed"
                log.warning(text, site, len(others))
                others.remove(oldest)
                oldest.close(0.0)
            yield
        finally:
            with self._lock:
                self._sites[site].remove(connection)
                if not self._sites[site]:
                    del self._sites[site]
