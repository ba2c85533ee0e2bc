"""What a check sends, and where it lands: random bytes that are as a tensor is, exact or in a codec, and a bounded
amount of memory for those that come."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from nvflare_rdma.channel import Sink, Source, Take
from nvflare_rdma.transfer import InMemory, Item, PieceLayout, TensorContent, store_chunk

_BLOCK = 1024 * 1024


@functools.cache
def noise(nbytes: int) -> memoryview:
    """What is sent exact: nothing on the way can make it smaller."""
    return memoryview(os.urandom(_BLOCK) * -(-nbytes // _BLOCK))[:nbytes]


@functools.cache
def _values(count: int) -> Any:
    """What is sent in a codec: as weights are, normally distributed."""
    import numpy as np

    block = np.random.default_rng().standard_normal(_BLOCK // 4, np.float32)
    return np.resize(block, count)


def item_of(nbytes: int, codec: str) -> Item:
    """A tensor of so many bytes, as it travels: float32 in a codec, or exact if `codec` is ""."""
    if not codec:
        return Item("tensor", False, "uint8", (nbytes,))
    from nvflare_rdma.codecs import FixedSizeCodec, get_codec

    made = get_codec(codec)
    assert isinstance(made, FixedSizeCodec)
    return Item("tensor", False, "float32", (nbytes // 4,), cut=PieceLayout.choose(made, nbytes // 4))


def source_of(nbytes: int, codec: str, most: int) -> Source:
    """The bytes of one message, none of which is larger than `most`."""
    if not codec:
        return _Noise(nbytes, noise(most))
    from nvflare_rdma.codecs import FixedSizeCodec, get_codec, marked

    item, made = item_of(nbytes, codec), get_codec(codec)
    assert isinstance(made, FixedSizeCodec)
    # With a content of its own: others would share its chunks, as the receivers of one tensor do.
    return TensorContent({item.name: marked(_values(most // 4)[: nbytes // 4], made)}).source(item)


class _Noise(Source):
    def __init__(self, nbytes: int, memory: memoryview) -> None:
        self.nbytes = nbytes
        self._memory = memory

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        return self._memory[offset : offset + length]


class Room:
    """Memory for so many messages at once. Each has its own, as tensors have: chunks are compared where they land.
    There are never more places than that: one whose message has broken off counts until `replace`."""

    def __init__(self, place_bytes: int, places: int) -> None:
        self._place_bytes = place_bytes
        self._lock = threading.Lock()
        self._free: list[memoryview] = []
        self._unmade = places
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, again: Callable[[], None]) -> memoryview | None:
        """A place; None if there is none, and `again` is called when there is."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._unmade:
                place = memoryview(bytearray(self._place_bytes))
                self._unmade -= 1
                return place
            self._waiting.append(again)
        return None

    @property
    def is_full(self) -> bool:
        """Whether there is no place left."""
        with self._lock:
            return not self._free and not self._unmade

    def give_back(self, place: memoryview) -> None:
        """Let others have it."""
        with self._lock:
            self._free.append(place)
        self._wake()

    def replace(self, count: int) -> None:
        """There are others instead of so many places that were not given back. Their links are over: before, they may
        still be written, and a peer that has messages break off would have memory without end."""
        with self._lock:
            self._unmade += count
        self._wake()

    def _wake(self) -> None:
        """Ask those who wait until nothing is left: one whose link has ended takes nothing."""
        while True:
            with self._lock:
                if not self._waiting or not (self._free or self._unmade):
                    return
                again = self._waiting.popleft()
            again()


class Landing(Sink):
    """Takes one message into a place of `room`, and says how it went: `over` gets the reason if it has failed, else
    ""."""

    def __init__(self, item: Item, place: memoryview, room: Room, over: Callable[[str], None]) -> None:
        self.nbytes, self.unit = item.sent_nbytes, item.unit
        self._item, self._place, self._room, self._over = item, place, room, over

    @property
    def buffer(self) -> memoryview | None:
        """See `Sink.buffer`."""
        return self._place[: self.nbytes] if self._item.cut is None else None

    def put(self, offset: int, chunk: memoryview) -> None:
        """See `Sink.put`."""
        store_chunk(self._item, InMemory(self._item, self._place[: self._item.nbytes]), offset, chunk)

    def done(self) -> None:
        """See `Sink.done`."""
        self._over("")  # first: who is asked for a place may end this link
        self._room.give_back(self._place)

    def failed(self, reason: str) -> None:
        """See `Sink.failed`. Its place may still be written, so it is not given back."""
        self._over(reason or "it will not come")
