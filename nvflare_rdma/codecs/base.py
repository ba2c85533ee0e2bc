"""What a codec is: a tensor's values to few bits and back, block by block, in memory that the caller owns.

Every codec turns ``n`` float values into two outputs whose sizes are known before anything is encoded:

- *codes*: ``codes_count(n)`` elements of ``code_dtype``;
- *scales*: ``scales_count(n)`` float32 values, one per block of ``block_size`` elements (none if the codec has
  no blocks).

A piece of a tensor that starts at a multiple of ``block_size`` (and ends at one, or at the tensor's end) is
encoded and decoded on its own, and the pieces' codes and scales laid side by side equal those of the whole. A
chunk pipeline can therefore encode any block-aligned piece when it needs it.

Values are one-dimensional, C-contiguous numpy arrays of float32, float16, or uint16, where uint16 stands for the
bit patterns of bfloat16, which numpy lacks. Work goes tile by tile through scratch memory that belongs to the
calling thread, so that no call allocates in proportion to the tensor and threads don't wait for each other.
"""

import threading
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvflare_rdma.codecs.bf16 import bf16_to_float32, float32_to_bf16
from nvflare_rdma.errors import CodecError

Array = NDArray[Any]
Float32 = NDArray[np.float32]

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
        block_size: elements that share one scale; 1 if there are no scales.
        code_dtype: numpy dtype of the codes.
    """

    name: str
    bits: int
    block_size: int
    code_dtype: np.dtype[Any]

    def codes_count(self, n: int) -> int:
        """How many elements of `code_dtype` the codes of `n` values take."""
        return n

    def scales_count(self, n: int) -> int:
        """How many float32 scales belong to `n` values."""
        return 0

    def encoded_nbytes(self, n: int) -> int:
        """Bytes of codes and scales together for `n` values."""
        return self.codes_count(n) * self.code_dtype.itemsize + self.scales_count(n) * 4

    def estimate_ratio(self, n: int = 1 << 20) -> float:
        """Encoded bytes over float32 bytes for a tensor of `n` values."""
        return self.encoded_nbytes(n) / (4 * n)

    def encode_into(self, src: Array, codes: Array, scales: Float32) -> None:
        """Encode `src` into `codes` and `scales`.

        Args:
            src: values, shape (n,), float32, float16 or uint16 (bfloat16 bits). Not changed.
            codes: shape (codes_count(n),), `code_dtype`, C-contiguous and writable.
            scales: shape (scales_count(n),), float32, C-contiguous and writable.

        Raises:
            UnrepresentableError: a value can't be carried within `max_abs_error`; what is in `codes` and
                `scales` then means nothing, and the tensor has to travel exact.
            CodecError: a wrong shape, dtype or layout.
        """
        n = self._check(src, "src", codes, scales)
        for start in range(0, n, TILE):
            stop = min(start + TILE, n)
            values = src[start:stop]
            if values.dtype == np.float16:
                values = scratch("values", np.float32, stop - start)
                np.copyto(values, src[start:stop])
            elif values.dtype == np.uint16:
                values = scratch("values", np.float32, stop - start)
                bf16_to_float32(src[start:stop], values)
            self._encode_tile(values, self._codes_part(codes, start, stop), self._scales_part(scales, start, stop))

    def decode_into(self, codes: Array, scales: Float32, out: Array) -> None:
        """Decode into `out`, shape (n,), float32, float16 or uint16 (bfloat16 bits), rounding to nearest even.

        Raises:
            CodecError: a wrong shape, dtype or layout.
        """
        n = self._check(out, "out", codes, scales)
        for start in range(0, n, TILE):
            stop = min(start + TILE, n)
            part = out[start:stop]
            values = part if part.dtype == np.float32 else scratch("values", np.float32, stop - start)
            self._decode_tile(self._codes_part(codes, start, stop), self._scales_part(scales, start, stop), values)
            if part.dtype == np.float16:
                with np.errstate(over="ignore", invalid="ignore", under="ignore"):
                    np.copyto(part, values, casting="unsafe")
            elif part.dtype == np.uint16:
                float32_to_bf16(values, part)

    @abstractmethod
    def max_abs_error(self, values: Float32, scales: Float32) -> Float32:
        """A bound, per element, on ``abs(decoded - values)`` when `values` were encoded with `scales`.

        It covers decoding to float32; a 16-bit output adds that type's own rounding. Meant for tests and
        checks: unlike the other calls it allocates memory in proportion to `values`.
        """

    @abstractmethod
    def _encode_tile(self, values: Float32, codes: Array, scales: Float32) -> None:
        """Encode at most `TILE` float32 values that start at a block boundary."""

    @abstractmethod
    def _decode_tile(self, codes: Array, scales: Float32, out: Float32) -> None:
        """Decode at most `TILE` values that start at a block boundary."""

    def _codes_part(self, codes: Array, start: int, stop: int) -> Array:
        return codes[self.codes_count(start) : self.codes_count(stop)]

    def _scales_part(self, scales: Float32, start: int, stop: int) -> Float32:
        return scales[self.scales_count(start) : self.scales_count(stop)]

    def _check(self, values: Array, role: str, codes: Array, scales: Float32) -> int:
        n = values.size
        if values.dtype not in _VALUE_DTYPES:
            raise CodecError(
                f"{self.name}: {role} has dtype {values.dtype}; float32, float16 or uint16 (bfloat16 bits) is needed"
            )
        wanted = (
            (role, values, values.dtype, n),
            ("codes", codes, self.code_dtype, self.codes_count(n)),
            ("scales", scales, np.dtype(np.float32), self.scales_count(n)),
        )
        for what, array, dtype, size in wanted:
            if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
                raise CodecError(
                    f"{self.name}: {what} for {n} values must be a C-contiguous {dtype} array of shape ({size},), "
                    f"but it is {array.dtype} of shape {array.shape}"
                )
        return n
