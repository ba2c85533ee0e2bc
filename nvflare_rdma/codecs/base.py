"""What a codec is: a tensor's values to few bits and back, block by block, in memory that the caller owns.

An encoded piece is one run of bytes. Its *parts* are named arrays that lie one after the other in it: the scales
first, if the codec has any, then the codes. `Codec.parts` shows them as views.

A piece of a tensor that starts at a multiple of `Codec.block_size` (and ends at one, or at the tensor's end) is
encoded and decoded on its own. With most codecs the parts of the pieces laid side by side equal those of the whole
(`Codec.splits`), so a chunk pipeline can encode any block-aligned piece when it needs it; the others have something
in common for all values of a piece, and another cut gives other codes.

Sizes are known before anything is encoded: `encoded_nbytes` bytes of room are what `encode_into` takes, and all of
them are used (`FixedSizeCodec`). Only `lossless` and `adaquant` can't know: for them it is the most that can come,
and `encode_into` returns how many bytes count.

Values are numpy arrays of any shape and strides, float32, float16, or uint16, where uint16 stands for the bit
patterns of bfloat16, which numpy lacks. They are taken in C order. float64 is refused: whoever has it should say by
casting to float32 that the loss is meant. A codec holds no state of a tensor, no call allocates in proportion to the
tensor, and any number of threads may use one codec at once: the work runs without the GIL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvflare_rdma.codecs.runs import TILE, Array, Float32, float32_runs, output_runs, scratch
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES
from nvflare_rdma.errors import CodecError, UnrepresentableError

__all__ = ["MOST_AT_ONCE", "Array", "Bytes", "Codec", "FixedSizeCodec", "Float32", "Layout", "Parts", "add_scaled"]

Bytes = NDArray[np.uint8]
Parts = Mapping[str, Array]
Layout = tuple[tuple[str, Any, int], ...]

#: `longest_sum` of a codec that needs no scratch memory for values; those of its scales, 64 values each, fit it.
MOST_AT_ONCE = 16 * TILE

_VALUE_DTYPES = tuple(NUMPY_DTYPES.values())


class Codec(ABC):
    """One way to write float values in few bits.

    Attributes:
        name: what configs and metadata call it.
        bits: bits per value in the codes.
        block_size: where pieces of a tensor may begin, in elements: the block that shares one scale, or 1.
        splits: whether the parts of a tensor's pieces, laid side by side, equal the parts of the whole.
        needs_feedback: whether it leaves out so much that it is refused unless what was left out is sent later on.
    """

    name: str
    bits: float
    block_size: int
    splits = True
    needs_feedback = False

    @abstractmethod
    def encoded_nbytes(self, n: int) -> int:
        """Return the bytes that `n` values take, or the most that they can take where that depends on the values."""

    def estimate_ratio(self, n: int = 1 << 20) -> float:
        """Return `encoded_nbytes` divided by the float32 bytes of a tensor of `n` values."""
        return self.encoded_nbytes(n) / (4 * n)

    @abstractmethod
    def parts(self, encoded: Any, n: int) -> dict[str, Array]:
        """Return the parts of `n` encoded values as views of `encoded`, by name.

        Args:
            encoded: the bytes that count of what `encode_into` filled, in any C-contiguous buffer. Its address need
                not be aligned.
            n: how many values it stands for.

        Raises:
            CodecError: another size, or no buffer at all.
        """

    def encode_into(self, src: Array, out: Any) -> int:
        """Encode `src` into `out` and return how many of its bytes count.

        Args:
            src: values, any shape and strides, float32, float16 or uint16 (bfloat16 bits). Not changed.
            out: a writable C-contiguous buffer of exactly `encoded_nbytes(src.size)` bytes.

        Raises:
            UnrepresentableError: a value can't be carried within `max_abs_error`; what is in `out` then means
                nothing, and the tensor has to travel exact.
            CodecError: a wrong dtype, size or layout; nothing was written.
        """
        self._check_values(src, "src")
        buffer = self._bytes(out)
        self._check_size(buffer.size, src.size)
        if not buffer.flags.writeable:
            raise CodecError(f"{self.name}: out is read-only")
        return self._encode(src, buffer)

    def decode_into(self, encoded: Any, out: Array) -> None:
        """Decode a piece into `out`, rounded to nearest even.

        What is beyond the range of a 16-bit `out` becomes infinite.

        Args:
            encoded: the bytes that count of what `encode_into` filled, in any C-contiguous buffer.
            out: any shape and strides, writable, float32, float16 or uint16 (bfloat16 bits).

        Raises:
            CodecError: a wrong dtype, size or layout, and nothing was written; or damaged bytes, as far as the codec
                can see that. Bytes that it can't know to be damaged decode to something, without a read or write
                out of place.
        """
        self._check_values(out, "out")
        self._decode(self.parts(encoded, out.size), out)

    @abstractmethod
    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return a bound, per element, on `abs(decoded - values)` for flat `values` and what they were encoded to.

        It covers decoding to float32; a 16-bit output adds that type's own rounding. Meant for tests and
        checks: unlike the other calls it allocates memory in proportion to `values`.
        """

    @abstractmethod
    def _encode(self, src: Array, out: Bytes) -> int:
        """Do what `encode_into` does, with arguments that have been checked."""

    @abstractmethod
    def _decode(self, parts: Parts, out: Array) -> None:
        """Do what `decode_into` does, with arguments that have been checked."""

    def _check_values(self, values: Array, role: str) -> None:
        if not isinstance(values, np.ndarray) or values.dtype not in _VALUE_DTYPES:
            found = f"dtype {values.dtype}" if isinstance(values, np.ndarray) else f"type {type(values).__name__}"
            raise CodecError(
                f"{self.name}: {role} has {found}; a numpy array of float32, float16 or uint16 (bfloat16 bits) is "
                "needed"
            )
        if role == "out" and not values.flags.writeable:
            raise CodecError(f"{self.name}: out is read-only")

    def _bytes(self, buffer: Any) -> Bytes:
        try:
            return np.frombuffer(buffer, np.uint8)
        except (TypeError, ValueError, BufferError) as error:
            raise CodecError(f"{self.name}: the encoded bytes are no C-contiguous buffer: {error}") from None

    def _check_size(self, found: int, n: int) -> None:
        if found != self.encoded_nbytes(n):
            raise CodecError(
                f"{self.name}: {n} values take a buffer of {self.encoded_nbytes(n)} bytes, but it has {found}"
            )

    def _refuse_not_finite(self) -> None:
        raise UnrepresentableError(f"{self.name} can't carry NaN or Inf: its block would be lost")


class FixedSizeCodec(Codec):
    """A codec whose sizes follow from the number of values alone."""

    #: The longest run of values that `_encode_run` and `_decode_run` take, a multiple of `block_size`; None: any.
    longest_run: int | None = None
    #: Likewise of `_add_run`. The one that every codec has goes through scratch memory.
    longest_sum: int = TILE

    @abstractmethod
    def layout(self, n: int) -> Layout:
        """Return the parts of `n` encoded values in their order in memory: name, dtype and number of elements."""

    def encoded_nbytes(self, n: int) -> int:
        """Return the bytes that `n` values take: the sum of all parts of the `layout`."""
        return sum(count * np.dtype(dtype).itemsize for _, dtype, count in self.layout(n))

    def parts(self, encoded: Any, n: int) -> dict[str, Array]:
        """Return the parts of the `layout` as views of `encoded`; see `Codec.parts`."""
        flat = self._bytes(encoded)
        self._check_size(flat.size, n)
        views, start = {}, 0
        for name, dtype, count in self.layout(n):
            stop = start + count * np.dtype(dtype).itemsize
            views[name] = flat[start:stop].view(dtype)
            start = stop
        return views

    def decode_parts_into(self, parts: Parts, out: Array) -> None:
        """Decode parts that arrived apart from each other, one flat array per name of the `layout`.

        Raises:
            CodecError: a part is missing or has another dtype or shape, or `out` is not fit; nothing was written.
        """
        self._check_values(out, "out")
        self._check_parts(parts, out.size)
        self._decode(parts, out)

    def _check_parts(self, parts: Parts, n: int) -> None:
        for name, dtype, count in self.layout(n):
            part = parts.get(name)
            if part is None or part.dtype != dtype or part.shape != (count,) or not part.flags.c_contiguous:
                found = "missing" if part is None else f"{part.dtype} of shape {part.shape}"
                raise CodecError(
                    f"{self.name}: {name} for {n} values must be a C-contiguous {np.dtype(dtype)} array of "
                    f"shape ({count},), but it is {found}"
                )

    def _check_sum(self, out: Array) -> None:
        self._check_values(out, "out")
        if out.dtype != np.float32 or out.ndim != 1 or not out.flags.c_contiguous:
            raise CodecError(f"{self.name}: values are added to flat contiguous float32 only")

    def add_into(self, encoded: Any, weight: float, out: Float32) -> None:
        """Add `weight` times each decoded value to `out`, product and sum rounded once together. No memory is taken
        for the decoded values.

        Args:
            encoded: the bytes of what `encode_into` filled, in any C-contiguous buffer.
            weight: rounded to float32.
            out: flat, C-contiguous and writable, float32.

        Raises:
            CodecError: a wrong dtype, size or layout; nothing was written.
        """
        self._check_sum(out)
        self._add(self.parts(encoded, out.size), weight, out)

    def add_parts_into(self, parts: Parts, weight: float, out: Float32) -> None:
        """Do what `add_into` does with parts that arrived apart from each other; see `decode_parts_into`."""
        self._check_sum(out)
        self._check_parts(parts, out.size)
        self._add(parts, weight, out)

    def parts_of_run(self, parts: Parts, start: int, stop: int) -> dict[str, Array]:
        """Return the parts of the values from `start` to `stop` as views: `decode_parts_into` takes them. Both are
        multiples of `TILE`, where `stop` is not the end."""
        return self._slice(parts, start, stop)

    @abstractmethod
    def _encode_run(self, values: Float32, parts: Parts) -> None:
        """Encode flat float32 values that start at a block boundary."""

    @abstractmethod
    def _decode_run(self, parts: Parts, out: Float32) -> None:
        """Decode values that start at a block boundary into flat float32."""

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        """Add `weight` times what `_decode_run` gives, for at most `longest_sum` values."""
        values = scratch("decoded", np.float32, out.size)
        self._decode_run(parts, values)
        add_scaled(values, float(weight), out)

    def _add(self, parts: Parts, weight: float, out: Float32) -> None:
        for start in range(0, out.size, self.longest_sum):
            stop = min(start + self.longest_sum, out.size)
            self._add_run(self._slice(parts, start, stop), np.float32(weight), out[start:stop])

    def _encode(self, src: Array, out: Bytes) -> int:
        parts = self.parts(out, src.size)
        for start, values in float32_runs(src, self.longest_run):
            self._encode_run(values, self._run(parts, start, start + values.size, src.size))
        return out.size

    def _decode(self, parts: Parts, out: Array) -> None:
        for start, values in output_runs(out, self.longest_run):
            self._decode_run(self._run(parts, start, start + values.size, out.size), values)

    def _run(self, parts: Parts, start: int, stop: int, n: int) -> Parts:
        """Return `_slice`, without its work where that is all of `n` values."""
        return parts if start == 0 and stop == n else self._slice(parts, start, stop)

    def _slice(self, parts: Parts, start: int, stop: int) -> dict[str, Array]:
        """Return the parts of the values from `start` to `stop`, both block-aligned or the end."""
        before, after = self.layout(start), self.layout(stop)
        return {name: parts[name][a:b] for (name, _, a), (_, _, b) in zip(before, after, strict=True)}


def add_scaled(values: Float32, weight: float, out: Float32) -> None:
    """Add `weight`, rounded to float32, times `values` to `out`, both flat. Product and sum are rounded once together,
    as torch's `add_` does it where the processor can."""
    from nvflare_rdma.codecs.kernels import sums

    sums.add(values, np.float32(weight), out)
