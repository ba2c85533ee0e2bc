"""Differences between numbers and those of a base, as integers, exact.

The bits of a number become an integer that is ordered as the numbers are: those below the sign are flipped for negative
ones. The difference of two such integers is small where the numbers are near to each other. It is taken modulo the size
of the word, and the sign is moved to the last bit, so that small differences have zeros for their first bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from nvflare_rdma.codecs.kernels.jit import (
    boolean,
    kernel,
    nothing,
    size,
    uint8,
    uint8_out,
    uint16,
    uint16_out,
    uint32,
    uint32_out,
)

_1, _15, _16, _31 = (np.uint32(n) for n in (1, 15, 16, 31))
_MAGNITUDE, _LOW, _WORD = np.uint32(0x7FFFFFFF), np.uint32(0x7FFF), np.uint32(0xFFFF)


@njit(nogil=True, error_model="numpy", inline="always")
def _ordered32(word: Any) -> Any:
    return word ^ ((np.uint32(0) - (word >> _31)) & _MAGNITUDE)


@njit(nogil=True, error_model="numpy", inline="always")
def _ordered16(word: Any) -> Any:
    """Of the lower half of a word, as such a half; its own inverse, as that of a whole one is."""
    return word ^ ((np.uint32(0) - (word >> _15)) & _LOW)


@kernel(size(uint32, uint32, uint32_out))
def subtract32(words: Any, base: Any, out: Any) -> Any:
    """Write the difference of each of the `words` from that of the `base`; return how many are not 0."""
    changed = np.uint32(0)
    for i in range(words.size):
        difference = np.uint32(_ordered32(words[i]) - _ordered32(base[i]))
        out[i] = np.uint32(difference << _1) ^ (np.uint32(0) - (difference >> _31))
        changed += np.uint32(difference != 0)
    return np.intp(changed)


@kernel(size(uint16, uint16, uint16_out))
def subtract16(words: Any, base: Any, out: Any) -> Any:
    """The same for words of two bytes."""
    changed = np.uint32(0)
    for i in range(words.size):
        difference = (_ordered16(np.uint32(words[i])) - _ordered16(np.uint32(base[i]))) & _WORD
        out[i] = np.uint16((difference << _1) ^ (np.uint32(0) - (difference >> _15)))
        changed += np.uint32(difference != 0)
    return np.intp(changed)


@kernel(nothing(uint32, uint32, uint32_out))
def add32(differences: Any, base: Any, out: Any) -> None:
    """Undo `subtract32`. `out` may be `differences`."""
    for i in range(out.size):
        coded = differences[i]
        difference = (coded >> _1) ^ (np.uint32(0) - (coded & _1))
        out[i] = _ordered32(np.uint32(_ordered32(base[i]) + difference))


@kernel(nothing(uint16, uint16, uint16_out))
def add16(differences: Any, base: Any, out: Any) -> None:
    """Undo `subtract16`. `out` may be `differences`."""
    for i in range(out.size):
        coded = np.uint32(differences[i])
        difference = (coded >> _1) ^ (np.uint32(0) - (coded & _1))
        out[i] = np.uint16(_ordered16((_ordered16(np.uint32(base[i])) + difference) & _WORD))


@kernel(nothing(uint32, uint8_out), nothing(uint16, uint8_out))
def split(words: Any, planes: Any) -> None:
    """`planes`: as many runs of `words.size` bytes as words have bytes, the lowest bytes first."""
    n = words.size
    for k in range(planes.size // max(n, 1)):
        plane = planes[k * n : (k + 1) * n]
        shift = np.uint32(8 * k)
        for i in range(n):
            plane[i] = np.uint8(np.uint32(words[i]) >> shift)


@kernel(nothing(uint8, uint32_out), nothing(uint8, uint16_out))
def merge(planes: Any, words: Any) -> None:
    """Undo `split`."""
    n = words.size
    words[:] = 0
    for k in range(planes.size // max(n, 1)):
        plane = planes[k * n : (k + 1) * n]
        shift = np.uint32(8 * k)
        for i in range(n):
            words[i] |= np.uint32(plane[i]) << shift


@kernel(nothing(uint32, uint16_out, uint32_out), nothing(uint16, uint16_out, uint16_out))
def gather(words: Any, gaps: Any, found: Any) -> None:
    """The words that are not 0 (`found.size` of them), and how many zeros come before each."""
    last, k = -1, 0
    for i in range(words.size):
        if words[i] != 0:
            gaps[k] = np.uint16(i - last - 1)
            found[k] = words[i]
            last, k = i, k + 1


@kernel(boolean(uint16, uint32, uint32_out), boolean(uint16, uint16, uint16_out))
def scatter(gaps: Any, found: Any, words: Any) -> Any:
    """Undo `gather`; return False if that would go beyond the `words`."""
    words[:] = 0
    place = np.intp(-1)
    for k in range(found.size):
        place += np.intp(gaps[k]) + 1
        if place >= words.size:
            return False
        words[place] = found[k]
    return True


@kernel(boolean(uint8))
def is_zero(run: Any) -> Any:
    """Return whether all bytes are 0."""
    seen = np.uint8(0)
    for i in range(run.size):
        seen |= run[i]
    return seen == 0
