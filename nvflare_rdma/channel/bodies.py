"""Sources and sinks: messages whose chunks are made when they are written, and consumed when they have landed.

`Link.offer` sends such a message under a `label` (not 0) by which its receiver knows it from elsewhere: the receiving
link finds the `Sink` for it by the label. Chunks begin at multiples of the sink's `unit`, so that both sides can encode
and decode each of them on its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

#: Gives writable memory of so many bytes, for as long as a view of it is left. It may have to wait.
Take: TypeAlias = Callable[[int], memoryview]


class Source(ABC):
    """Gives the bytes of one message, `nbytes` of them (more than 0), chunk by chunk."""

    nbytes: int
    ready = True
    """Whether `read` does no work."""

    @property
    def unrepresentable(self) -> str:
        """Why its values can't be encoded as they were to be; "" as long as no `read` has found that."""
        return ""

    @abstractmethod
    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """Return `length` bytes of the message from `offset` on. They do not change until no view of them is left.

        What has to be made for them is made in memory that `take` gives; it is called once at most. Rail threads call
        `read`, several at once, and again for a chunk that was lost. An RdmaError or OSError fails the message.
        """


class Sink(ABC):
    """Takes one message of `nbytes` bytes. Chunks of it begin at multiples of `unit`: that is 1 for anywhere, else from
    `MIN_CHUNK_BYTES` to `MAX_UNIT_BYTES`."""

    nbytes: int
    unit: int = 1
    resent_chunks: int = 0
    """Chunks that were asked for again, in whatever sizes. The link counts them."""
    landed_bytes: int = 0
    """Bytes of the message that are here, verified. The link counts them."""

    @property
    def buffer(self) -> memoryview | None:
        """Memory that the message is received straight into: writable, contiguous, and counted to no budget. If it is
        None, chunks land in slots and are passed to `put`."""
        return None

    def put(self, offset: int, chunk: memoryview) -> None:
        """Consume a chunk that was verified; its memory is gone afterwards.

        The fabric's receiving threads call this, several at once, and again for a chunk whose rail broke in that
        moment. An RdmaError or OSError fails the message.
        """
        raise NotImplementedError

    def landed(self, offset: int, length: int) -> None:
        """Called for each chunk that was verified where there is a buffer, in the way of `put`: it is there now."""
        return

    @abstractmethod
    def done(self) -> None:
        """Called when the whole message is in, and no thread is in `put` any more."""

    @abstractmethod
    def failed(self, reason: str) -> None:
        """Called when the message will not come, or not all of it. The buffer may still be written for a moment, so it
        must not be used again."""


class Later:
    """Stands for the sink of a message that has been offered before it is known what the message is."""


class BufferSource(Source):
    """A message in memory."""

    def __init__(self, buffer: memoryview) -> None:
        self.nbytes = len(buffer)
        self._buffer = buffer

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        return self._buffer[offset : offset + length]
