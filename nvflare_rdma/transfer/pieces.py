"""Tensors in few bits on their way: encoded piece by piece into the slots that they are written from, decoded out of
those they land in. The encoded tensor is nowhere as a whole.

A piece is a run of values, all of the same number but the last; its encoded bytes are a unit of the message (see
`channel.bodies`), so that any chunk can be made, and used, without the others.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nvflare_rdma.channel import MAX_UNIT_BYTES, MIN_CHUNK_BYTES, Source, Take
from nvflare_rdma.codecs import FixedSizeCodec, get_codec
from nvflare_rdma.codecs.base import Array
from nvflare_rdma.codecs.runs import read_run
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES, dtype_name, is_on_gpu, to_array
from nvflare_rdma.errors import ProtocolError, UnrepresentableError

#: In a piece, or the least power of two from here on that makes a unit: half a MiB of float32, which caches hold.
PIECE_VALUES = 1 << 17
_MAX_PIECE_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor of ``n`` values is cut into pieces of ``values``."""

    codec: FixedSizeCodec
    n: int
    values: int

    @classmethod
    def of(cls, codec: FixedSizeCodec, n: int) -> Cut:
        """The sender's choice."""
        values = PIECE_VALUES
        while codec.encoded_nbytes(values) < MIN_CHUNK_BYTES:
            values *= 2
        return cls(codec, n, values)

    @classmethod
    def given(cls, name: str, n: int, values: int) -> Cut:
        """What a sender has told.

        Raises:
            ProtocolError: no such codec, or pieces that it can't be cut into.
        """
        try:
            codec = get_codec(name)
        except ValueError:
            raise ProtocolError(f"unknown codec {name!r}") from None
        if not isinstance(codec, FixedSizeCodec):
            raise ProtocolError(f"{name} can't be cut into pieces")
        if not 0 < values <= _MAX_PIECE_VALUES or values % codec.block_size:
            raise ProtocolError(f"{name} can't be cut into pieces of {values} values")
        cut = cls(codec, n, values)
        if not MIN_CHUNK_BYTES <= cut.unit <= MAX_UNIT_BYTES:
            raise ProtocolError(f"{values} values of {name} are {cut.unit} bytes, which is no unit of a message")
        return cut

    @property
    def unit(self) -> int:
        """Bytes of a piece, encoded."""
        return self.codec.encoded_nbytes(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, encoded."""
        whole, rest = divmod(self.n, self.values)
        return whole * self.unit + (self.codec.encoded_nbytes(rest) if rest else 0)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, slice]]:
        """First and last value (exclusive) of each piece in those bytes of the message, and its place among them."""
        unit = self.unit
        for start in range(0, length, unit):
            first = (offset + start) // unit * self.values
            yield first, min(first + self.values, self.n), slice(start, min(start + unit, length))


class HotChunks:
    """Encoded chunks that went to one receiver a moment ago: others are about to ask for the same. Holds at most
    ``limit`` bytes."""

    def __init__(self, limit: int = 4 << 20) -> None:
        self.limit = limit
        self._lock = threading.RLock()  # `forget` may run inside any allocation
        self._chunks: OrderedDict[tuple[int, int, int], memoryview] = OrderedDict()
        self._held = 0
        #: For those that are being encoded now.
        self._making: weakref.WeakValueDictionary[tuple[int, int, int], Any] = weakref.WeakValueDictionary()

    def get(self, key: tuple[int, int, int]) -> memoryview | None:
        with self._lock:
            return self._chunks.get(key)

    def making(self, key: tuple[int, int, int]) -> Any:
        """A lock to encode it under: who waits for it finds it here afterwards."""
        with self._lock:
            return self._making.setdefault(key, threading.Lock())

    def put(self, key: tuple[int, int, int], chunk: memoryview) -> None:
        """Keep a copy."""
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
        """What was encoded of a tensor is of no more use."""
        with self._lock:
            for key in tuple(self._chunks):
                if key[0] == owner and (chunk := self._chunks.pop(key, None)) is not None:
                    self._held -= len(chunk)


class Encoding:
    """One marked tensor, for all its receivers. Not for tensors that change while they are sent."""

    _open: ClassVar[weakref.WeakValueDictionary[int, Encoding]] = weakref.WeakValueDictionary()
    _opening: ClassVar[Any] = threading.RLock()

    @classmethod
    def of(cls, tensor: Any, cut: Cut, hot: HotChunks) -> Encoding:
        """The tensor's, which all its sources share while there is one."""
        with cls._opening:
            found = cls._open.get(id(tensor))
            if found is None or found.tensor is not tensor or found.cut != cut:
                found = cls._open[id(tensor)] = cls(tensor, cut, hot)
            return found

    def __init__(self, tensor: Any, cut: Cut, hot: HotChunks) -> None:
        self.tensor = tensor
        self.cut = cut
        self.unrepresentable = ""
        """Why not; the tensor has to travel exact then."""
        self.sources: weakref.WeakSet[EncodedSource] = weakref.WeakSet()
        self._hot = hot
        self._flat: Any = None
        self._array = None if is_on_gpu(tensor) else to_array(tensor)
        weakref.finalize(self, hot.forget, id(self)).atexit = False

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        key = id(self), offset, length
        if len(self.sources) < 2:
            return self._fill(offset, take(length))
        if (chunk := self._hot.get(key)) is not None:
            return chunk
        # Not under the lock: who waits for room would hold up all others.
        slot = take(length)
        with self._hot.making(key):
            if (chunk := self._hot.get(key)) is None:
                chunk = self._fill(offset, slot)
                self._hot.put(key, chunk)
        return chunk

    def _fill(self, offset: int, chunk: memoryview) -> memoryview:
        try:
            for first, last, place in self.cut.pieces(offset, len(chunk)):
                self._encode(first, last, chunk[place])
        except UnrepresentableError as error:
            self.unrepresentable = str(error)
            raise
        return chunk

    def _encode(self, first: int, last: int, out: memoryview) -> None:
        codec, array = self.cut.codec, self._array
        if array is None:
            from nvflare_rdma.codecs.on_device import can_encode_on_device, encode_on_device

            if self._flat is None:
                self._flat = self.tensor.detach().reshape(-1)  # a copy on its device if it is not contiguous, once
            piece = self._flat[first:last]
            if can_encode_on_device(codec):
                out[:] = encode_on_device(codec, piece).data
                return
            values = to_array(piece)
        elif array.flags.c_contiguous:
            values = array.reshape(-1)[first:last]
        else:
            values = np.empty(last - first, array.dtype)
            read_run(array, first, values)
        codec.encode_into(values, out)


class EncodedSource(Source):
    """A marked tensor for one receiver."""

    ready = False

    def __init__(self, encoding: Encoding) -> None:
        self.nbytes = encoding.cut.nbytes
        self.encoding = encoding
        encoding.sources.add(self)

    @property
    def unrepresentable(self) -> str:
        """Why it has to travel exact, "" as long as it need not."""
        return self.encoding.unrepresentable

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        return self.encoding.read(offset, length, take)


def decode(cut: Cut, dtype: str, first: int, last: int, encoded: memoryview, out: memoryview) -> None:
    """Values ``first`` to ``last`` of a tensor of the dtype called ``dtype`` out of their piece, to ``out``.

    Raises:
        CodecError: damaged bytes, as far as the codec can see that.
    """
    values: Array = np.frombuffer(out, NUMPY_DTYPES[dtype])
    assert values.size == last - first
    cut.codec.decode_into(encoded, values)


def cut_of(tensor: Any, codec: FixedSizeCodec | None) -> Cut | None:
    """How a tensor is cut that is marked for ``codec``."""
    if codec is None or dtype_name(tensor) not in NUMPY_DTYPES:
        return None
    return Cut.of(codec, int(np.prod(tuple(tensor.shape), dtype=np.int64)))
