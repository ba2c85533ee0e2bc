"""Fabrics move bytes into memory that a peer has exposed: over TCP, shared memory or RDMA devices.

    Fabric, Endpoint, Region       the interface, which every fabric implements (`base.py`)
    probe, factories, choose       which fabrics there are, and which one two processes use (`registry.py`)
    MemoryBudget, SlotPool, SendMemory    what all transfers of a process may hold, and the memory itself

A new fabric is a module or folder here and a line in `FABRICS`. What needs numpy is loaded when it is asked for:
`nvflare-rdma doctor` looks at fabrics where numpy is missing or broken.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvflare_rdma.fabric.base import MAX_RAILS, CompletionHandler, Endpoint, Fabric, Region, RemoteSlice
from nvflare_rdma.fabric.budget import MemoryBudget, Reservation
from nvflare_rdma.fabric.interfaces import addresses_of
from nvflare_rdma.fabric.options import DEVICE_FILES, SYSFS, Availability, FabricOptions, VerbsOptions
from nvflare_rdma.fabric.rail_places import RailPlaces
from nvflare_rdma.fabric.registry import (
    FABRICS,
    FabricFactory,
    LinkEnd,
    choose,
    factories,
    host_identity,
    parse_fabrics,
    probe,
)
from nvflare_rdma.fabric.sockets import connect_tcp, join_address, keep_alive, listen_tcp, plain_host
from nvflare_rdma.fabric.threads import join_threads

if TYPE_CHECKING:
    from nvflare_rdma.fabric.send_memory import SendMemory
    from nvflare_rdma.fabric.slots import HUGE_PAGE_BYTES, SlotPool
    from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TICKET_BYTES, TcpFabric, receive_exactly

__all__ = [
    "DEVICE_FILES",
    "FABRICS",
    "HUGE_PAGE_BYTES",
    "MAX_RAILS",
    "RAIL_MAGIC",
    "SYSFS",
    "TICKET_BYTES",
    "Availability",
    "CompletionHandler",
    "Endpoint",
    "Fabric",
    "FabricFactory",
    "FabricOptions",
    "LinkEnd",
    "MemoryBudget",
    "RailPlaces",
    "Region",
    "RemoteSlice",
    "Reservation",
    "SendMemory",
    "SlotPool",
    "TcpFabric",
    "VerbsOptions",
    "addresses_of",
    "choose",
    "connect_tcp",
    "factories",
    "host_identity",
    "join_address",
    "join_threads",
    "keep_alive",
    "listen_tcp",
    "parse_fabrics",
    "plain_host",
    "probe",
    "receive_exactly",
]

_MODULES = {
    "SendMemory": "send_memory",
    **dict.fromkeys(("HUGE_PAGE_BYTES", "SlotPool"), "slots"),
    **dict.fromkeys(("RAIL_MAGIC", "TICKET_BYTES", "TcpFabric", "receive_exactly"), "tcp"),
}

if not TYPE_CHECKING:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
