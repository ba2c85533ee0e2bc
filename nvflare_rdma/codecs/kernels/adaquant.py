"""Even levels between the smallest and the largest value, in float64 as FLARE's AdaQuantizer computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from nvflare_rdma.codecs.kernels.jit import (
    MAGNITUDE,
    float32,
    float32_out,
    float64_value,
    kernel,
    nothing,
    uint8,
    uint8_out,
    uint16,
    uint16_out,
    uint32,
)

_ROUND = np.float64(1.5 * 2.0**52)  # a float64 with this added and taken away again is rounded to an integer


@kernel(types.UniTuple(types.int32, 2)(uint32))  # type: ignore[no-untyped-call]
def extremes(bits: Any) -> Any:
    """The smallest and the largest of float32 values given as their bits.

    Both come as integers that are ordered as the values are: the bits, those below the sign flipped for negative
    ones. NaN is outside of everything, so it shows.
    """
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for i in range(bits.size):
        word = np.int32(bits[i])
        key = word ^ ((word >> np.int32(31)) & np.int32(MAGNITUDE))
        low = min(low, key)
        high = max(high, key)
    return low, high


@kernel(
    nothing(float32, float64_value, float64_value, float64_value, uint8_out),
    nothing(float32, float64_value, float64_value, float64_value, uint16_out),
)
def encode(values: Any, offset: Any, norm: Any, level: Any, codes: Any) -> None:
    """`round((x + offset) / norm * level)`, ties to even."""
    for i in range(values.size):
        step = (np.float64(values[i]) + offset) / norm * level
        codes[i] = np.uint32(np.int32((step + _ROUND) - _ROUND))


@kernel(
    nothing(uint8, float64_value, float64_value, float64_value, float32_out),
    nothing(uint16, float64_value, float64_value, float64_value, float32_out),
)
def decode(codes: Any, offset: Any, norm: Any, level: Any, out: Any) -> None:
    """Write `code * norm / level - offset` as float32, computed in float64."""
    for i in range(codes.size):
        out[i] = np.float32(np.float64(codes[i]) * norm / level - offset)
