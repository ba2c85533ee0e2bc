"""What a codec is: a tensor's values to few bits and back, block by block, in memory that the caller owns.

An encoded piece is one run of bytes. Its *parts* are named arrays that lie one after the other in it: the scales
first, if the codec has any, then the codes. `Codec.parts` shows them as views. Sizes are known before anything is
encoded.

A piece of a tensor that starts at a multiple of `Codec.block_size` (and ends at one, or at the tensor's end) is
encoded and decoded on its own, and the parts of the pieces laid side by side equal those of the whole. A chunk
pipeline can therefore encode any block-aligned piece when it needs it.

Values are numpy arrays of any shape and strides, float32, float16, or uint16, where uint16 stands for the bit
patterns of bfloat16, which numpy lacks. They are taken in C order. float64 is refused: whoever has it should say by
casting to float32 that the loss is meant. Work goes through scratch memory that belongs to the calling thread, so
that no call allocates in proportion to the tensor and threads don't wait for each other.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvflare_rdma.codecs.bf16 import bf16_to_float32, float32_to_bf16
from nvflare_rdma.codecs.strided import read_run, write_run
from nvflare_rdma.errors import CodecError

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Parts = Mapping[str, Array]
Layout = tuple[tuple[str, Any, int], ...]

TILE = 1 << 16  # elements; 256 KiB of float32, so that a tile and its scratch stay in the second-level cache

_VALUE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint16))


class _Scratch(threading.local):
    """Named buffers of one tile, made on first use and kept by the thread."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], Array] = {}


_scratch = _Scratch()


def scratch(name: str, dtype: Any, n: int) -> Array:
    """The calling thread's buffer `name` of `n` <= `TILE` elements. Its contents are left over from before."""
    key = (name, np.dtype(dtype).str)
    buffer = _scratch.buffers.get(key)
    if buffer is None:
        buffer = _scratch.buffers[key] = np.empty(TILE, dtype)
    return buffer[:n]


class Codec(ABC):
    """One way to write float values in few bits.

    Attributes:
        name: what configs and metadata call it.
        bits: bits per value in the codes.
        block_size: where pieces of a tensor may begin, in elements: the block that shares one scale, or 1.
    """

    name: str
    bits: int
    block_size: int

    @abstractmethod
    def layout(self, n: int) -> Layout:
        """The parts of `n` encoded values in their order in memory: name, dtype and number of elements."""

    def encoded_nbytes(self, n: int) -> int:
        """Bytes that `n` values take."""
        return sum(count * np.dtype(dtype).itemsize for _, dtype, count in self.layout(n))

    def estimate_ratio(self, n: int = 1 << 20) -> float:
        """Encoded bytes over float32 bytes for a tensor of `n` values."""
        return self.encoded_nbytes(n) / (4 * n)

    def parts(self, encoded: Any, n: int) -> dict[str, Array]:
        """The parts of `n` encoded values as views of `encoded`, by name.

        Args:
            encoded: any C-contiguous buffer of exactly `encoded_nbytes(n)` bytes. Its address need not be aligned.
            n: how many values it stands for.

        Raises:
            CodecError: another size, or no buffer at all.
        """
        flat = self._bytes(encoded, n)
        views, start = {}, 0
        for name, dtype, count in self.layout(n):
            stop = start + count * np.dtype(dtype).itemsize
            views[name] = flat[start:stop].view(dtype)
            start = stop
        return views

    def encode_into(self, src: Array, out: Any) -> int:
        """Encode `src` into `out` and return how many bytes were written.

        Args:
            src: values, any shape and strides, float32, float16 or uint16 (bfloat16 bits). Not changed.
            out: a writable C-contiguous buffer of exactly `encoded_nbytes(src.size)` bytes.

        Raises:
            UnrepresentableError: a value can't be carried within `max_abs_error`; what is in `out` then means
                nothing, and the tensor has to travel exact.
            CodecError: a wrong dtype, size or layout; nothing was written.
        """
        self._check_values(src, "src")
        parts = self.parts(out, src.size)
        if not all(part.flags.writeable for part in parts.values()):
            raise CodecError(f"{self.name}: out is read-only")
        self._encode(src, parts)
        return self.encoded_nbytes(src.size)

    def decode_into(self, encoded: Any, out: Array) -> None:
        """Decode a piece into `out`, rounding to nearest even.

        Args:
            encoded: a C-contiguous buffer of exactly `encoded_nbytes(out.size)` bytes, as `encode_into` filled it.
                Any bytes of that size decode to something, without a read or write out of place.
            out: any shape and strides, writable, float32, float16 or uint16 (bfloat16 bits).

        Raises:
            CodecError: a wrong dtype, size or layout; nothing was written.
        """
        self._check_values(out, "out")
        self._decode(self.parts(encoded, out.size), out)

    def decode_parts_into(self, parts: Parts, out: Array) -> None:
        """`decode_into` for parts that arrived apart from each other, one flat array per name of the `layout`."""
        self._check_values(out, "out")
        for name, dtype, count in self.layout(out.size):
            part = parts.get(name)
            if part is None or part.dtype != dtype or part.shape != (count,) or not part.flags.c_contiguous:
                found = "missing" if part is None else f"{part.dtype} of shape {part.shape}"
                raise CodecError(
                    f"{self.name}: {name} for {out.size} values must be a C-contiguous {np.dtype(dtype)} array of "
                    f"shape ({count},), but it is {found}"
                )
        self._decode(parts, out)

    @abstractmethod
    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """A bound, per element, on ``abs(decoded - values)`` for flat `values` and what they were encoded to.

        It covers decoding to float32; a 16-bit output adds that type's own rounding. Meant for tests and
        checks: unlike the other calls it allocates memory in proportion to `values`.
        """

    @abstractmethod
    def _encode_tile(self, values: Float32, parts: Parts) -> None:
        """Encode at most `TILE` flat float32 values that start at a block boundary."""

    @abstractmethod
    def _decode_tile(self, parts: Parts, out: Float32) -> None:
        """Decode at most `TILE` values that start at a block boundary into flat float32."""

    def _encode(self, src: Array, parts: Parts) -> None:
        for start, values in tiles(src):
            self._encode_tile(values, self._slice(parts, start, start + values.size))

    def _decode(self, parts: Parts, out: Array) -> None:
        flat = out.reshape(-1) if out.flags.c_contiguous else None
        for start in range(0, out.size, TILE):
            stop = min(start + TILE, out.size)
            direct = flat is not None and flat.dtype == np.float32
            values = flat[start:stop] if direct else scratch("values", np.float32, stop - start)  # type: ignore[index]
            self._decode_tile(self._slice(parts, start, stop), values)
            if not direct:
                store(values, out, start)

    def _slice(self, parts: Parts, start: int, stop: int) -> dict[str, Array]:
        """The parts of the values from `start` to `stop`, both block-aligned or the end."""
        before, after = self.layout(start), self.layout(stop)
        return {name: parts[name][a:b] for (name, _, a), (_, _, b) in zip(before, after, strict=True)}

    def _check_values(self, values: Array, role: str) -> None:
        if not isinstance(values, np.ndarray) or values.dtype not in _VALUE_DTYPES:
            found = f"dtype {values.dtype}" if isinstance(values, np.ndarray) else f"type {type(values).__name__}"
            raise CodecError(
                f"{self.name}: {role} has {found}; a numpy array of float32, float16 or uint16 (bfloat16 bits) is "
                "needed"
            )
        if role == "out" and not values.flags.writeable:
            raise CodecError(f"{self.name}: out is read-only")

    def _bytes(self, buffer: Any, n: int) -> Bytes:
        needed = self.encoded_nbytes(n)
        try:
            flat = np.frombuffer(buffer, np.uint8)
        except (TypeError, ValueError, BufferError) as error:
            raise CodecError(f"{self.name}: the encoded bytes are no C-contiguous buffer: {error}") from None
        if flat.size != needed:
            raise CodecError(f"{self.name}: {n} values take {needed} encoded bytes, but the buffer has {flat.size}")
        return flat


def tiles(src: Array) -> Iterator[tuple[int, Float32]]:
    """`src` in C order as flat float32 runs of at most `TILE` values, each with its start. Runs are views of `src`
    where they can be, else the thread's scratch memory, which the next run overwrites."""
    flat = src.reshape(-1) if src.flags.c_contiguous else None
    for start in range(0, src.size, TILE):
        stop = min(start + TILE, src.size)
        if flat is not None and src.dtype == np.float32:
            yield start, flat[start:stop]
            continue
        values = scratch("values", np.float32, stop - start)
        if src.dtype != np.uint16:
            read_run(src, start, values)
        elif flat is not None:
            bf16_to_float32(flat[start:stop], values)
        else:
            bits = scratch("bits", np.uint16, stop - start)
            read_run(src, start, bits)
            bf16_to_float32(bits, values)
        yield start, values


def store(values: Float32, out: Array, start: int) -> None:
    """Write the run `values` to `out` from element `start` on, rounded to its dtype."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if out.dtype == np.uint16:
            bits = scratch("bits", np.uint16, values.size)
            float32_to_bf16(values, bits)
            write_run(out, start, bits)
        else:
            write_run(out, start, values)
