"""4-bit codes, two a byte with the first value in the high nibble, times a scale per block of 64 values."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.kernels.jit import (
    INFINITY,
    boolean,
    float32,
    float32_out,
    float_of,
    kernel,
    largest,
    nothing,
    uint8,
    uint8_out,
)

_BLOCK = 64
_FLOOR = np.float32(1e-38)


@kernel(boolean(float32, float32, uint8, float32_out, uint8_out))
def encode(values: Any, middles: Any, order: Any, scales: Any, codes: Any) -> Any:
    """Write each block's absmax and the codes of x / absmax: `order[k]` where k of the 15 `middles` are smaller.

    An incomplete last block is divided by its absmax, raised to 1e-38, where full ones are multiplied by its
    reciprocal: bitsandbytes has it so. An odd length ends with the code of 0.

    Returns False, with the outputs unfinished, as soon as a block holds NaN or Inf.
    """
    # Fifteen comparisons of vectors beat a binary search per value by far.
    m0, m1, m2, m3, m4, m5, m6, m7 = (
        middles[0], middles[1], middles[2], middles[3], middles[4], middles[5], middles[6], middles[7],
    )  # fmt: skip
    m8, m9, m10, m11, m12, m13, m14 = (
        middles[8], middles[9], middles[10], middles[11], middles[12], middles[13], middles[14],
    )  # fmt: skip
    bits = values.view(np.uint32)
    x = np.zeros(_BLOCK, np.float32)
    code = np.empty(_BLOCK, np.uint8)
    for b in range(scales.size):
        in_block = values[b * _BLOCK : (b + 1) * _BLOCK]
        block_bits = bits[b * _BLOCK : (b + 1) * _BLOCK]
        top = largest(block_bits)
        if top >= INFINITY:
            return False
        absmax = float_of(top)
        if in_block.size == _BLOCK:
            inverse = np.float32(1) / max(absmax, _FLOOR)
            for i in range(_BLOCK):
                x[i] = in_block[i] * inverse
        else:
            absmax = max(absmax, _FLOOR)
            x[:] = np.float32(0)
            for i in range(in_block.size):
                x[i] = in_block[i] / absmax
        scales[b] = absmax
        for i in range(_BLOCK):
            p = x[i]
            k = np.uint8(p > m0) + np.uint8(p > m1) + np.uint8(p > m2) + np.uint8(p > m3) + np.uint8(p > m4)
            k += np.uint8(p > m5) + np.uint8(p > m6) + np.uint8(p > m7) + np.uint8(p > m8) + np.uint8(p > m9)
            k += np.uint8(p > m10) + np.uint8(p > m11) + np.uint8(p > m12) + np.uint8(p > m13) + np.uint8(p > m14)
            code[i] = k
        pairs = codes[b * (_BLOCK // 2) : (b + 1) * (_BLOCK // 2)]
        for i in range(pairs.size):
            pairs[i] = (order[code[2 * i]] << np.uint8(4)) | order[code[2 * i + 1]]
    return True


@kernel(nothing(uint8, float32, float32, float32_out))
def decode(codes: Any, scales: Any, pairs: Any, out: Any) -> None:
    """`value * scale`; `pairs` has the two values of each of the 256 bytes."""
    for b in range(scales.size):
        block_codes = codes[b * (_BLOCK // 2) : (b + 1) * (_BLOCK // 2)]
        block_out = out[b * _BLOCK : (b + 1) * _BLOCK]
        scale = scales[b]
        for i in range(block_out.size // 2):
            entry = 2 * np.intp(block_codes[i])
            block_out[2 * i] = pairs[entry] * scale
            block_out[2 * i + 1] = pairs[entry + 1] * scale
        if block_out.size % 2:
            block_out[block_out.size - 1] = pairs[2 * np.intp(block_codes[block_out.size // 2])] * scale


@kernel(nothing(float32, float32_out))
def absmax(values: Any, out: Any) -> None:
    """The largest magnitude of each block, raised to 1e-38 in an incomplete one, as `encode` has it."""
    bits = values.view(np.uint32)
    for b in range(out.size):
        block_bits = bits[b * _BLOCK : (b + 1) * _BLOCK]
        top = largest(block_bits)
        out[b] = float_of(top) if block_bits.size == _BLOCK else max(float_of(top), _FLOOR)
