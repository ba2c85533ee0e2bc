"""The block-scaled codecs that bitsandbytes also has: 8-bit dynamic and 4-bit NormalFloat."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvflare_rdma.codecs.base import Codec, Float32, Layout, Parts, scratch
from nvflare_rdma.codecs.tables import dynamic_map, normal_float4
from nvflare_rdma.errors import UnrepresentableError

_EPS = np.float32(2.0**-21)  # four roundings to float32, relative to a block's scale
_TINY = np.float32(2.0**-149)  # the smallest denormal: what a product may lose below the normal range


class _BlockScaled(Codec):
    """Codes of ``x / absmax`` with one float32 absmax per block."""

    half_gap: np.float32  # largest distance from a normalised value to its table entry, before rounding errors
    weak_below: np.float32  # blocks whose absmax is below this keep less than `half_gap` promises

    def layout(self, n: int) -> Layout:
        codes = -(-n * self.bits // 8)
        return ("scales", np.float32, -(-n // self.block_size)), ("codes", np.uint8, codes)

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        scales = self.parts(encoded, values.size)["scales"]
        bound = scales * (self.half_gap + _EPS) + _TINY
        bound = np.where(scales < self.weak_below, scales + _TINY, bound).astype(np.float32)
        return np.repeat(bound, self.block_size)[: values.size]

    def _absmax(self, values: Float32, scales: Float32) -> int:
        """Write each block's largest magnitude to `scales`; return how many values lie in full blocks."""
        magnitude = scratch("magnitude", np.float32, values.size)
        np.abs(values, out=magnitude)
        full = values.size // self.block_size * self.block_size
        if full:
            np.max(magnitude[:full].reshape(-1, self.block_size), axis=1, out=scales[: full // self.block_size])
        if full < values.size:
            scales[-1] = magnitude[full:].max()
        if not np.isfinite(scales).all():  # a maximum hands on NaN, so this catches NaN too
            raise UnrepresentableError(f"{self.name} can't carry NaN or Inf: its block would be lost")
        return full

    def _times_scales(self, values: Float32, scales: Float32, out: Float32) -> None:
        full = values.size // self.block_size * self.block_size
        shape = (-1, self.block_size)
        blocks = full // self.block_size
        with np.errstate(all="ignore"):
            if full:
                np.multiply(values[:full].reshape(shape), scales[:blocks, np.newaxis], out=out[:full].reshape(shape))
            if full < values.size:
                np.multiply(values[full:], scales[-1], out=out[full:])


class Blockwise8(_BlockScaled):
    """8-bit dynamic quantization with one absmax per 4096 values (Dettmers et al., "8-bit Optimizers via
    Block-wise Quantization", 2021).

    Codes and scales equal those of bitsandbytes 0.50 on a CPU, bit for bit, for every finite input. That encoder
    doesn't search the table for the nearest entry: it first rounds ``x / absmax`` to one of 65536 evenly spaced
    points in [-1, 1] and takes the entry nearest to that point, which costs at most 1/65535 of the absmax. Two
    consequences are kept because they are part of the equality: a zero in a block that isn't all zeros decodes to
    about 1.2e-5 of the block's absmax, and an all-zero block has code 0 and decodes to -0.0. Older bitsandbytes
    and its GPU kernels search for the nearest entry, so their codes may differ by one or, near zero, by a few;
    either side decodes both, since the table travels with the message.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most ``0.00705 * absmax`` of the block;
    if absmax is below 2**-127, whose reciprocal overflows, at most ``absmax``.
    """

    name = "blockwise8"
    bits = 8
    block_size = 4096
    half_gap = np.float32(0.00703125 + 1.0 / 65535)
    weak_below = np.float32(2.0**-127)

    def __init__(self, table: Float32 | None = None) -> None:
        """`table`: 256 ascending float32 values in [-1, 1] to use in place of the dynamic map (to decode codes that
        came with a table of their own)."""
        self.table: Float32 = dynamic_map() if table is None else table
        points = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
        middles = np.float32(0.5) * (self.table[:-1] + self.table[1:])
        self._nearest: NDArray[np.uint8] = np.searchsorted(middles, points, side="left").astype(np.uint8)

    def _encode_tile(self, values: Float32, parts: Parts) -> None:
        codes, scales = parts["codes"], parts["scales"]
        self._absmax(values, scales)
        position = scratch("position", np.float32, values.size)
        with np.errstate(all="ignore"):
            inverse: Float32 = np.divide(np.float32(1), scales)
        self._times_scales(values, inverse, position)
        if not np.isfinite(inverse).all():
            # An all-zero block gives 0 * inf, and so does a zero beside denormals: both get code 0.
            np.nan_to_num(position, copy=False, nan=-1.0, posinf=1.0, neginf=-1.0)
            np.clip(position, -1, 1, out=position)
        position += np.float32(1)
        position *= np.float32(32767.5)
        position += np.float32(0.5)
        index = scratch("index", np.intp, values.size)
        np.copyto(index, position, casting="unsafe")
        np.take(self._nearest, index, out=codes, mode="clip")

    def _decode_tile(self, parts: Parts, out: Float32) -> None:
        codes, scales = parts["codes"], parts["scales"]
        index = scratch("index", np.intp, codes.size)
        np.copyto(index, codes)
        normalised = scratch("position", np.float32, codes.size)
        np.take(self.table, index, out=normalised, mode="clip")
        self._times_scales(normalised, scales, out)


class NormalFloat4(_BlockScaled):
    """4-bit NormalFloat with one absmax per 64 values (Dettmers et al., "QLoRA", 2023).

    Two codes a byte, the first value in the high nibble; an odd length ends with the code of 0 in the low nibble.
    Codes and scales equal those of bitsandbytes 0.50 on a CPU, bit for bit, for every finite input. That includes
    two habits of its encoder: an incomplete last block is divided by its absmax where full blocks are multiplied
    by its reciprocal, and the absmax of an incomplete block is raised to at least 1e-38.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most ``0.152 * absmax`` of the block; if
    absmax is below 1e-38, at most ``absmax``.
    """

    name = "normfloat4"
    bits = 4
    block_size = 64
    weak_below = np.float32(1e-38)

    def __init__(self) -> None:
        self.table: Float32 = normal_float4()
        self.half_gap = np.float32(np.diff(self.table).max() / 2)
        self._middles = (self.table[:-1] + self.table[1:]) / np.float32(2)
        byte = np.arange(256)
        pairs = np.stack([self.table[byte >> 4], self.table[byte & 15]], axis=1)
        self._pairs = np.ascontiguousarray(pairs).view(np.uint64).reshape(256)  # both values in one 8-byte load

    def _encode_tile(self, values: Float32, parts: Parts) -> None:
        codes, scales = parts["codes"], parts["scales"]
        full = self._absmax(values, scales)
        floor = np.float32(1e-38)
        normalised = scratch("position", np.float32, values.size)
        inverse: Float32 = np.divide(np.float32(1), np.maximum(scales[: full // self.block_size], floor))
        self._times_scales(values[:full], inverse, normalised[:full])
        if full < values.size:
            scales[-1] = max(scales[-1], floor)
            np.divide(values[full:], scales[-1], out=normalised[full:])

        # Fifteen comparisons in cache beat a binary search per element by far.
        code = scratch("code", np.uint8, values.size)
        above = scratch("above", np.bool_, values.size)
        code.fill(0)
        for middle in self._middles:
            np.greater(normalised, middle, out=above)
            np.add(code, above.view(np.uint8), out=code)

        pairs = values.size // 2
        packed = codes[:pairs]
        np.left_shift(code[0 : 2 * pairs : 2], 4, out=packed)
        np.bitwise_or(packed, code[1 : 2 * pairs : 2], out=packed)
        if values.size % 2:
            codes[-1] = (int(code[-1]) << 4) | 7  # 7 is the code of 0

    def _decode_tile(self, parts: Parts, out: Float32) -> None:
        codes, scales = parts["codes"], parts["scales"]
        index = scratch("index", np.intp, codes.size)
        np.copyto(index, codes)
        pairs = scratch("pairs", np.uint64, codes.size)
        np.take(self._pairs, index, out=pairs, mode="clip")
        normalised: Float32 = pairs.view(np.float32)[: out.size]
        self._times_scales(normalised, scales, out)
