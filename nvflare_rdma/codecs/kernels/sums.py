"""Sums of values and of what they are to be added to, each product and sum rounded once, as torch's `add_` does it."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.kernels.jit import (
    float32,
    float32_out,
    float32_value,
    float_of,
    half_value,
    kernel,
    multiply_add,
    nothing,
    uint16,
)

_16 = np.uint32(16)


@kernel(nothing(float32, float32_value, float32_out))
def add(values: Any, weight: Any, out: Any) -> None:
    """`out + weight * value`."""
    for i in range(out.size):
        out[i] = multiply_add(weight, values[i], out[i])


@kernel(nothing(uint16, float32_value, float32_out))
def add_half(bits: Any, weight: Any, out: Any) -> None:
    """The same for half-precision numbers, given as their bits."""
    for i in range(out.size):
        out[i] = multiply_add(weight, half_value(bits[i]), out[i])


@kernel(nothing(uint16, float32_value, float32_out))
def add_bfloat16(bits: Any, weight: Any, out: Any) -> None:
    """The same for bfloat16."""
    for i in range(out.size):
        out[i] = multiply_add(weight, float_of(np.uint32(bits[i]) << _16), out[i])
