"""Encodes tensors piece by piece into the memory that they are sent from, and decodes them out of what has come.

The encoded tensor is nowhere as a whole. A chunk that several receivers want at about the same time is encoded once,
and kept for a moment.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from nvflare_rdma.channel import Source, Take
from nvflare_rdma.codecs import NUMPY_DTYPES, Array, is_on_gpu, lost_by, piece_notes, read_run, to_array
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.transfer.pieces import PieceLayout

#: Gives scratch memory of at least so many bytes, which holds until it is called the next time.
Scratch: TypeAlias = Callable[[int], Any]


class _ThreadMemory(threading.local):
    memory = np.empty(0, np.uint8)


_thread_memory = _ThreadMemory()


def thread_scratch(nbytes: int) -> Any:
    """The calling thread's memory for the values of a piece. It has in it what was left there."""
    if _thread_memory.memory.size < nbytes:
        _thread_memory.memory = np.empty(nbytes, np.uint8)
    return _thread_memory.memory


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an encoded tensor in a chunk: values `first` to `last` (exclusive), whose encoded bytes are
    `encoded`."""

    layout: PieceLayout
    dtype: Any
    first: int
    last: int
    encoded: memoryview

    @property
    def start(self) -> int:
        """Where its values begin among the tensor's bytes."""
        return self.first * int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return (self.last - self.first) * int(self.dtype.itemsize)

    def room(self, scratch: Scratch = thread_scratch) -> memoryview:
        """Scratch memory for its values."""
        whole = self.layout.values * self.dtype.itemsize  # the same for all pieces of a tensor
        return memoryview(scratch(whole))[: self.nbytes]

    def encode(self, values: memoryview) -> None:
        """Encode `values`. Raises UnrepresentableError if the codec can't carry them."""
        self.layout.codec.encode_into(np.frombuffer(values, self.dtype), self.encoded)

    def decode(self, out: memoryview) -> None:
        """Decode its values to `out`. Raises CodecError for damaged bytes, as far as the codec can see that."""
        values: Array = np.frombuffer(out, self.dtype)
        assert values.size == self.last - self.first
        self.layout.codec.decode_into(self.encoded, values)


def pieces_in(layout: PieceLayout, dtype: str, offset: int, chunk: memoryview) -> Iterator[Piece]:
    """The pieces in a chunk of the message, which lies at `offset` there. `dtype` is the name of the tensor's."""
    for first, last, place in layout.pieces(offset, len(chunk)):
        yield Piece(layout, NUMPY_DTYPES[dtype], first, last, chunk[place])


def decode_pieces(
    layout: PieceLayout, dtype: str, offset: int, chunk: memoryview, memory: memoryview | None = None
) -> Iterator[tuple[int, memoryview]]:
    """Decode the pieces in a chunk, and give where the values of each begin among the tensor's bytes, and their bytes.

    They are decoded straight into `memory`, which is for the whole tensor; or if it is None, into scratch memory that
    the next piece overwrites.

    Raises:
        CodecError: damaged bytes, as far as the codec can see that.
    """
    for piece in pieces_in(layout, dtype, offset, chunk):
        start = piece.start
        out = piece.room() if memory is None else memory[start : start + piece.nbytes]
        piece.decode(out)
        yield start, out


class EncodedChunkCache:
    """Keeps encoded chunks that went to one receiver a moment ago, as others are about to ask for the same.

    It holds at most `limit` bytes. It also knows the `Encoding` of each tensor that is being sent.
    """

    def __init__(self, limit: int = 4 << 20) -> None:
        self.limit = limit
        self._lock = threading.RLock()  # `forget` may run inside any allocation
        self._chunks: OrderedDict[tuple[int, int, int], memoryview] = OrderedDict()
        self._held = 0
        #: Locks of the chunks that are being encoded now.
        self._making: weakref.WeakValueDictionary[tuple[int, int, int], Any] = weakref.WeakValueDictionary()
        self._opening = threading.RLock()
        self._encodings: weakref.WeakValueDictionary[int, Encoding] = weakref.WeakValueDictionary()

    def encoding(self, tensor: Any, layout: PieceLayout) -> Encoding:
        """The encoding of a tensor, which all its sources share while there is one."""
        with self._opening:
            found = self._encodings.get(id(tensor))
            if found is None or found.tensor is not tensor or found.layout != layout:
                found = self._encodings[id(tensor)] = Encoding(tensor, layout, self)
            return found

    def get(self, key: tuple[int, int, int]) -> memoryview | None:
        """The chunk that was `put` under `key`, if it is still here."""
        with self._lock:
            return self._chunks.get(key)

    def making(self, key: tuple[int, int, int]) -> Any:
        """A lock to encode a chunk under: who waits for the lock finds the chunk here afterwards."""
        with self._lock:
            return self._making.setdefault(key, threading.Lock())

    def put(self, key: tuple[int, int, int], chunk: memoryview) -> None:
        """Keep a copy of a chunk."""
        if len(chunk) > self.limit:
            return
        copy = memoryview(bytes(chunk))
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = copy
                self._held += len(copy)
            while self._chunks and self._held > self.limit:
                _, oldest = self._chunks.popitem(last=False)
                self._held -= len(oldest)

    def forget(self, owner: int) -> None:
        """Drop the chunks of an encoding that is gone."""
        with self._lock:
            for key in tuple(self._chunks):
                if key[0] == owner and (chunk := self._chunks.pop(key, None)) is not None:
                    self._held -= len(chunk)


class SharedChunks(ABC):
    """Makes the chunks of one message for all its receivers, once for those that ask at about the same time."""

    def __init__(self, nbytes: int, cache: EncodedChunkCache) -> None:
        self.nbytes = nbytes
        self.unrepresentable = ""
        """Why something in it can't be encoded and has to travel exact; "" as long as that is not known."""
        self.sources: weakref.WeakSet[SharedSource] = weakref.WeakSet()
        self._cache = cache
        weakref.finalize(self, cache.forget, id(self)).atexit = False

    @abstractmethod
    def _fill(self, offset: int, chunk: memoryview) -> None:
        """Make the bytes of the message that begin at `offset`. Raises UnrepresentableError."""

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        key = id(self), offset, length
        if len(self.sources) < 2:
            return self._make(offset, take(length))
        if (chunk := self._cache.get(key)) is not None:
            return chunk
        # Not under the lock: who waits for room would hold up all others.
        slot = take(length)
        with self._cache.making(key):
            if (chunk := self._cache.get(key)) is None:
                chunk = self._make(offset, slot)
                self._cache.put(key, chunk)
        return chunk

    def _make(self, offset: int, chunk: memoryview) -> memoryview:
        try:
            self._fill(offset, chunk)
        except UnrepresentableError as error:
            self.unrepresentable = str(error)
            raise
        return chunk


class SharedSource(Source):
    """The bytes of one message for one receiver."""

    ready = False

    def __init__(self, chunks: SharedChunks) -> None:
        self.nbytes = chunks.nbytes
        self.chunks = chunks
        chunks.sources.add(self)

    @property
    def unrepresentable(self) -> str:
        """See `Source.unrepresentable`."""
        return self.chunks.unrepresentable

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        return self.chunks.read(offset, length, take)


class Encoding(SharedChunks):
    """Encodes one marked tensor. It must not change while it is sent."""

    def __init__(self, tensor: Any, layout: PieceLayout, cache: EncodedChunkCache) -> None:
        super().__init__(layout.nbytes, cache)
        self.tensor = tensor
        self.layout = layout
        self._encoder = PieceEncoder(tensor, layout)

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`. Whoever reads the last chunk hears if the tensor has lost too much: others may have had
        the chunks made that this one reads."""
        chunk = super().read(offset, length, take)
        try:
            self._encoder.check()
        except UnrepresentableError as error:
            self.unrepresentable = str(error)
            raise
        return chunk

    def _fill(self, offset: int, chunk: memoryview) -> None:
        self._encoder.fill(offset, chunk)


class PieceEncoder:
    """Encodes pieces of one marked tensor, where it is: on the CPU, or on a GPU. Notes what became of each
    (`nvflare_rdma.codecs.piece_notes`)."""

    def __init__(self, tensor: Any, layout: PieceLayout) -> None:
        self._tensor = tensor
        self._layout = layout
        self._notes = piece_notes(tensor)
        self._flat: Any = None
        self._array = None if is_on_gpu(tensor) else to_array(tensor)

    def fill(self, offset: int, chunk: memoryview) -> None:
        """Make the encoded bytes that begin at `offset`, which is where a piece does.

        Raises:
            UnrepresentableError: the codec can't carry the values.
        """
        for first, last, place in self._layout.pieces(offset, len(chunk)):
            self._encode(first, last, chunk[place])

    def check(self) -> None:
        """Look at what was lost, if there is a limit to that and all of the tensor has been encoded.

        Raises:
            UnrepresentableError: it is too much.
        """
        if (error := self._notes.excess(self._layout.count)) is not None:
            raise UnrepresentableError(
                f"{self._layout.codec.name} loses {error:.3g} of it, and max_relative_error is {self._notes.limit:g}"
            )

    def _note(self, first: int, values: Any, encoded: memoryview) -> None:
        """Note an encoded piece, once: other receivers, or the same one once more, get the same bytes."""
        notes = self._notes
        if not notes.knows(first):
            # What lies on a GPU comes here for this.
            measured = None if notes.limit is None else lost_by(self._layout.codec, encoded, to_array(values))
            notes.note(first, encoded, measured)

    def _encode(self, first: int, last: int, out: memoryview) -> None:
        codec, array = self._layout.codec, self._array
        if array is None:
            from nvflare_rdma.codecs import can_encode_on_device, encode_on_device

            if self._flat is None:
                self._flat = self._tensor.detach().reshape(-1)  # a copy on its device if not contiguous, once
            piece = self._flat[first:last]
            if can_encode_on_device(codec):
                out[:] = encode_on_device(codec, piece).data
                self._note(first, piece, out)
                return
            values = to_array(piece)
        elif array.flags.c_contiguous:
            values = array.reshape(-1)[first:last]
        else:
            values = np.frombuffer(thread_scratch(self._layout.values * array.itemsize), array.dtype, last - first)
            read_run(array, first, values)
        codec.encode_into(values, out)
        self._note(first, values, out)
