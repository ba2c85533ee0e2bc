"""What a message is made of, where that is not one buffer: chunks that are made when they are written, and consumed
when they have landed.

A message with a ``label`` (not 0) is one that its receiver knows of from elsewhere: `Link.offer` sends it, and the
receiving link finds the `Sink` for it by the label. Chunks of such a message begin at multiples of the sink's ``unit``,
so that both sides can encode and decode each of them on its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

#: Gives writable memory of so many bytes, for as long as a view of it is left. It may have to wait.
Take: TypeAlias = Callable[[int], memoryview]


class Source(ABC):
    """``nbytes``: what is sent, more than 0."""

    nbytes: int
    ready = True
    """Whether `read` does no work."""

    @abstractmethod
    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """That part of the message; nothing of it changes until no view of it is left. What has to be made for it is
        made in memory that ``take`` gives: once in a call. Called by rail threads, by several at once, for a chunk
        again if it was lost. What it raises as RdmaError or OSError fails the message."""


class Sink(ABC):
    """``nbytes``: the length that is expected. ``unit``: where chunks may begin, 1 for anywhere, else from
    `MIN_CHUNK_BYTES` to `MAX_UNIT_BYTES`."""

    nbytes: int
    unit: int = 1
    resent_chunks: int = 0
    """Counted by the link: chunks that were asked for again, in whatever pieces."""

    @property
    def buffer(self) -> memoryview | None:
        """Where the message is to land, writable and contiguous; it counts to no budget. None: chunks land in slots,
        from which `put` takes them."""
        return None

    def put(self, offset: int, chunk: memoryview) -> None:
        """Consume a chunk that was verified; it is gone afterwards. Called by rail threads, by several at once, for a
        chunk again if its rail broke in that moment. What it raises as RdmaError or OSError fails the message."""
        raise NotImplementedError

    @abstractmethod
    def done(self) -> None:
        """Everything is in, and no thread is in `put` any more."""

    @abstractmethod
    def failed(self, reason: str) -> None:
        """It will not come, or not all of it. The buffer may still be written for a moment: don't use it again."""


class BufferSource(Source):
    """A message in memory."""

    def __init__(self, buffer: memoryview) -> None:
        self.nbytes = len(buffer)
        self._buffer = buffer

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        return self._buffer[offset : offset + length]
