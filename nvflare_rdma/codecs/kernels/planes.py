"""Floating-point numbers to planes of bytes and back.

Each number is first rotated left by one bit, so that the sign comes last and the first byte of a bfloat16 or float32
is its exponent: that byte compresses well, where sign and mantissa are close to random.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.kernels.jit import (
    kernel,
    nothing,
    uint8,
    uint8_out,
    uint16,
    uint16_out,
    uint32,
    uint32_out,
)

_1, _8, _15, _16, _24, _31 = (np.uint32(n) for n in (1, 8, 15, 16, 24, 31))


@kernel(nothing(uint16, uint8_out))
def split16(words: Any, planes: Any) -> None:
    """`planes`: two runs of `words.size` bytes, the first bytes first."""
    n = words.size
    first, second = planes[:n], planes[n : 2 * n]
    for i in range(n):
        word = (np.uint32(words[i]) << _1) | (np.uint32(words[i]) >> _15)
        first[i] = np.uint8(word >> _8)
        second[i] = np.uint8(word)


@kernel(nothing(uint8, uint16_out))
def merge16(planes: Any, words: Any) -> None:
    """Undo `split16`."""
    n = words.size
    first, second = planes[:n], planes[n : 2 * n]
    for i in range(n):
        word = (np.uint32(first[i]) << _8) | np.uint32(second[i])
        words[i] = np.uint16((word >> _1) | (word << _15))


@kernel(nothing(uint32, uint8_out))
def split32(words: Any, planes: Any) -> None:
    """Rotate words left by one bit and write four runs of `words.size` bytes, the first bytes first."""
    n = words.size
    first, second, third, fourth = planes[:n], planes[n : 2 * n], planes[2 * n : 3 * n], planes[3 * n : 4 * n]
    for i in range(n):
        word = np.uint32((words[i] << _1) | (words[i] >> _31))
        first[i] = np.uint8(word >> _24)
        second[i] = np.uint8(word >> _16)
        third[i] = np.uint8(word >> _8)
        fourth[i] = np.uint8(word)


@kernel(nothing(uint8, uint32_out))
def merge32(planes: Any, words: Any) -> None:
    """Undo `split32`."""
    n = words.size
    first, second, third, fourth = planes[:n], planes[n : 2 * n], planes[2 * n : 3 * n], planes[3 * n : 4 * n]
    for i in range(n):
        word = (np.uint32(first[i]) << _24) | (np.uint32(second[i]) << _16) | (np.uint32(third[i]) << _8)
        word |= np.uint32(fourth[i])
        words[i] = np.uint32((word >> _1) | (word << _31))
