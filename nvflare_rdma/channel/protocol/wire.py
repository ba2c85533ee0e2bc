"""The control stream's messages and how they are framed.

A message is `length (u32) | type (u8) | body`, network byte order; `length` counts type and body. Bodies
are fixed structs, but for those that agree on rails (HELLO, OPEN, RAILS), which are msgpack maps so that later
versions can add keys. Every length is checked against the limits that this side chose
before anything is stored.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgpack

from nvflare_rdma.channel.protocol.limits import MAX_CHUNK_BYTES, MAX_UNIT_BYTES
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import RemoteSlice

CONTROL_MAGIC = b"NVFCTRL1"
VERSION = 6
MAX_HELLO_BYTES = 16 * 1024
MAX_REASON_BYTES = 1024
#: Of each fabric that can't be used; several of these reasons make up one line of a log.
MAX_FABRIC_REASON = 200
#: The longest chunk that travels on the control stream; what is on its way there delays everything behind it.
MAX_DATA_BYTES = 1024 * 1024

INTEGRITY = ("auto", "on", "off")

_PREFIX = struct.Struct("!IB")
_OFFER = struct.Struct("!QQQ?")
_GRANT = struct.Struct("!QQIQQIIB")
_TRANSFER = struct.Struct("!Q")
_DATA = struct.Struct("!IQ")
_U32 = struct.Struct("!I")
_DEFAULT_LIMIT = _GRANT.size + MAX_REASON_BYTES


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of each side: version, what fabrics it can use (`name -> reason why not`, "" if usable),
    the largest message and inline payload it takes, how many grants it works on at once, the key that seals the
    chunks it sends (or b""), which host it is on, whether chunks shall be checked (`auto`, `on`, `off`), and the
    longest chunk that it makes in memory of its own."""

    fabrics: Mapping[str, str]
    max_message_bytes: int
    inline_bytes: int
    max_writes: int
    seal_key: bytes = b""
    host: str = ""
    integrity: str = "auto"
    max_staged_bytes: int = MAX_CHUNK_BYTES
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Open:
    """Passive to active: the chosen fabric ("" for none but the control stream), how to reach it, and whether
    chunks are sealed, or carry a checksum."""

    fabric: str
    offer: Mapping[str, Any]
    sealed: bool = False
    checked: bool = False


@dataclass(frozen=True, slots=True)
class Rails:
    """Active to passive: how many rails it opened, and if none, why. `answer` is what the passive side's fabric has to
    know of them."""

    count: int
    reason: str = ""
    answer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RailDown:
    """A rail broke on this side. Its grants are void; the receiver gives them again on another."""

    rail: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RailUp:
    """Active to passive: one more rail is open, on both sides. From here on chunks may be granted over it."""

    rail: int


@dataclass(frozen=True, slots=True)
class MoreRails:
    """Passive to active: what this side sends would go faster over `count` rails. Nothing has to follow from it."""

    count: int


@dataclass(frozen=True, slots=True)
class Reopen:
    """Active to passive: no rail is left; all grants are void. Choose a fabric again."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Inline:
    """A whole small message."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """Sender: there is a message of `length` bytes. `label` is 0, or what the receiver knows it by. `staged` says that
    each of its chunks is made in memory of the sender's, and is no longer than the sender's HELLO allows for that."""

    transfer: int
    length: int
    label: int = 0
    staged: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Receiver: write `length` bytes of the message at `offset` to `remote` over `rail`, and notify with
    `notification`. Every grant is answered by one write, which is empty if the sender gave the message up."""

    transfer: int
    offset: int
    length: int
    remote: RemoteSlice
    notification: int
    rail: int


@dataclass(frozen=True, slots=True)
class Data:
    """A write that travels on the control stream because there is no rail."""

    notification: int
    digest: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Receiver: everything is in and verified."""

    transfer: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Receiver: what was offered is not taken, or not any longer."""

    transfer: int
    reason: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Sender: what was offered will not come."""

    transfer: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a sign of life."""


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to all `Ping`s that have come so far."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The connection ends; `reason` is "" when nothing is wrong."""

    reason: str = ""


Message: TypeAlias = (
    Hello
    | Open
    | Rails
    | RailDown
    | RailUp
    | MoreRails
    | Reopen
    | Inline
    | Offer
    | Grant
    | Data
    | Done
    | Refuse
    | Withdraw
    | Ping
    | Pong
    | Bye
)

_TYPES: dict[type, int] = {
    Hello: 1,
    Open: 2,
    Rails: 3,
    Inline: 4,
    Offer: 5,
    Grant: 6,
    Data: 7,
    Done: 8,
    Refuse: 9,
    Bye: 10,
    RailDown: 11,
    Reopen: 12,
    Withdraw: 13,
    Ping: 14,
    Pong: 15,
    RailUp: 16,
    MoreRails: 17,
}
_CLASSES = {number: cls for cls, number in _TYPES.items()}


def _reason(text: str) -> bytes:
    return text.encode()[:MAX_REASON_BYTES]


def _text(body: bytes) -> str:
    """A peer's words, fit for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in body.decode(errors="replace"))


def encode(message: Message) -> bytes:
    """One framed control message."""
    body: bytes
    match message:
        case Hello():
            body = msgpack.packb(
                {
                    "version": message.version,
                    "fabrics": dict(message.fabrics),
                    "max_message_bytes": message.max_message_bytes,
                    "inline_bytes": message.inline_bytes,
                    "max_writes": message.max_writes,
                    "max_staged_bytes": message.max_staged_bytes,
                    "seal_key": message.seal_key,
                    "host": message.host,
                    "integrity": message.integrity,
                }
            )
        case Open():
            body = msgpack.packb(
                {
                    "fabric": message.fabric,
                    "offer": dict(message.offer),
                    "sealed": message.sealed,
                    "checked": message.checked,
                }
            )
        case Rails():
            reason = _reason(message.reason).decode(errors="ignore")
            body = msgpack.packb({"count": message.count, "reason": reason, "answer": dict(message.answer)})
        case RailDown():
            body = _U32.pack(message.rail) + _reason(message.reason)
        case RailUp():
            body = _U32.pack(message.rail)
        case MoreRails():
            body = _U32.pack(message.count)
        case Reopen():
            body = _reason(message.reason)
        case Inline():
            body = message.payload
        case Offer():
            body = _OFFER.pack(message.transfer, message.length, message.label, message.staged)
        case Grant():
            r = message.remote
            body = _GRANT.pack(
                message.transfer,
                message.offset,
                message.length,
                r.key,
                r.address,
                r.length,
                message.notification,
                message.rail,
            )
        case Data():
            body = _DATA.pack(message.notification, message.digest) + message.payload
        case Done():
            body = _TRANSFER.pack(message.transfer)
        case Refuse() | Withdraw():
            body = _TRANSFER.pack(message.transfer) + _reason(message.reason)
        case Bye():
            body = _reason(message.reason)
        case Ping() | Pong():
            body = b""
    return _PREFIX.pack(len(body) + 1, _TYPES[type(message)]) + body


def _field(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if type(value) is not kind:
        raise ProtocolError(f"field {name!r} should be {kind.__name__}, but is {type(value).__name__}")
    return value


def _decode_hello(body: Mapping[str, Any]) -> Hello:
    version = _field(body, "version", int)
    if version != VERSION:
        raise ProtocolError(
            f"the peer speaks channel version {version}, this side {VERSION}: install the same nvflare-rdma release"
        )
    fabrics = _field(body, "fabrics", dict)
    if any(type(k) is not str or type(v) is not str for k, v in fabrics.items()):
        raise ProtocolError("field 'fabrics' should map names to reasons")
    hello = Hello(
        {name: _text(reason.encode(errors="replace"))[:MAX_FABRIC_REASON] for name, reason in fabrics.items()},
        _field(body, "max_message_bytes", int),
        _field(body, "inline_bytes", int),
        _field(body, "max_writes", int),
        _field(body, "seal_key", bytes),
        _field(body, "host", str),
        _field(body, "integrity", str),
        _field(body, "max_staged_bytes", int),
    )
    sizes_ok = hello.max_message_bytes >= 0 and hello.inline_bytes >= 0 and hello.max_writes > 0
    if hello.max_staged_bytes < MAX_UNIT_BYTES:
        raise ProtocolError(f"the peer makes chunks of {hello.max_staged_bytes} bytes, {MAX_UNIT_BYTES} are the least")
    if not sizes_ok or len(hello.seal_key) not in (0, 32) or hello.integrity not in INTEGRITY:
        raise ProtocolError("a field of the peer's HELLO is out of range")
    return hello


def _decode(cls: type, body: bytes) -> Message:
    if cls is Inline:
        return Inline(body)
    if cls is Offer:
        return Offer(*_OFFER.unpack(body))
    if cls is Grant:
        transfer, offset, length, key, address, remote_length, notification, rail = _GRANT.unpack(body)
        return Grant(transfer, offset, length, RemoteSlice(key, address, remote_length), notification, rail)
    if cls is Data:
        notification, digest = _DATA.unpack_from(body)
        return Data(notification, digest, body[_DATA.size :])
    if cls is Done:
        return Done(*_TRANSFER.unpack(body))
    if cls is Refuse:
        return Refuse(_TRANSFER.unpack_from(body)[0], _text(body[_TRANSFER.size :]))
    if cls is Withdraw:
        return Withdraw(_TRANSFER.unpack_from(body)[0], _text(body[_TRANSFER.size :]))
    if cls is RailDown:
        return RailDown(_U32.unpack_from(body)[0], _text(body[_U32.size :]))
    if cls is RailUp or cls is MoreRails:
        number = _U32.unpack(body)[0]
        return RailUp(number) if cls is RailUp else MoreRails(number)
    if cls is Reopen:
        return Reopen(_text(body))
    if cls is Bye:
        return Bye(_text(body))
    if cls is Ping or cls is Pong:
        if body:
            raise ValueError(f"{len(body)} bytes where there are none")
        return Ping() if cls is Ping else Pong()
    fields = msgpack.unpackb(body)  # its size was checked with the prefix
    if not isinstance(fields, dict):
        raise ProtocolError("the body should be a map")
    if cls is Hello:
        return _decode_hello(fields)
    if cls is Rails:
        count, reason = _field(fields, "count", int), _field(fields, "reason", str)
        if count < 0:
            raise ProtocolError(f"the peer opened {count} rails")
        reason = _text(reason.encode(errors="replace")[:MAX_REASON_BYTES])
        return Rails(count, reason, _field(fields, "answer", dict))
    return Open(
        _field(fields, "fabric", str),
        _field(fields, "offer", dict),
        _field(fields, "sealed", bool),
        _field(fields, "checked", bool),
    )


class Parser:
    """Bytes in, messages out. Never holds more than one message of the largest size that is allowed."""

    def __init__(self, max_inline_bytes: int, max_data_bytes: int) -> None:
        self._limits = {
            Hello: MAX_HELLO_BYTES,
            Open: MAX_HELLO_BYTES,
            Rails: MAX_HELLO_BYTES,
            Inline: max_inline_bytes,
            Data: max_data_bytes + _DATA.size,
        }
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Message]:
        """The messages that `data` completes.

        Raises:
            ProtocolError: a message is malformed or larger than what this side allows for its type.
        """
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _PREFIX.size:
                length, number = _PREFIX.unpack_from(self._buffer, start)
                cls = _CLASSES.get(number)
                if cls is None:
                    raise ProtocolError(f"control message of unknown type {number}")
                limit = self._limits.get(cls, _DEFAULT_LIMIT) + 1
                if not 1 <= length <= limit:
                    raise ProtocolError(f"{cls.__name__} message of {length} bytes, at most {limit} are allowed")
                end = start + _PREFIX.size + length - 1
                if len(self._buffer) < end:
                    break
                body = bytes(memoryview(self._buffer)[start + _PREFIX.size : end])
                start = end
                try:
                    message = _decode(cls, body)
                except (struct.error, ValueError, msgpack.UnpackException) as error:
                    raise ProtocolError(f"malformed {cls.__name__} message: {error}") from error
                yield message
        finally:
            del self._buffer[:start]
