"""The largest values of each chunk of 4096: their places in 12 bits, and a sign and one of two magnitudes in 2 bits."""

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
    float_of,
    kernel,
    largest,
    nothing,
    size,
    uint8,
    uint8_out,
    uint16,
    uint16_out,
)

_CHUNK = 4096
_BINS = 2048
_STEPS = np.float64(65535)


@njit(nogil=True, error_model="numpy", inline="always")
def _bin_of(counts: Any, wanted: Any) -> Any:
    """The bin of the value that has the rank `wanted` from above, and how many are in the bins above that."""
    above, b = np.int64(0), np.int64(_BINS - 1)
    while above + counts[b] < wanted:
        above += counts[b]
        b -= 1
    return b, above


@njit(nogil=True, error_model="numpy")
def _threshold(keys: Any, n: Any, wanted: Any, counts: Any, rest: Any) -> Any:
    """The key of rank `wanted` from above among the first `n`, and how many of those that equal it are needed.

    The bits of a key are looked at from the first on, 11, 11 and 9 at once: each time only those count that are in the
    bin of the one that is looked for. So the time is linear, whatever the values are.
    """
    counts[:] = 0
    for i in range(n):
        counts[keys[i] >> np.uint32(20)] += 1
    first, above = _bin_of(counts, wanted)
    wanted -= above
    left = np.intp(0)
    for i in range(n):
        rest[left] = keys[i]
        left += np.intp(np.int64(keys[i] >> np.uint32(20)) == first)
    counts[:] = 0
    for i in range(left):
        counts[(rest[i] >> np.uint32(9)) & np.uint32(0x7FF)] += 1
    second, above = _bin_of(counts, wanted)
    wanted -= above
    upper = np.uint32((first << 11) | second)
    counts[:] = 0
    for i in range(left):
        if rest[i] >> np.uint32(9) == upper:
            counts[rest[i] & np.uint32(0x1FF)] += 1
    third, above = _bin_of(counts, wanted)
    return np.uint32((np.int64(upper) << 9) | third), wanted - above


@kernel(boolean(float32, size, float32_out, uint16_out, uint8_out, uint8_out))
def encode(values: Any, most: Any, high: Any, low: Any, places: Any, signs: Any) -> Any:
    """Find the `most` largest magnitudes of each whole chunk, and in proportion of an incomplete last one.

    The larger level is the mean of those above their mean, the smaller one that of the others, in steps of the 65535th
    part of the larger one. Of equal magnitudes the first ones are taken; zeros never are: what is missing is filled up
    with the last one that is there.

    Returns False, with the outputs unfinished, as soon as a chunk holds NaN or Inf.
    """
    bits = values.view(np.uint32)
    keys, rest = np.empty(_CHUNK, np.uint32), np.empty(_CHUNK + 1, np.uint32)
    counts = np.empty(_BINS, np.int32)
    chosen = np.empty(_CHUNK, np.int32)
    place_bytes, sign_bytes = most * 3 // 2, most // 4
    for c in range(high.size):
        chunk_bits = bits[c * _CHUNK : (c + 1) * _CHUNK]
        n = chunk_bits.size
        count = -(-n * most // _CHUNK)
        if largest(chunk_bits) >= INFINITY:
            return False
        chunk_places = places[c * place_bytes : (c + 1) * place_bytes]
        chunk_signs = signs[c * sign_bytes : (c + 1) * sign_bytes]
        chunk_places[:] = np.uint8(0)
        chunk_signs[:] = np.uint8(0)
        for i in range(n):
            keys[i] = chunk_bits[i] & MAGNITUDE
        threshold, ties = _threshold(keys, n, count, counts, rest)
        found = 0
        for i in range(n):
            if keys[i] >= threshold and keys[i] > 0:
                if keys[i] == threshold:
                    if ties == 0:
                        continue
                    ties -= 1
                chosen[found] = i
                found += 1
        if found == 0:
            high[c], low[c] = np.float32(0), np.uint16(0)
            continue
        total = np.float64(0)
        for k in range(found):
            total += np.float64(float_of(keys[chosen[k]]))
        mean = total / found
        above, of_large = np.int64(0), np.float64(0)
        for k in range(found):
            magnitude = np.float64(float_of(keys[chosen[k]]))
            if magnitude > mean:
                above += 1
                of_large += magnitude
        # All the same, but for rounding: one level.
        large = np.float32(of_large / above) if above > 0 else np.float32(mean)
        below = found - above
        small = (total - of_large) / below if below > 0 else np.float64(0)
        high[c] = large
        low[c] = np.uint16(min(max(small / np.float64(large), 0.0), 1.0) * _STEPS + 0.5) if large > 0 else np.uint16(0)
        for k in range(count):
            place = chosen[min(k, found - 1)]
            is_large = above == 0 or np.float64(float_of(keys[place])) > mean
            code = (np.uint32(chunk_bits[place] > MAGNITUDE) << np.uint32(1)) | np.uint32(is_large)
            chunk_signs[k // 4] |= np.uint8(code << np.uint32(2 * (k % 4)))
            begin = k // 2 * 3
            if k % 2 == 0:
                chunk_places[begin] = np.uint8(place)
                chunk_places[begin + 1] |= np.uint8(place >> 8)
            else:
                chunk_places[begin + 1] |= np.uint8((place & 15) << 4)
                chunk_places[begin + 2] = np.uint8(place >> 4)
    return True


@kernel(nothing(float32, uint16, uint8, uint8, size, float32_out))
def decode(high: Any, low: Any, places: Any, signs: Any, most: Any, out: Any) -> None:
    """Write zeros, and the levels at their places; those beyond an incomplete chunk are left out."""
    place_bytes, sign_bytes = most * 3 // 2, most // 4
    levels = np.empty(4, np.float32)
    for c in range(high.size):
        chunk = out[c * _CHUNK : (c + 1) * _CHUNK]
        chunk_places = places[c * place_bytes : (c + 1) * place_bytes]
        chunk_signs = signs[c * sign_bytes : (c + 1) * sign_bytes]
        count = -(-chunk.size * most // _CHUNK)
        levels[1] = high[c]
        levels[0] = np.float32(np.float64(high[c]) * (np.float64(low[c]) / _STEPS))
        levels[2], levels[3] = -levels[0], -levels[1]
        chunk[:] = np.float32(0)
        for k in range(count):
            begin = k // 2 * 3
            middle = np.intp(chunk_places[begin + 1])
            if k % 2 == 0:
                place = np.intp(chunk_places[begin]) | ((middle & 15) << 8)
            else:
                place = (middle >> 4) | (np.intp(chunk_places[begin + 2]) << 4)
            if place < chunk.size:
                chunk[place] = levels[(chunk_signs[k // 4] >> np.uint8(2 * (k % 4))) & np.uint8(3)]
