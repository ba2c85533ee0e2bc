"""What a `Connection` asks of, or tells, the link that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from nvflare_rdma.channel.protocol.wire import Hello
from nvflare_rdma.fabric import RemoteSlice


@dataclass(frozen=True, slots=True)
class ChooseFabric:
    """Passive side: pick a fabric that both sides can use and call `Connection.choose`. `reason` says what went wrong
    with the last one; it is "" the first time. `opened` says that the last one had rails, and they broke."""

    peer: Hello
    reason: str = ""
    opened: bool = True


@dataclass(frozen=True, slots=True)
class OpenRails:
    """Active side: open rails as offered and call `Connection.dialled`."""

    fabric: str
    offer: Mapping[str, Any]
    sealed: bool
    checked: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """Data can move now, for the first time or again. `rails` is 0 when everything has to use the control stream;
    `reason` says why. On the passive side `answer` is for `Endpoint.accept`."""

    rails: int
    reason: str
    answer: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RailAdded:
    """One more rail carries chunks from here on."""

    rail: int


@dataclass(frozen=True, slots=True)
class GrowRails:
    """Active side: open rails beside those that are open, until there are `count`, if as many may be; call
    `Connection.rail_up` for each."""

    count: int


@dataclass(frozen=True, slots=True)
class RailsLost:
    """Every grant is void, and so is every region: close the endpoint. New rails are on their way."""

    reason: str


@dataclass(frozen=True, slots=True)
class DropRail:
    """The peer says that this rail is broken: close it, and report it down when nothing can land over it."""

    rail: int


@dataclass(frozen=True, slots=True)
class InlineReceived:
    """A small message came on the control stream."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class MessageOffered:
    """Find `length` bytes, or what the message with that `label` is for, then call `Connection.accept`; or
    `Connection.refuse`."""

    transfer: int
    length: int
    label: int


@dataclass(frozen=True, slots=True)
class ExposeChunk:
    """Expose memory for `length` bytes of the message at `offset`, then call `Connection.exposed`."""

    transfer: int
    offset: int
    length: int
    notification: int
    rail: int


@dataclass(frozen=True, slots=True)
class RevokeChunk:
    """Take back what was exposed under `notification`. If it will be `answered`, its write may still come: keep the
    memory from others until it has."""

    notification: int
    answered: bool


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """Write `length` bytes of the message at `offset` over `rail`; nothing if the message was given up.
    Call `Connection.written` when the source is free again."""

    transfer: int
    offset: int
    length: int
    remote: RemoteSlice
    notification: int
    rail: int


@dataclass(frozen=True, slots=True)
class DataArrived:
    """A chunk came on the control stream: put it where `notification` points and call `Connection.landed`."""

    notification: int
    digest: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """All of a message has landed, and was checked."""

    transfer: int


@dataclass(frozen=True, slots=True)
class MessageSent:
    """The peer has everything; the source buffer may be freed."""

    transfer: int


@dataclass(frozen=True, slots=True)
class SendFailed:
    """A message will not be sent, or not the rest of it."""

    transfer: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    """A message will not come, or not the rest of it: free its memory."""

    transfer: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The peer said goodbye; `reason` is "" when nothing was wrong."""

    reason: str


Event: TypeAlias = (
    ChooseFabric
    | OpenRails
    | Opened
    | RailAdded
    | GrowRails
    | RailsLost
    | DropRail
    | InlineReceived
    | MessageOffered
    | ExposeChunk
    | RevokeChunk
    | WriteChunk
    | DataArrived
    | MessageReceived
    | MessageSent
    | SendFailed
    | ReceiveFailed
    | PeerLeft
)
