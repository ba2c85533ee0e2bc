"""RDMA through libibverbs (pyverbs): the peer's device writes into exposed memory, no CPU of this side takes part.

Every peer has protection domains of its own, so no key of one works for another. A slice is registered when it is
exposed, for exactly its bytes, and deregistered when its write is reported: its key dies with the grant. Memory windows
would spare the pinning, but they are bound by a request in the send queue, behind what is being sent, and the grant
would have to wait for that; some devices (iWARP's) have none.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from nvflare_rdma.fabric.base import CompletionHandler, Fabric
from nvflare_rdma.fabric.interfaces import IPAddress
from nvflare_rdma.fabric.options import VerbsOptions
from nvflare_rdma.fabric.slots import SlotPool
from nvflare_rdma.fabric.verbs.description import parse
from nvflare_rdma.fabric.verbs.devices import choose_gid, choose_ports, list_ports
from nvflare_rdma.fabric.verbs.endpoint import VerbsEndpoint
from nvflare_rdma.fabric.verbs.ports import Port
from nvflare_rdma.fabric.verbs.registration_cache import RegistrationCache
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)


class VerbsFabric(Fabric):
    """RDMA devices, with `rails` queue pairs to a peer. `cache` has the registered source memory of all peers. `near`
    is this side's address on the control stream, whose network is the best guess for the data too."""

    name = "verbs"

    def __init__(
        self, rails: int, options: VerbsOptions, cache: RegistrationCache, near: IPAddress | None = None
    ) -> None:
        self.options = options
        self.cache = cache
        self.pool = SlotPool()
        self._count = rails
        self._near = near

    def offer(self, handler: CompletionHandler) -> tuple[VerbsEndpoint, Mapping[str, Any]]:
        """See `Fabric.offer`."""
        endpoint = self._open(handler, self._count, "")
        try:
            endpoint.listen()
        except BaseException:
            endpoint.close()
            raise
        return endpoint, endpoint.describe()

    def connect(self, offer: Mapping[str, Any], handler: CompletionHandler) -> VerbsEndpoint:
        """See `Fabric.connect`."""
        peer = parse(offer)
        endpoint = self._open(handler, min(self._count, len(peer)), peer[0].port.gid.family)
        try:
            endpoint.connect(peer, passive=False)
        except BaseException:
            endpoint.close()
            raise
        return endpoint

    def _open(self, handler: CompletionHandler, count: int, family: str) -> VerbsEndpoint:
        options = self.options
        ports: list[Port] = []
        try:
            for info in choose_ports(list_ports(), options)[:count]:
                gid, why = choose_gid(info, options, self._near, family)
                log.info("verbs: %s, %s: %s", info, gid, why)
                ports.append(Port(info, gid))
        except BaseException:
            for port in ports:
                port.close()
            raise
        return VerbsEndpoint(handler, ports, count, self)


def address_on(host: str) -> IPAddress | None:
    """Return the IP address that a socket's host name is, for `VerbsFabric`; None if it is none."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address
