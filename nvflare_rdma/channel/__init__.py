"""Links between peers: messages go to the peer over the rails of a fabric, at the pace of their receiver.

    Door, dial           how two processes come to a control stream
    SharedPorts          doors that take more than what they were opened for
    Link                 one connection to a peer: `send` a message, or `offer` one that the peer knows by a label
    Source, Sink         a message whose chunks are made when they are written, and consumed when they have landed
    LinkContext          what the links of a process share: memory, limits, settings

`protocol` has the rules by which links talk, without I/O; `controllers` decide how much is on its way at once. This
module loads what it names when it is asked for: some of it needs packages that `nvflare-rdma doctor` does without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvflare_rdma.channel.bodies import Later, Sink, Source, Take
    from nvflare_rdma.channel.context import LinkContext
    from nvflare_rdma.channel.control import ControlStream
    from nvflare_rdma.channel.deferred import Delivery
    from nvflare_rdma.channel.door import (
        GREETING_TIMEOUT,
        MAGIC_BYTES,
        Door,
        Listener,
        Pending,
        address_of,
        dial,
    )
    from nvflare_rdma.channel.guests import source_of
    from nvflare_rdma.channel.link import Link
    from nvflare_rdma.channel.outbox import Sending
    from nvflare_rdma.channel.protocol import Role
    from nvflare_rdma.channel.protocol.limits import MAX_UNIT_BYTES, MIN_CHUNK_BYTES, ChannelLimits, whole_units
    from nvflare_rdma.channel.shared_ports import SharedPorts, Taker

__all__ = [
    "GREETING_TIMEOUT",
    "MAGIC_BYTES",
    "MAX_UNIT_BYTES",
    "MIN_CHUNK_BYTES",
    "ChannelLimits",
    "ControlStream",
    "Delivery",
    "Door",
    "Later",
    "Link",
    "LinkContext",
    "Listener",
    "Pending",
    "Role",
    "Sending",
    "SharedPorts",
    "Sink",
    "Source",
    "Take",
    "Taker",
    "address_of",
    "dial",
    "source_of",
    "whole_units",
]

_MODULES = {
    **dict.fromkeys(("Later", "Sink", "Source", "Take"), "bodies"),
    "LinkContext": "context",
    "ControlStream": "control",
    "Delivery": "deferred",
    **dict.fromkeys(("GREETING_TIMEOUT", "MAGIC_BYTES", "Door", "Listener", "Pending", "address_of", "dial"), "door"),
    "source_of": "guests",
    "Link": "link",
    "Sending": "outbox",
    **dict.fromkeys(("MAX_UNIT_BYTES", "MIN_CHUNK_BYTES", "ChannelLimits", "whole_units"), "protocol.limits"),
    "Role": "protocol.state",
    **dict.fromkeys(("SharedPorts", "Taker"), "shared_ports"),
}

if not TYPE_CHECKING:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
