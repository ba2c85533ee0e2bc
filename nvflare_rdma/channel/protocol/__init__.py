"""The receiver-driven chunk protocol, without I/O: time and bytes come in as arguments.

`Connection` is where to begin; `state` has every state and legal transition, `wire` the messages on the control
stream, and `events` what a connection asks of the link that runs it.
"""

from __future__ import annotations

from nvflare_rdma.channel.protocol.connection import Connection
from nvflare_rdma.channel.protocol.limits import MAX_CHUNK_BYTES, MAX_INLINE_BYTES, MIN_CHUNK_BYTES, ChannelLimits
from nvflare_rdma.channel.protocol.state import Phase, RailState, Role
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC, INTEGRITY, VERSION

__all__ = [
    "CONTROL_MAGIC",
    "INTEGRITY",
    "MAX_CHUNK_BYTES",
    "MAX_INLINE_BYTES",
    "MIN_CHUNK_BYTES",
    "VERSION",
    "ChannelLimits",
    "Connection",
    "Phase",
    "RailState",
    "Role",
]
