"""Evenly spaced levels, and 8-bit floating point, times a scale per block.

Blocks whose largest magnitude is below 2**-100 become zeros: their scales or reciprocals would leave the normal
range. All encoders return False, with the outputs unfinished, as soon as a block holds NaN or Inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from nvflare_rdma.codecs.kernels.jit import (
    INFINITY,
    MAGNITUDE,
    boolean,
    float32,
    float32_out,
    float32_value,
    float_of,
    int8,
    int8_out,
    kernel,
    largest,
    multiply_add,
    nothing,
    size,
    truncated,
    uint8_out,
)
from nvflare_rdma.codecs.tables import WEAK, largest_scale

_ROUND = np.float32(1.5 * 2.0**23)  # a float32 with this added and taken away again is rounded to an integer
_ZERO = np.float32(0)
_LARGEST_3, _LARGEST_127, _LARGEST_448 = largest_scale(3), largest_scale(127), largest_scale(448)


@kernel(boolean(float32, size, float32_out, int8_out))
def encode_int8(values: Any, block: Any, scales: Any, codes: Any) -> Any:
    """`round(x / scale)`, ties to even, with scale = absmax / 127."""
    bits = values.view(np.uint32)
    for b in range(scales.size):
        in_block = values[b * block : (b + 1) * block]
        block_bits = bits[b * block : (b + 1) * block]
        block_codes = codes[b * block : (b + 1) * block]
        top = largest(block_bits)
        if top >= INFINITY:
            return False
        absmax = float_of(top)
        weak = absmax < WEAK
        scales[b] = _ZERO if weak else min(absmax / np.float32(127), _LARGEST_127)
        inverse = _ZERO if weak else np.float32(127) / absmax
        for i in range(in_block.size):
            block_codes[i] = np.int8(truncated((in_block[i] * inverse + _ROUND) - _ROUND))
    return True


@kernel(nothing(int8, float32, size, float32_out))
def decode_int8(codes: Any, scales: Any, block: Any, out: Any) -> None:
    """Write `code * scale`."""
    for b in range(scales.size):
        block_codes = codes[b * block : (b + 1) * block]
        block_out = out[b * block : (b + 1) * block]
        scale = scales[b]
        for i in range(block_out.size):
            block_out[i] = np.float32(block_codes[i]) * scale


@kernel(nothing(int8, float32, size, float32_value, float32_out))
def add_int8(codes: Any, scales: Any, block: Any, weight: Any, out: Any) -> None:
    """`out + weight * x`, with x what `decode_int8` writes."""
    for b in range(scales.size):
        block_codes = codes[b * block : (b + 1) * block]
        block_out = out[b * block : (b + 1) * block]
        scale = scales[b]
        for i in range(block_out.size):
            block_out[i] = multiply_add(weight, np.float32(block_codes[i]) * scale, block_out[i])


@njit(nogil=True, error_model="numpy", inline="always")
def float8_code(magnitude: Any) -> Any:
    """The code of the float8 e4m3 number nearest to a float32 from 0 to 448, ties to even."""
    word = np.float32(magnitude).view(np.uint32)
    # From 2**-6 on: keep 3 of the 23 mantissa bits and re-bias the exponent from 127 to 7.
    even = (word >> np.uint32(20)) & np.uint32(1)
    normal = ((word + np.uint32(0x7FFFF) + even) >> np.uint32(20)) - np.uint32(960)
    # Below: a sum with 2**14, whose last bit is worth 2**-9, rounds to the multiples of 2**-9.
    small = np.float32(magnitude + np.float32(16384)).view(np.uint32) - np.uint32(0x46800000)
    return normal if word >= np.uint32(0x3C800000) else small


@kernel(boolean(float32, size, float32_out, uint8_out))
def encode_float8(values: Any, block: Any, scales: Any, codes: Any) -> Any:
    """The float8 e4m3 number nearest to `x / scale`, ties to even, with scale = absmax / 448."""
    bits = values.view(np.uint32)
    for b in range(scales.size):
        in_block = values[b * block : (b + 1) * block]
        block_bits = bits[b * block : (b + 1) * block]
        block_codes = codes[b * block : (b + 1) * block]
        top = largest(block_bits)
        if top >= INFINITY:
            return False
        absmax = float_of(top)
        weak = absmax < WEAK
        scales[b] = _ZERO if weak else min(absmax / np.float32(448), _LARGEST_448)
        inverse = _ZERO if weak else np.float32(448) / absmax
        for i in range(in_block.size):
            magnitude = abs(in_block[i]) * inverse
            code = float8_code(magnitude)
            block_codes[i] = np.uint8(code | ((block_bits[i] >> np.uint32(24)) & np.uint32(0x80)))
    return True


@kernel(boolean(float32, float32_out, uint8_out))
def encode_int2(values: Any, scales: Any, codes: Any) -> Any:
    """Blocks of 256, four values a byte, the first in the lowest bits: the codes 0 to 3 stand for -3, -1, 1, 3 times
    the scale. Magnitudes above 5/4 of their mean get 3; the scale is then the one of least squared error.

    Sums are of integers (x over absmax in steps of 2**-16), so that their order doesn't matter.
    """
    bits = values.view(np.uint32)
    steps = np.empty(256, np.int32)
    code = np.zeros(256, np.uint8)
    for b in range(scales.size):
        in_block = values[b * 256 : (b + 1) * 256]
        block_bits = bits[b * 256 : (b + 1) * 256]
        block_codes = codes[b * 64 : (b + 1) * 64]
        top = largest(block_bits)
        if top >= INFINITY:
            return False
        absmax = float_of(top)
        if absmax < WEAK:
            scales[b] = _ZERO
            block_codes[:] = np.uint8(0)
            continue
        inverse = np.float32(65536) / absmax
        total = np.int32(0)
        for i in range(in_block.size):
            steps[i] = truncated(abs(in_block[i]) * inverse)
            total += steps[i]
        threshold = np.int32(np.int64(total) * 5 // (4 * in_block.size))
        product = np.int32(0)
        large = np.int32(0)
        code[:] = np.uint8(0)
        for i in range(in_block.size):
            above = np.int32(steps[i] > threshold)
            large += above
            product += steps[i] + np.int32(2) * above * steps[i]
            negative = block_bits[i] > MAGNITUDE
            code[i] = np.uint8(np.int32(1) - above if negative else np.int32(2) + above)
        squares = np.float64(in_block.size + 8 * np.int64(large))
        best = np.float32(np.float64(absmax) * np.float64(product) / (65536.0 * squares))
        if large > 0:  # no value decodes to more than the largest one; less than the best scale still loses less
            best = min(best, absmax / np.float32(3), _LARGEST_3)
        scales[b] = best
        for i in range(block_codes.size):
            j = 4 * i
            block_codes[i] = code[j] | (code[j + 1] << 2) | (code[j + 2] << 4) | (code[j + 3] << 6)
    return True


@kernel(boolean(float32, float32_out, uint8_out))
def encode_ternary(values: Any, scales: Any, codes: Any) -> Any:
    """Blocks of 256, five values a byte as digits to base 3, the first one the lowest: 0, 1, 2 stand for -1, 0, 1
    times the scale; 52 bytes a block. Magnitudes above 7/10 of their mean count; the scale is the mean of those."""
    bits = values.view(np.uint32)
    steps = np.empty(256, np.int32)
    digit = np.empty(260, np.uint8)
    for b in range(scales.size):
        in_block = values[b * 256 : (b + 1) * 256]
        block_bits = bits[b * 256 : (b + 1) * 256]
        block_codes = codes[b * 52 : (b + 1) * 52]
        top = largest(block_bits)
        if top >= INFINITY:
            return False
        absmax = float_of(top)
        digit[:] = np.uint8(1)
        if absmax < WEAK:
            scales[b] = _ZERO
        else:
            inverse = np.float32(65536) / absmax
            total = np.int32(0)
            for i in range(in_block.size):
                steps[i] = truncated(abs(in_block[i]) * inverse)
                total += steps[i]
            threshold = np.int32(np.int64(total) * 7 // (10 * in_block.size))
            product = np.int32(0)
            large = np.int32(0)
            for i in range(in_block.size):
                above = np.int32(steps[i] > threshold)
                large += above
                product += above * steps[i]
                negative = block_bits[i] > MAGNITUDE
                digit[i] = np.uint8(np.int32(1) - above if negative else np.int32(1) + above)
            scales[b] = np.float32(np.float64(absmax) * np.float64(product) / (65536.0 * np.float64(large)))
        for i in range(block_codes.size):
            j = 5 * i
            block_codes[i] = digit[j] + 3 * digit[j + 1] + 9 * digit[j + 2] + 27 * digit[j + 3] + 81 * digit[j + 4]
    return True
