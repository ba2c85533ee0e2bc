"""The shared memory fabric: the passive side listens on an abstract Unix socket, the active side dials it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare_rdma.fabric.base import CompletionHandler, Fabric
from nvflare_rdma.fabric.shm import handshake
from nvflare_rdma.fabric.shm.endpoint import ShmEndpoint


class ShmFabric(Fabric):
    """Shared memory of two processes. `paths` says how this side may receive, best first; tests give "direct" or
    "memfd" alone."""

    name = "shm"
    same_host = True

    def __init__(self, paths: Sequence[str] = handshake.PATHS) -> None:
        if not paths or set(paths) - set(handshake.PATHS):
            raise ValueError(f"shm paths are {' and '.join(handshake.PATHS)}, not {paths!r}")
        self._paths = tuple(paths)

    def offer(self, handler: CompletionHandler) -> tuple[ShmEndpoint, Mapping[str, Any]]:
        """See `Fabric.offer`."""
        endpoint = ShmEndpoint(handler)
        endpoint.listener = handshake.ShmListener(
            self._paths, lambda peer: endpoint.attach(peer, passive=True), handshake.OFFER_LIFETIME
        )
        return endpoint, endpoint.listener.offer

    def connect(self, offer: Mapping[str, Any], handler: CompletionHandler) -> ShmEndpoint:
        """See `Fabric.connect`."""
        endpoint = ShmEndpoint(handler)
        endpoint.attach(handshake.dial(offer, self._paths), passive=False)
        return endpoint
