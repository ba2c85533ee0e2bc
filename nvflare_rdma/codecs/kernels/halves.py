"""float32 to and from half precision and bfloat16, rounded to nearest even. NaN stays NaN (made quiet)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.kernels.jit import (
    INFINITY,
    MAGNITUDE,
    boolean,
    float32,
    float32_out,
    half_bits,
    half_value,
    kernel,
    nothing,
    uint16,
    uint16_out,
    uint32,
    uint32_out,
)

_16 = np.uint32(16)
_LOW = np.uint32(0x7FFF)
_QUIET = np.uint32(0x40)
_HALF_INFINITY = np.uint32(0x7C00)
_BF16_INFINITY = np.uint32(0x7F80)


@kernel(boolean(float32, uint16_out))
def to_half(values: Any, out: Any) -> Any:
    """Write the bits of `values` in half precision; return whether a finite one became infinite."""
    bits = values.view(np.uint32)
    lost = np.uint32(0)
    for i in range(values.size):
        code = half_bits(values[i])
        out[i] = code
        infinite = (np.uint32(code) & _LOW) == _HALF_INFINITY
        lost |= np.uint32(infinite) & np.uint32((bits[i] & MAGNITUDE) != INFINITY)
    return lost != 0


@kernel(nothing(uint16, float32_out))
def from_half(bits: Any, out: Any) -> None:
    """Write the float32 values of half-precision numbers, given as their bits. Exact."""
    for i in range(bits.size):
        out[i] = half_value(bits[i])


@kernel(boolean(uint32, uint16_out))
def to_bfloat16(bits: Any, out: Any) -> Any:
    """The same for bfloat16; takes float32 as its bits."""
    lost = np.uint32(0)
    for i in range(bits.size):
        upper = bits[i] >> _16
        code = (bits[i] + _LOW + (upper & np.uint32(1))) >> _16
        magnitude = bits[i] & MAGNITUDE
        code = upper | _QUIET if magnitude > INFINITY else code
        out[i] = np.uint16(code)
        lost |= np.uint32((code & _LOW) == _BF16_INFINITY) & np.uint32(magnitude != INFINITY)
    return lost != 0


@kernel(nothing(uint16, uint32_out))
def from_bfloat16(bits: Any, out: Any) -> None:
    """Writes float32 as its bits. Exact."""
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << _16
