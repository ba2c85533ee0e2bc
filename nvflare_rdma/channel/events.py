"""What the channel core asks of, or tells, whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from nvflare_rdma.channel.wire import Hello
from nvflare_rdma.fabric.base import RemoteSlice


@dataclass(frozen=True, slots=True)
class ChooseFabric:
    """Passive: pick a fabric that both sides can use and call `Channel.choose`."""

    peer: Hello


@dataclass(frozen=True, slots=True)
class OpenRails:
    """Active: open rails as offered and call `Channel.dialled`."""

    fabric: str
    offer: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Opened:
    """Messages can be sent now. ``rails`` is 0 when everything has to use the control stream, and why."""

    rails: int
    reason: str


@dataclass(frozen=True, slots=True)
class InlineReceived:
    payload: bytes


@dataclass(frozen=True, slots=True)
class MessageOffered:
    """Find ``length`` bytes, then call `Channel.accept`; or `Channel.refuse`."""

    transfer: int
    length: int


@dataclass(frozen=True, slots=True)
class ExposeChunk:
    """Expose memory for ``length`` bytes of the message at ``offset``, then call `Channel.exposed`."""

    transfer: int
    index: int
    offset: int
    length: int
    notification: int


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """Write ``length`` bytes of the message at ``offset``; `Channel.written` when the source is free again."""

    transfer: int
    index: int
    offset: int
    length: int
    remote: RemoteSlice
    notification: int


@dataclass(frozen=True, slots=True)
class DataArrived:
    """A chunk came on the control stream: put it where ``notification`` points and call `Channel.landed`."""

    notification: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class MessageReceived:
    transfer: int


@dataclass(frozen=True, slots=True)
class MessageSent:
    """The peer has everything; the source buffer may be freed."""

    transfer: int


@dataclass(frozen=True, slots=True)
class SendFailed:
    transfer: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    transfer: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The peer said goodbye; ``reason`` is "" when nothing was wrong."""

    reason: str


Event: TypeAlias = (
    ChooseFabric
    | OpenRails
    | Opened
    | InlineReceived
    | MessageOffered
    | ExposeChunk
    | WriteChunk
    | DataArrived
    | MessageReceived
    | MessageSent
    | SendFailed
    | ReceiveFailed
    | PeerLeft
)
