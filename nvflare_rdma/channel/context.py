"""What the links of a process share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nvflare_rdma.channel.protocol import ChannelLimits
from nvflare_rdma.fabric import MemoryBudget, RailPlaces, SendMemory, SlotPool


@dataclass(frozen=True)
class LinkContext:
    """The memory, limits and settings that all links of a process share."""

    limits: ChannelLimits
    budget: MemoryBudget
    pool: SlotPool
    sending: SendMemory
    order: Sequence[str]
    unavailable: Mapping[str, str]
    """Fabric name -> reason why this process can't use it, "" if it can."""
    host: str = ""
    """Who this host is: equal for two processes that can use shared memory, "" if that can't be told."""
    controller: str = "fixed"
    chunk_bytes: int = 1024 * 1024
    same_host_factor: int = 1
    """By how much chunks are longer than `chunk_bytes` in memory of the same host: a chunk is one copy there and costs
    its messages, and no network has to be kept busy."""
    depth: int = 4
    integrity: str = "auto"
    window_bytes: int = 4 * 1024 * 1024
    """Outgoing bytes that may wait to be granted before `Link.send` blocks; one message may always."""
    labels_only: bool = False
    """Whether the peer may send nothing but messages with labels that are expected."""
    rail_places: RailPlaces = field(default_factory=RailPlaces)
    memory_wait: float = 150.0
    """Seconds that an offered message waits for memory before it is refused; a silent peer holds some for less."""
