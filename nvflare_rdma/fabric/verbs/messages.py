"""What the two sides of a rail send each other: the requests of a write, the notice that follows them, the greeting."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.verbs.ports import Access, Port
from nvflare_rdma.fabric.verbs.queue_pair import Work
from nvflare_rdma.fabric.verbs.registration_cache import Segment

_NOTICE = struct.Struct("!IIQ")
MESSAGE_BYTES = _NOTICE.size
#: The first message over a rail. From the passive side its acknowledgement shows that both ways are open. From the
#: active side it opens an iWARP connection, whose initiator has to speak first (MPA, RFC 5044, 7.1).
GREETING = b"NVRAIL"


@dataclass(frozen=True, slots=True)
class Notice:
    """A write of `length` bytes is complete, see `CompletionHandler.landed`."""

    notification: int
    length: int
    digest: int

    def pack(self) -> bytes:
        """The message that says so."""
        return _NOTICE.pack(self.notification, self.length, self.digest)


def read(message: bytes) -> Notice | None:
    """None: a greeting. Raises ValueError: it is neither that nor a notice."""
    if len(message) == MESSAGE_BYTES:
        return Notice(*_NOTICE.unpack(message))
    if message != GREETING:
        raise ValueError(f"{len(message)} bytes are neither a notice nor a greeting")
    return None


def writes_of(segments: Sequence[Segment], remote: RemoteSlice, max_message: int, max_segments: int) -> list[Work]:
    """Requests that write `segments` one after the other: a request has up to `max_message` bytes, in up to
    `max_segments` pieces."""
    works: list[Work] = []
    pieces: list[Segment] = []
    address, length = remote.address, 0
    for segment in segments:
        at, left = segment.address, segment.length
        while left:
            if length == max_message or len(pieces) == max_segments:
                works.append(Work(pieces, (address, remote.key)))
                pieces, address, length = [], address + length, 0
            part = min(left, max_message - length)
            pieces.append(Segment(at, part, segment.lkey))
            at, left, length = at + part, left - part, length + part
    if pieces:
        works.append(Work(pieces, (address, remote.key)))
    return works


class MessageRing:
    """Registered places for messages."""

    def __init__(self, port: Port, count: int, access: Access) -> None:
        self._memory = np.zeros((count, MESSAGE_BYTES), np.uint8)
        self._address = int(self._memory.__array_interface__["data"][0])
        self.region = port.register(self._address, self._memory.nbytes, access)

    def put(self, place: int, data: bytes) -> Segment:
        """Write a message to a place; the memory that it is in."""
        self._memory[place, : len(data)] = np.frombuffer(data, np.uint8)
        return self.segment(place, len(data))

    def segment(self, place: int, length: int = MESSAGE_BYTES) -> Segment:
        """The memory of a place, for a work request."""
        return Segment(self._address + place * MESSAGE_BYTES, length, self.region.lkey)

    def get(self, place: int, length: int) -> bytes:
        """The message at a place."""
        return self._memory[place, :length].tobytes()
