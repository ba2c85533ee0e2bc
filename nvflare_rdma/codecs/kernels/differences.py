"""Differences between numbers and those of a base, as integers, exact.

The bits of a number become an integer that is ordered as the numbers are: those below the sign are flipped for negative
ones. The difference of two such integers is small where the numbers are near to each other. It is taken modulo the size
of the word, and the sign is moved to the last bit, so that small differences have zeros for their first bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from nvflare_rdma.codecs.kernels.jit import kernel, nothing, size, uint16, uint16_out, uint32, uint32_out

_1, _15, _31 = (np.uint32(n) for n in (1, 15, 31))
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


@kernel(size(uint16, uint16, uint32_out))
def subtract16(words: Any, base: Any, out: Any) -> Any:
    """The same for words of two bytes."""
    changed = np.uint32(0)
    for i in range(words.size):
        difference = (_ordered16(np.uint32(words[i])) - _ordered16(np.uint32(base[i]))) & _WORD
        out[i] = np.uint32((difference << _1) ^ (np.uint32(0) - (difference >> _15))) & _WORD
        changed += np.uint32(difference != 0)
    return np.intp(changed)


@kernel(nothing(uint32, uint32, uint32_out))
def add32(differences: Any, base: Any, out: Any) -> None:
    """Undo `subtract32`."""
    for i in range(out.size):
        coded = differences[i]
        difference = (coded >> _1) ^ (np.uint32(0) - (coded & _1))
        out[i] = _ordered32(np.uint32(_ordered32(base[i]) + difference))


@kernel(nothing(uint32, uint16, uint16_out))
def add16(differences: Any, base: Any, out: Any) -> None:
    """Undo `subtract16`."""
    for i in range(out.size):
        coded = differences[i]
        difference = (coded >> _1) ^ (np.uint32(0) - (coded & _1))
        out[i] = np.uint16(_ordered16((_ordered16(np.uint32(base[i])) + difference) & _WORD))
