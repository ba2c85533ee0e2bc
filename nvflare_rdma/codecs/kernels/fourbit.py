"""4-bit codes, two a byte with the first value in the high nibble, times a scale per block of 64 or 32 values."""

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
    kernel,
    largest,
    multiply_add,
    nothing,
    uint8,
    uint8_out,
    uint32,
    uint32_value,
)
from nvflare_rdma.codecs.kernels.linear import float8_code

_BLOCK, _SHORT = 64, 32
_GROUP = 1024  # values that are looked up before they are scaled, a multiple of the blocks; 4 KiB
_RANKED = 256  # values that are ranked before their codes are packed, a multiple of the blocks
_FLOOR = np.float32(1e-38)
_ONE = np.float32(1)
_ZERO = np.float32(0)


@njit(nogil=True, error_model="numpy", inline="always")
def _spread(m: Any) -> Any:
    """The 15 middles as a tuple, so that each stays in a register."""
    return m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7], m[8], m[9], m[10], m[11], m[12], m[13], m[14]


@njit(nogil=True, error_model="numpy", inline="always")
def _rank(p: Any, m: Any) -> Any:
    """How many of the middles `m` are smaller than `p`."""
    # Fifteen comparisons of vectors beat a search by halves, with or without branches. Counts as wide as the values
    # need no packing in between, which AVX2 is slow at.
    k = np.int32(p > m[0]) + np.int32(p > m[1]) + np.int32(p > m[2]) + np.int32(p > m[3]) + np.int32(p > m[4])
    k += np.int32(p > m[5]) + np.int32(p > m[6]) + np.int32(p > m[7]) + np.int32(p > m[8]) + np.int32(p > m[9])
    return (
        k + np.int32(p > m[10]) + np.int32(p > m[11]) + np.int32(p > m[12]) + np.int32(p > m[13]) + np.int32(p > m[14])
    )


@njit(nogil=True, error_model="numpy", inline="always")
def _pack(ranks: Any, pairs: Any) -> None:
    """The ranks of two values a byte, the first in the high nibble. `ranks` are int32, two of them in each uint64."""
    for i in range(_RANKED // 2):
        pairs[i] = np.uint8((ranks[i] << np.uint64(4)) | (ranks[i] >> np.uint64(32)))


@njit(nogil=True, error_model="numpy", inline="always")
def _pack_some(ranks: Any, pairs: Any) -> None:
    """`_pack`, of what has come to less than a group."""
    for i in range(pairs.size):
        pairs[i] = np.uint8((ranks[i] << np.uint64(4)) | (ranks[i] >> np.uint64(32)))


@kernel(boolean(float32, float32, uint8, float32_out, uint8_out))
def encode(values: Any, middles: Any, orders: Any, scales: Any, codes: Any) -> Any:
    """Write each block's absmax and the codes of x / absmax, by how many of the 15 `middles` are smaller: `orders` has
    the two codes for each byte of two such counts. Where counts are codes it is empty.

    An incomplete last block is divided by its absmax, raised to 1e-38, where full ones are multiplied by its
    reciprocal: bitsandbytes has it so. An odd length ends with the code of 0.

    Returns False, with the outputs unfinished, as soon as a block holds NaN or Inf.
    """
    m = _spread(middles)
    bits = values.view(np.uint32)
    rank, inverse = np.empty(_RANKED, np.int32), np.empty(_RANKED // _BLOCK, np.float32)
    both = rank.view(np.uint64)
    whole = values.size // _RANKED
    for g in range(whole):  # loops of a length that the compiler knows take two thirds of the time
        first, last = g * _RANKED, (g + 1) * _RANKED
        group, group_bits, group_scales = values[first:last], bits[first:last], scales[first // _BLOCK : last // _BLOCK]
        worst = np.uint32(0)
        for b in range(_RANKED // _BLOCK):
            top = np.uint32(0)
            for j in range(_BLOCK):
                top = max(top, group_bits[b * _BLOCK + j] & MAGNITUDE)
            worst = max(worst, top)
            group_scales[b] = float_of(top)
            inverse[b] = _ONE / max(float_of(top), _FLOOR)
        if worst >= INFINITY:
            return False
        for b in range(_RANKED // _BLOCK):
            factor = inverse[b]
            for j in range(_BLOCK):
                rank[b * _BLOCK + j] = _rank(group[b * _BLOCK + j] * factor, m)
        _pack(both, codes[first // 2 : last // 2])
    for start in range(whole * _RANKED, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        top = largest(bits[start : start + _BLOCK])
        if top >= INFINITY:
            return False
        absmax = float_of(top)
        factor = _ONE / max(absmax, _FLOOR)
        if block.size < _BLOCK:
            absmax = max(absmax, _FLOOR)
            rank[:] = _rank(_ZERO, m)
        for j in range(block.size):
            rank[j] = _rank(block[j] * factor if block.size == _BLOCK else block[j] / absmax, m)
        scales[start // _BLOCK] = absmax
        _pack_some(both, codes[start // 2 : (start + _BLOCK) // 2])
    if orders.size:
        for i in range(codes.size):
            codes[i] = orders[codes[i]]
    return True


@njit(nogil=True, error_model="numpy", inline="always")
def _look_up(codes: Any, pairs: Any, out: Any) -> None:
    """The values of all codes, before they are scaled: two at once."""
    both = pairs.view(np.uint64)
    whole = out[: out.size // 2 * 2].view(np.uint64)
    for i in range(whole.size):
        whole[i] = both[codes[i]]
    if out.size % 2:
        out[out.size - 1] = pairs[2 * np.intp(codes[out.size // 2])]


@kernel(nothing(uint8, float32, float32, float32_out))
def decode(codes: Any, scales: Any, pairs: Any, out: Any) -> None:
    """`value * scale`, blocks of 64; `pairs` has the two values of each of the 256 bytes."""
    for start in range(0, out.size, _GROUP):
        group = out[start : start + _GROUP]
        _look_up(codes[start // 2 : (start + _GROUP) // 2], pairs, group)
        for i in range(0, group.size, _BLOCK):
            block = group[i : i + _BLOCK]
            scale = scales[(start + i) // _BLOCK]
            for j in range(block.size):
                block[j] *= scale


@kernel(nothing(uint8, float32, float32, float32_value, float32_out))
def add(codes: Any, scales: Any, pairs: Any, weight: Any, out: Any) -> None:
    """`out + weight * x`, with x what `decode` writes."""
    x = np.empty(_BLOCK, np.float32)
    both, two = pairs.view(np.uint64), x.view(np.uint64)
    whole = out.size // _BLOCK
    for b in range(whole):  # loops of a length that the compiler knows take two thirds of the time
        pair, block = codes[b * (_BLOCK // 2) : (b + 1) * (_BLOCK // 2)], out[b * _BLOCK : (b + 1) * _BLOCK]
        scale = scales[b]
        for i in range(_BLOCK // 2):
            two[i] = both[pair[i]]
        for j in range(_BLOCK):
            block[j] = multiply_add(weight, x[j] * scale, block[j])
    rest = out[whole * _BLOCK :]
    _look_up(codes[whole * (_BLOCK // 2) :], pairs, x[: rest.size])
    for j in range(rest.size):
        rest[j] = multiply_add(weight, x[j] * scales[whole], rest[j])


@kernel(nothing(float32, float32_out))
def absmax(values: Any, out: Any) -> None:
    """The largest magnitude of each block, raised to 1e-38 in an incomplete one, as `encode` has it."""
    bits = values.view(np.uint32)
    for b in range(out.size):
        block_bits = bits[b * _BLOCK : (b + 1) * _BLOCK]
        top = largest(block_bits)
        out[b] = float_of(top) if block_bits.size == _BLOCK else max(float_of(top), _FLOOR)


@kernel(uint32_value(uint32))
def largest_bits(bits: Any) -> Any:
    """The largest magnitude among float32 values given as their bits, as bits; `INFINITY` or more: not finite."""
    return largest(bits)


@kernel(nothing(float32, float32, float32, float32_value, uint8_out, uint8_out))
def encode_short(values: Any, middles: Any, table: Any, scale: Any, scales: Any, codes: Any) -> None:
    """Blocks of 32, of finite values, whose scales are float8 e4m3 numbers times `scale`, which all blocks share.

    The scale of a block is the e4m3 number nearest to absmax over `scale`, and `table` has those. Codes are the
    number of `middles` that are smaller than x over the block's scale; a block whose scale is 0 gets that of 0.
    """
    m = _spread(middles)
    bits = values.view(np.uint32)
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    rank, factors = np.empty(_RANKED, np.int32), np.empty(_RANKED // _SHORT, np.float32)
    both = rank.view(np.uint64)
    whole = values.size // _RANKED
    for g in range(whole):
        first, last = g * _RANKED, (g + 1) * _RANKED
        group, group_bits, group_scales = values[first:last], bits[first:last], scales[first // _SHORT : last // _SHORT]
        for b in range(_RANKED // _SHORT):
            top = np.uint32(0)
            for j in range(_SHORT):
                top = max(top, group_bits[b * _SHORT + j] & MAGNITUDE)
            factors[b] = float_of(top)
        for b in range(_RANKED // _SHORT):
            group_scales[b] = np.uint8(float8_code(factors[b] * inverse))
        for b in range(_RANKED // _SHORT):
            divisor = table[group_scales[b]] * scale
            factors[b] = _ONE / divisor if divisor > _ZERO else _ZERO
        for b in range(_RANKED // _SHORT):
            factor = factors[b]
            for j in range(_SHORT):
                rank[b * _SHORT + j] = _rank(group[b * _SHORT + j] * factor, m)
        _pack(both, codes[first // 2 : last // 2])
    for start in range(whole * _RANKED, values.size, _SHORT):
        block = values[start : start + _SHORT]
        code = float8_code(float_of(largest(bits[start : start + _SHORT])) * inverse)
        scales[start // _SHORT] = np.uint8(code)
        divisor = table[code] * scale
        factor = _ONE / divisor if divisor > _ZERO else _ZERO
        if block.size < _SHORT:
            rank[:] = _rank(_ZERO, m)
        for j in range(block.size):
            rank[j] = _rank(block[j] * factor, m)
        _pack_some(both, codes[start // 2 : (start + _SHORT) // 2])


@kernel(nothing(uint8, uint8, float32, float32_value, float32, float32_out))
def decode_short(codes: Any, scales: Any, table: Any, scale: Any, pairs: Any, out: Any) -> None:
    """Undo `encode_short`: `value * (table[scale's code] * scale)`."""
    for start in range(0, out.size, _GROUP):
        group = out[start : start + _GROUP]
        _look_up(codes[start // 2 : (start + _GROUP) // 2], pairs, group)
        for i in range(0, group.size, _SHORT):
            block = group[i : i + _SHORT]
            factor = table[scales[(start + i) // _SHORT]] * scale
            for j in range(block.size):
                block[j] *= factor


@kernel(nothing(uint8, uint8, float32, float32_value, float32, float32_value, float32_out))
def add_short(codes: Any, scales: Any, table: Any, scale: Any, pairs: Any, weight: Any, out: Any) -> None:
    """`out + weight * x`, with x what `decode_short` writes."""
    values = np.empty(_GROUP, np.float32)
    for start in range(0, out.size, _GROUP):
        group = out[start : start + _GROUP]
        _look_up(codes[start // 2 : (start + _GROUP) // 2], pairs, values[: group.size])
        for i in range(0, group.size, _SHORT):
            block, x = group[i : i + _SHORT], values[i : i + _SHORT]
            factor = table[scales[(start + i) // _SHORT]] * scale
            for j in range(block.size):
                block[j] = multiply_add(weight, x[j] * factor, block[j])
