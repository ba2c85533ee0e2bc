"""Codecs with evenly spaced levels, and 8-bit floating point: a scale per block, chosen by this package."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import MOST_AT_ONCE, Float32, Layout, Parts
from nvflare_rdma.codecs.blockwise import EPS, BlockScaledCodec
from nvflare_rdma.codecs.tables import WEAK, float8_e4m3, int2_by_byte, ternary_by_byte


class Int8(BlockScaledCodec):
    """8-bit integers times a float32 scale per 2048 values, `absmax / 127`. Rounded to nearest, ties to even.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most `0.00394 * absmax` of the block
    (half a step); if absmax is below 2**-100, the block becomes zeros.
    """

    name = "int8"
    bits = 8
    block_size = 2048
    longest_sum = MOST_AT_ONCE

    def layout(self, n: int) -> Layout:
        """Return one scale per block, and a code of one byte for each value."""
        return ("scales", np.float32, -(-n // self.block_size)), ("codes", np.int8, n)

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return half a step of the block, plus rounding."""
        scales = self.parts(encoded, values.size)["scales"]
        bound = np.where(scales == 0, WEAK, scales * (np.float32(0.5) + 127 * EPS)).astype(np.float32)
        return np.repeat(bound, self.block_size)[: values.size]

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import linear

        if not linear.encode_int8(values, self.block_size, parts["scales"], parts["codes"]):
            self._refuse_not_finite()

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import linear

        linear.decode_int8(parts["codes"], parts["scales"], self.block_size, out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import linear

        linear.add_int8(parts["codes"], parts["scales"], self.block_size, weight, out)


class Float8E4M3(BlockScaledCodec):
    """8-bit floating point, four bits of exponent and three of mantissa, times a float32 scale per 128 values.

    The element type is that of Micikevicius et al., "FP8 Formats for Deep Learning" (2022), torch's
    `float8_e4m3fn`; the scale is `absmax / 448`, so that the largest magnitude becomes the type's largest. The
    type's own NaN is not used.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most `2**-4 * abs(x)` plus
    `2**-10 * absmax / 448` of the block; if absmax is below 2**-100, the block becomes zeros.
    """

    name = "float8_e4m3"
    bits = 8
    block_size = 128
    longest_sum = MOST_AT_ONCE

    def __init__(self) -> None:
        self.table: Float32 = float8_e4m3()

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return half of the distance between the type's values, relative or, near zero, of the block's scale."""
        scales = self.parts(encoded, values.size)["scales"]
        smallest = np.where(scales == 0, WEAK, scales * np.float32(2.0**-10 + 448 * EPS)).astype(np.float32)
        relative = np.abs(values) * np.float32(2.0**-4)
        return relative + np.repeat(smallest, self.block_size)[: values.size]

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import linear

        if not linear.encode_float8(values, self.block_size, parts["scales"], parts["codes"]):
            self._refuse_not_finite()

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.decode(parts["codes"], parts["scales"], self.block_size, self.table, out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.add(parts["codes"], parts["scales"], self.block_size, self.table, weight, out)


class _FewLevels(BlockScaledCodec):
    """Signs and one or two magnitudes, for use with error feedback (Karimireddy et al., "Error Feedback Fixes
    SignSGD", 2019): on their own they lose most of a tensor.

    Error feedback needs a contraction: what is lost of a block must have a smaller sum of squares than the block.
    That holds here, since the scale is the one of least squared error for the codes.
    """

    block_size = 256
    per_byte: int
    table: Float32
    levels: int  # the largest magnitude in the table

    def layout(self, n: int) -> Layout:
        """Return one scale per block, and the codes, several to a byte; every block begins a byte."""
        whole, rest = divmod(n, self.block_size)
        codes = whole * -(-self.block_size // self.per_byte) + -(-rest // self.per_byte)
        return ("scales", np.float32, -(-n // self.block_size)), ("codes", np.uint8, codes)

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return the larger of the value itself and the largest level of its block."""
        scales = np.repeat(self.parts(encoded, values.size)["scales"], self.block_size)[: values.size]
        # Signs are kept, so a value is off by no more than the larger of itself and what it decodes to.
        return np.maximum(np.abs(values), scales * np.float32(self.levels * (1 + EPS)))

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.decode_packed(parts["codes"], parts["scales"], self.block_size, self.per_byte, self.table, out)


class Int2(_FewLevels):
    """Four levels, -3, -1, 1 and 3 times a float32 scale per 256 values; four codes a byte, the first in the lowest
    bits. For normally distributed values 88 % of the sum of squares arrives.

    NaN and Inf are not representable (`UnrepresentableError`). There is no level 0: a zero decodes to plus or minus
    the scale, in a block that isn't all zeros. Error: at most the larger of `abs(x)` and three times the scale; if
    absmax is below 2**-100, the block becomes zeros.
    """

    name = "int2"
    bits = 2
    longest_sum = MOST_AT_ONCE
    per_byte = 4
    levels = 3

    def __init__(self) -> None:
        self.table = int2_by_byte()

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import linear

        if not linear.encode_int2(values, parts["scales"], parts["codes"]):
            self._refuse_not_finite()

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.decode_fours(parts["codes"], parts["scales"], self.table, out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.add_fours(parts["codes"], parts["scales"], self.table, weight, out)


class Ternary(_FewLevels):
    """-1, 0 or 1 times a float32 scale per 256 values: the sign of what is above 0.7 of the mean magnitude, times
    the mean of those (Li et al., "Ternary Weight Networks", 2016). Five codes a byte, as digits to base 3, and 52
    bytes a block. For normally distributed values 81 % of the sum of squares arrives.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most the larger of `abs(x)` and the scale;
    if absmax is below 2**-100, the block becomes zeros.
    """

    name = "ternary"
    bits = 1.625
    per_byte = 5
    levels = 1

    def __init__(self) -> None:
        self.table = ternary_by_byte()

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import linear

        if not linear.encode_ternary(values, parts["scales"], parts["codes"]):
            self._refuse_not_finite()
