"""8-bit codes that stand for entries of a table, times a scale per block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from nvflare_rdma.codecs.kernels.jit import (
    INFINITY,
    boolean,
    float32,
    float32_out,
    float32_value,
    float_of,
    kernel,
    largest,
    multiply_add,
    nothing,
    size,
    truncated,
    uint8,
    uint8_out,
)

_GROUP = 128
_FOURS = 256
_ONE = np.float32(1)
_STEPS = np.float32(32767.5)
_HALF = np.float32(0.5)


@kernel(boolean(float32, size, uint8, float32_out, uint8_out))
def encode(values: Any, block: Any, nearest: Any, scales: Any, codes: Any) -> Any:
    """Write each block's absmax and the codes that `nearest` has for 65536 even steps of x / absmax from -1 to 1.

    Returns False, with the outputs unfinished, as soon as a block holds NaN or Inf.
    """
    bits = values.view(np.uint32)
    step = np.empty(_GROUP, np.uint16)  # arithmetic and look-ups apart, so that the former become vectors
    for b in range(scales.size):
        in_block = values[b * block : (b + 1) * block]
        block_bits = bits[b * block : (b + 1) * block]
        block_codes = codes[b * block : (b + 1) * block]
        top = largest(block_bits)
        if top >= INFINITY:
            return False
        scales[b] = float_of(top)
        inverse = _ONE / scales[b]
        for start in range(0, in_block.size, _GROUP):
            group = in_block[start : start + _GROUP]
            if inverse <= np.float32(3.4028235e38):
                for i in range(group.size):
                    step[i] = np.uint16(truncated((group[i] * inverse + _ONE) * _STEPS + _HALF))
            else:  # absmax is 0 or so small that its reciprocal is infinite: 0 * inf is NaN and goes to code 0
                for i in range(group.size):
                    position = group[i] * inverse
                    position = min(position, _ONE) if position >= -_ONE else -_ONE
                    step[i] = np.uint16(truncated((position + _ONE) * _STEPS + _HALF))
            group_codes = block_codes[start : start + _GROUP]
            for i in range(group_codes.size):
                group_codes[i] = nearest[step[i]]
    return True


@kernel(nothing(uint8, float32, size, float32, float32_out))
def decode(codes: Any, scales: Any, block: Any, table: Any, out: Any) -> None:
    """`table[code] * scale`; the table has 256 entries."""
    for b in range(scales.size):
        block_codes = codes[b * block : (b + 1) * block]
        block_out = out[b * block : (b + 1) * block]
        scale = scales[b]
        for i in range(block_out.size):
            block_out[i] = table[block_codes[i]] * scale


@kernel(nothing(uint8, float32, size, float32, float32_value, float32_out))
def add(codes: Any, scales: Any, block: Any, table: Any, weight: Any, out: Any) -> None:
    """`out + weight * x`, with x what `decode` writes."""
    values = np.empty(_GROUP, np.float32)
    for b in range(scales.size):
        block_codes = codes[b * block : (b + 1) * block]
        block_out = out[b * block : (b + 1) * block]
        scale = scales[b]
        for start in range(0, block_out.size, _GROUP):
            group, group_codes = block_out[start : start + _GROUP], block_codes[start : start + _GROUP]
            for i in range(group.size):
                values[i] = table[group_codes[i]]
            for i in range(group.size):
                group[i] = multiply_add(weight, values[i] * scale, group[i])


@kernel(nothing(uint8, float32, size, size, float32, float32_out))
def decode_packed(codes: Any, scales: Any, block: Any, per_byte: Any, table: Any, out: Any) -> None:
    """Codes of several values a byte, `table` having those of each of the 256 bytes. Every block begins a byte."""
    block_bytes = -(-block // per_byte)
    for b in range(scales.size):
        block_codes = codes[b * block_bytes : (b + 1) * block_bytes]
        block_out = out[b * block : (b + 1) * block]
        scale = scales[b]
        for j in range(block_codes.size):
            entries = table[np.intp(block_codes[j]) * per_byte : (np.intp(block_codes[j]) + 1) * per_byte]
            group = block_out[j * per_byte : (j + 1) * per_byte]
            for k in range(group.size):
                group[k] = entries[k] * scale


@njit(nogil=True, error_model="numpy", inline="always")
def _look_up_fours(codes: Any, table: Any, out: Any) -> None:
    """The four values of each code, which `table` has side by side, copied two at once."""
    for i in range(codes.size):
        out[2 * i] = table[2 * np.intp(codes[i])]
        out[2 * i + 1] = table[2 * np.intp(codes[i]) + 1]


@kernel(nothing(uint8, float32, float32, float32_out))
def decode_fours(codes: Any, scales: Any, table: Any, out: Any) -> None:
    """`decode_packed` for blocks of 256 and four values a byte."""
    values = np.empty(_FOURS, np.float32)
    both, two = table.view(np.uint64), values.view(np.uint64)
    whole = out.size // _FOURS
    for b in range(whole):  # loops of a length that the compiler knows
        block, scale = out[b * _FOURS : (b + 1) * _FOURS], scales[b]
        _look_up_fours(codes[b * (_FOURS // 4) : (b + 1) * (_FOURS // 4)], both, two)
        for i in range(_FOURS):
            block[i] = values[i] * scale
    rest = out[whole * _FOURS :]
    _look_up_fours(codes[whole * (_FOURS // 4) :], both, two)
    for i in range(rest.size):
        rest[i] = values[i] * scales[whole]


@kernel(nothing(uint8, float32, float32, float32_value, float32_out))
def add_fours(codes: Any, scales: Any, table: Any, weight: Any, out: Any) -> None:
    """`out + weight * x`, with x what `decode_fours` writes."""
    values = np.empty(_FOURS, np.float32)
    both, two = table.view(np.uint64), values.view(np.uint64)
    whole = out.size // _FOURS
    for b in range(whole):
        block, scale = out[b * _FOURS : (b + 1) * _FOURS], scales[b]
        _look_up_fours(codes[b * (_FOURS // 4) : (b + 1) * (_FOURS // 4)], both, two)
        for i in range(_FOURS):
            block[i] = multiply_add(weight, values[i] * scale, block[i])
    rest = out[whole * _FOURS :]
    _look_up_fours(codes[whole * (_FOURS // 4) :], both, two)
    for i in range(rest.size):
        rest[i] = multiply_add(weight, values[i] * scales[whole], rest[i])
