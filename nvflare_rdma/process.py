"""What all connections of a process share: settings, memory budget, pool, and what this host can do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.channel.context import LinkContext
from nvflare_rdma.channel.limits import ChannelLimits
from nvflare_rdma.fabric.base import Fabric
from nvflare_rdma.fabric.memory import MemoryBudget, SendMemory, SlotPool
from nvflare_rdma.fabric.selection import host_identity, probe
from nvflare_rdma.fabric.shm import ShmFabric
from nvflare_rdma.fabric.tcp import TcpFabric
from nvflare_rdma.fabric.verbs_memory import RegistrationCache
from nvflare_rdma.settings import Settings, load_settings


@dataclass(frozen=True)
class Process:
    """``context`` is for links that carry FLARE's frames; its budget and pool are everybody's."""

    settings: Settings
    context: LinkContext
    registrations: RegistrationCache

    def tcp(self, dial: Callable[[], socket.socket] | None = None) -> TcpFabric:
        """The tcp fabric of a door, or of a link that ``dial`` makes the rails of."""
        return TcpFabric(self.settings.rdma_rails, dial, self.settings.rdma_tcp_congestion)

    def fabrics(self, tcp: TcpFabric, sock: socket.socket) -> dict[str, Fabric]:
        """What a link whose control stream is on ``sock`` can use."""
        found: dict[str, Fabric] = {tcp.name: tcp, ShmFabric.name: ShmFabric()}
        if self.context.unavailable["verbs"] == "":
            # Not at the top: it needs pyverbs.
            from nvflare_rdma.fabric.verbs import VerbsFabric, address_on

            near = address_on(sock.getsockname()[0])
            found["verbs"] = VerbsFabric(self.settings.rdma_rails, self.settings.verbs, self.registrations, near)
        return found


_processes: dict[Settings, Process] = {}
_lock = threading.Lock()


def this_process() -> Process:
    """One for the settings as they are now, also if several ask at once.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = load_settings()
    with _lock:
        if settings not in _processes:
            registrations = RegistrationCache(settings.rdma_memory_budget_bytes)
            _processes[settings] = Process(settings, _make_context(settings), registrations)
        return _processes[settings]


def _make_context(settings: Settings) -> LinkContext:
    from nvflare.fuel.f3.drivers.net_utils import MAX_FRAME_SIZE

    return LinkContext(
        limits=ChannelLimits(max_message_bytes=MAX_FRAME_SIZE),
        **make_memory(settings.rdma_memory_budget_bytes),
        order=settings.rdma_fabrics,
        unavailable={
            name: state.reason for name, state in probe(settings.verbs, settings.rdma_memory_budget_bytes).items()
        },
        host=host_identity(),
        controller=settings.rdma_controller,
        chunk_bytes=settings.rdma_chunk_bytes,
        integrity=settings.rdma_integrity,
    )


def make_memory(budget: int) -> dict[str, Any]:
    """The parts of a `LinkContext` that hold memory, together at most ``budget`` bytes: a sixteenth is left for chunks
    that several receivers want (`streaming.encoded.HotChunks`), three are for what is sent, twelve for what arrives."""
    sixteenth, pool = budget // 16, SlotPool(keep_bytes=None)
    return {"budget": MemoryBudget(12 * sixteenth), "pool": pool, "sending": SendMemory(pool, 3 * sixteenth)}
