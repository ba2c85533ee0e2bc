"""What all connections of a process share: settings, memory budget, pool, and what this host can do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.channel import ChannelLimits, LinkContext
from nvflare_rdma.fabric import (
    Fabric,
    FabricFactory,
    LinkEnd,
    MemoryBudget,
    SendMemory,
    SlotPool,
    TcpFabric,
    factories,
    host_identity,
    probe,
)
from nvflare_rdma.settings import Settings, load_settings


@dataclass(frozen=True)
class Runtime:
    """`context` is for links that carry FLARE's frames; its budget and pool are everybody's. `factories` makes the
    fabrics that this process can use, by name."""

    settings: Settings
    context: LinkContext
    factories: Mapping[str, FabricFactory]

    def tcp(self, dial: Callable[[], socket.socket] | None = None) -> TcpFabric:
        """The tcp fabric of a door, or of a link that `dial` makes the rails of."""
        return TcpFabric(self.settings.rdma_rails, dial, self.settings.rdma_tcp_congestion)

    def fabrics(self, tcp: TcpFabric, sock: socket.socket) -> dict[str, Fabric]:
        """What a link whose control stream is on `sock` can use; `tcp` is its own, or that of the door it came by."""
        end = LinkEnd(str(sock.getsockname()[0]))
        others = {name: make(end) for name, make in self.factories.items() if name != tcp.name}
        return {tcp.name: tcp, **others}


_runtimes: dict[Settings, Runtime] = {}
_lock = threading.Lock()


def this_runtime() -> Runtime:
    """The runtime for the settings as they are now, one for all callers.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = load_settings()
    with _lock:
        if settings not in _runtimes:
            _runtimes[settings] = Runtime(settings, _make_context(settings), factories(settings.fabric_options))
        return _runtimes[settings]


def _make_context(settings: Settings) -> LinkContext:
    from nvflare.fuel.f3.drivers.net_utils import MAX_FRAME_SIZE

    return LinkContext(
        limits=ChannelLimits(max_message_bytes=MAX_FRAME_SIZE),
        **make_memory(settings.rdma_memory_budget_bytes),
        order=settings.rdma_fabrics,
        unavailable={name: state.reason for name, state in probe(settings.fabric_options).items()},
        host=host_identity(),
        controller=settings.rdma_controller,
        chunk_bytes=settings.rdma_chunk_bytes,
        integrity=settings.rdma_integrity,
    )


def make_memory(budget: int) -> dict[str, Any]:
    """The parts of a `LinkContext` that hold memory, together at most `budget` bytes: a sixteenth is left for chunks
    that several receivers want (`EncodedChunkCache`), three are for what is sent, twelve for what arrives."""
    sixteenth, pool = budget // 16, SlotPool(keep_bytes=None)
    return {"budget": MemoryBudget(12 * sixteenth), "pool": pool, "sending": SendMemory(pool, 3 * sixteenth)}
