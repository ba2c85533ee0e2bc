"""How a run of differences is written, and read.

A run is one byte, its form, and what that form has:

- `SAME`: nothing. All differences are 0.
- `GAPS`: how many are not (four bytes), and those; before them, how many zeros come before each, a plane of the lower
  bytes and one of the higher.
- `PLACES`: how many are not 0 (four bytes), and those; before them a plane of bits, which says where they are.
- `ALL`: all differences.

Differences are written as (1) one byte, how many of their low bits are written as they are, a multiple of four: nearly
nothing is known of those; (2) these bits, in planes of bytes, and then of half bytes; (3) a plane of what is above
them, with 255 for all that is not less; (4) how many are not less (four bytes), and what these have above the low bits,
in planes of bytes. (4) is left out where what is above fits one byte. (1) comes before the places.

The functions go by steps, one for each plane, so that `write_plane` and `read_plane` are called at one place each:
numba compiles them into each such place. For what else makes it compile soon, see `huffman.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.kernels import huffman
from nvflare_rdma.codecs.kernels.huffman import STORED, read_plane, write_plane
from nvflare_rdma.codecs.kernels.jit import (
    bits_used,
    inner,
    int64_out,
    kernel,
    load64,
    size,
    together,
    uint8,
    uint8_out,
    uint16_out,
    uint32_out,
)

SAME, GAPS, PLACES, ALL = 0, 1, 2, 3
FEW = 20  # `GAPS`, if at most one in so many is not 0
_MOST = 0.55  # `ALL`, if a larger share is not 0
_ABOVE = 16  # at most one in so many has more above its low bits than fits a byte
_SAMPLES = 2048
_1, _4, _7, _HALF, _ESCAPE = (np.uint32(n) for n in (1, 4, 7, 15, 255))
_FIRST, _LAST_PLANE = np.intp(0), np.intp(2)
_ONES = np.uint64(0x0101010101010101)  # one in each of eight bytes

# Where `work` has, after what planes take, how many samples have each byte, and each half byte; how many have each
# number of bits; and for each byte, and for half bytes, whether a code would gain nothing.
_BYTES = np.intp(huffman.WORK)
_HALVES, _BITS, _EVEN = _BYTES + np.intp(768), _BYTES + np.intp(784), _BYTES + np.intp(820)
_N_HALVES, _N_BYTES = np.intp(16), np.intp(256)
WORK = huffman.WORK + 824


@inner
def _write_number(number: Any, out: Any, used: Any) -> Any:
    for k in range(4):
        out[used + k] = (number >> (8 * k)) & 0xFF
    return used + 4


@inner
def _read_number(encoded: Any, used: Any) -> Any:
    """The number, or -1 if nothing is there."""
    if used + 4 > encoded.size:
        return -1
    number = np.intp(0)
    for k in range(4):
        number |= np.intp(encoded[used + k]) << (8 * k)
    return number


@inner
def _find_gaps(differences: Any, found: Any, gaps: Any, changed: Any) -> None:
    after: Any = np.intp(0)
    k = np.intp(0)
    for i in range(differences.size):
        if differences[i] != 0:
            gaps[k] = (i - after) & 0xFF
            gaps[changed + k] = (i - after) >> 8
            found[k] = differences[i]
            after = i + 1
            k += 1


@inner
def _put_after_gaps(gaps: Any, changed: Any, found: Any, differences: Any) -> Any:
    """Return whether no gap leads beyond the end."""
    for i in range(differences.size):
        differences[i] = 0
    place = np.intp(-1)
    for k in range(changed):
        place += (np.intp(gaps[k]) | (np.intp(gaps[changed + k]) << 8)) + 1
        if place >= differences.size:
            return False
        differences[place] = found[k]
    return True


@inner
def _find_places(differences: Any, found: Any, places: Any) -> None:
    k = np.uint64(0)
    byte = np.uint32(0)
    for i in range(differences.size):
        word = differences[i]
        other = np.uint32(word != 0)
        found[k] = word  # the next one takes its place if it is 0
        k += np.uint64(other)
        byte = (byte >> _1) | (other << _7)
        places[np.uint64(i) >> np.uint64(3)] = np.uint8(byte)
    left = differences.size & 7
    if left > 0:
        places[differences.size >> 3] = np.uint8(byte >> np.uint32(8 - left))


@inner
def _put_in_places(places: Any, changed: Any, found: Any, differences: Any) -> Any:
    """Return whether as many bits as differences were there. `found` has as much memory as `differences`."""
    k = np.uint64(0)
    for i in range(differences.size):
        other = (np.uint32(places[np.uint64(i) >> np.uint64(3)]) >> (np.uint32(i) & _7)) & _1
        differences[i] = found[k] & (np.uint32(0) - other)
        k += np.uint64(other)
    return np.intp(k) == changed


@inner
def _cut(words: Any, n: Any, shift: Any, plane: Any, begin: Any) -> None:
    """Write a byte of each of the first `n` words."""
    first = np.uint64(begin)
    for i in range(np.uint64(n)):
        plane[first + i] = np.uint8(words[i] >> shift)


@inner
def _cut_halves(words: Any, n: Any, shift: Any, plane: Any, begin: Any) -> None:
    first = np.uint64(begin)
    half = np.uint64((n + 1) >> 1)
    for i in range(np.uint64(n) - half):
        plane[first + i] = np.uint8(((words[i] >> shift) & _HALF) | (((words[half + i] >> shift) & _HALF) << _4))
    if n & 1:
        plane[begin + (n >> 1)] = np.uint8((words[n >> 1] >> shift) & _HALF)


@inner
def _paste(plane: Any, begin: Any, n: Any, shift: Any, words: Any) -> None:
    """Undo `_cut`, for words that have zeros there."""
    first = np.uint64(begin)
    for i in range(np.uint64(n)):
        words[i] |= np.uint32(plane[first + i]) << shift


@inner
def _paste_halves(plane: Any, n: Any, shift: Any, words: Any) -> None:
    half = np.uint64((n + 1) >> 1)
    for i in range(half):
        words[i] |= (np.uint32(plane[i]) & _HALF) << shift
    for i in range(np.uint64(n) - half):
        words[half + i] |= (np.uint32(plane[i]) >> _4) << shift


@inner
def _has_escape(above: Any, begin: Any) -> Any:
    """Whether one of eight bytes is 255. Those beyond the last one may be anything."""
    eight = load64(above, begin)
    return (~eight - _ONES) & eight & (_ONES << np.uint64(7)) != np.uint64(0)


@inner
def _move_together(words: Any, n: Any, above: Any, low: Any) -> Any:
    """Move what is above the low bits of those that have too much to the front; return how many there are."""
    k = np.intp(0)
    for begin in range(0, n, 8):
        if _has_escape(above, begin):
            for i in range(begin, min(begin + 8, n)):
                if above[i] == 255:
                    words[k] = words[i] >> low
                    k += 1
    return k


@inner
def _put_above(rest: Any, more: Any, above: Any, low: Any, words: Any, n: Any) -> Any:
    """Return whether there are as many as are needed."""
    k = np.intp(0)
    kept = (_1 << low) - _1
    for begin in range(0, n, 8):
        if _has_escape(above, begin):
            for i in range(begin, min(begin + 8, n)):
                if above[i] == 255:
                    if k == more:
                        return False
                    words[i] = (words[i] & kept) | (rest[k] << low)
                    k += 1
    return k == more


@inner
def _is_even(work: Any, begin: Any, n: Any, samples: Any) -> Any:
    """Whether symbols are about equally frequent: that two samples are the same is then as rare as it can be."""
    same = np.intp(0)
    for symbol in range(begin, begin + n):
        same += work[symbol] * work[symbol]
    return 20 * n * same < 23 * samples * samples + 20 * n * samples


@inner
def _look_at_samples(words: Any, n: Any, work: Any) -> Any:
    """Count the bytes of some words, and how many bits they have; return how many they are."""
    for i in range(_BYTES, _BYTES + 824):
        work[i] = 0
    samples = np.intp(0)
    for i in range(0, n, (n // _SAMPLES) | 1):
        word = words[i]
        work[_BITS + bits_used(word)] += 1
        work[_BYTES + np.intp(word & _ESCAPE)] += 1
        work[_BYTES + 256 + np.intp((word >> np.uint32(8)) & _ESCAPE)] += 1
        work[_BYTES + 512 + np.intp((word >> np.uint32(16)) & _ESCAPE)] += 1
        samples += 1
    return samples


@inner
def _low_bits(words: Any, n: Any, bits: Any, samples: Any, work: Any) -> Any:
    """How many low bits are to be written as they are; and to `work`, for each byte of them, whether a code would gain
    nothing."""
    low = bits - 8
    longer = np.intp(0)
    while low >= 4:
        for length in range(low + 5, low + 9):
            longer += work[_BITS + length]
        if longer * _ABOVE > samples:
            break
        low -= 4
    while low < bits - 8:
        shift = np.uint32(low)
        beyond = np.uint32(0)
        for i in range(n):
            beyond += np.uint32((words[i] >> shift) >= _ESCAPE)
        if np.intp(beyond) * _ABOVE <= n:
            break
        low += 4
    if samples < 1024:  # too few to tell
        return low
    for k in range(3):
        work[_EVEN + k] = _is_even(work, _BYTES + 256 * k, _N_BYTES, samples)
    plane = _BYTES + 256 * min(low >> 3, _LAST_PLANE)
    for symbol in range(256):
        work[_HALVES + (symbol & 15)] += work[plane + symbol]
    if low & 7:
        work[_EVEN + 3] = _is_even(work, _HALVES, _N_HALVES, samples)
        if work[_EVEN + 3] == 0:
            low += 4  # as bytes they can have a code
    return low


# What the kernels take to work in: for each of `TILE` differences a word, a byte, and two bytes; a word for each
# sixteenth; two bytes for each, and eight more; `WORK` numbers; `huffman.PLACES` entries.
MEMORY = together(uint32_out, uint8_out, uint8_out, uint32_out, uint8_out, int64_out, uint16_out)


@kernel(size(uint32_out, size, size, uint8_out, size, MEMORY))
def write_run(differences: Any, bits: Any, changed: Any, out: Any, used: Any, memory: Any) -> Any:
    """Write a run to `out` from `used` on; return where it ends. `differences` are left with no meaning.

    Args:
        bits: that a difference has, 16 or 32.
        changed: how many of the differences are not 0.
        memory: see `MEMORY`.
    """
    found = memory[0]
    places = memory[1]
    plane = memory[2]
    room = memory[4]
    work = memory[5]
    n = differences.size
    form = np.intp(ALL)
    if changed == 0:
        form = np.intp(SAME)
    elif changed * FEW <= n:
        form = np.intp(GAPS)
    elif changed <= _MOST * n:
        form = np.intp(PLACES)
    out[used] = form
    used += 1
    if form == SAME:
        return used
    words = differences
    count = n
    if form != ALL:
        used = _write_number(changed, out, used)
        words = found
        count = changed
    if form == GAPS:
        _find_gaps(differences, found, places, changed)
    elif form == PLACES:
        _find_places(differences, found, places)
    samples = _look_at_samples(words, count, work)
    low = _low_bits(words, count, bits, samples, work)
    out[used] = low
    used += 1
    shift = np.uint32(low)
    more = np.intp(0)
    bytes_low = (low + 7) >> 3
    bytes_all = bytes_low + 1 + ((bits - low + 7) >> 3)
    for step in range(-2, bytes_all):
        made = plane
        begin = np.intp(0)
        nbytes = count
        if step < 0:
            if form == ALL or (form == PLACES and step == -1):
                continue
            made = places
            nbytes = (n + 7) >> 3
            if form == GAPS:
                nbytes = changed
            if step == -1:
                begin = changed
        elif step < low >> 3:
            if work[_EVEN + step] != 0:
                out[used] = STORED
                _cut(words, count, np.uint32(8 * step), out, used + 1)
                used += 1 + count
                continue
            _cut(words, count, np.uint32(8 * step), plane, _FIRST)
        elif step < bytes_low:
            nbytes = (count + 1) >> 1
            if work[_EVEN + 3] != 0:
                out[used] = STORED
                _cut_halves(words, count, shift - _4, out, used + 1)
                used += 1 + nbytes
                continue
            _cut_halves(words, count, shift - _4, plane, _FIRST)
        elif step == bytes_low:
            for i in range(count):
                plane[i] = np.uint8(min(words[i] >> shift, _ESCAPE))
        else:
            if step == bytes_low + 1:
                if low + 8 >= bits:
                    break
                more = _move_together(words, count, plane, shift)
                used = _write_number(more, out, used)
            if more == 0:
                break
            nbytes = more
            _cut(words, more, np.uint32(8 * (step - bytes_low - 1)), plane, _FIRST)
        used = write_plane(made, begin, nbytes, out, used, room, work)
    return used


@kernel(size(uint8, size, size, uint32_out, MEMORY))
def read_run(encoded: Any, used: Any, bits: Any, differences: Any, memory: Any) -> Any:
    """Fill in the `differences` that begin at `used`; return where they end, or -1: they are damaged. `memory`: see
    `MEMORY`."""
    found = memory[0]
    places = memory[1]
    plane = memory[2]
    rest = memory[3]
    planes = (memory[4], memory[5], memory[6])
    n = differences.size
    changed = np.intp(0)
    more = np.intp(0)
    if used >= encoded.size:
        return -1
    form = np.intp(encoded[used])
    used += 1
    words = differences
    count = n
    if form in (GAPS, PLACES):
        changed = _read_number(encoded, used)
        used += 4
        if changed < 1 or changed > n:
            return -1
        if form == GAPS and changed * FEW > n:
            return -1
        words = found
        count = changed
    for i in range(count):
        words[i] = 0
    if form == SAME:
        return used
    if form > ALL or used >= encoded.size:
        return -1
    low = np.intp(encoded[used])
    used += 1
    if low & 3 or low > bits - 8:
        return -1
    shift = np.uint32(low)
    bytes_low = (low + 7) >> 3
    bytes_all = bytes_low + 1 + ((bits - low + 7) >> 3)
    for step in range(-2, bytes_all):
        made = plane
        begin = np.intp(0)
        nbytes = count
        if step < 0:
            if form == ALL or (form == PLACES and step == -1):
                continue
            made = places
            nbytes = (n + 7) >> 3
            if form == GAPS:
                nbytes = changed
            if step == -1:
                begin = changed
        elif step < low >> 3:
            if used < encoded.size and encoded[used] == STORED:
                used += 1 + count
                if used > encoded.size:
                    return -1
                _paste(encoded, used - count, count, np.uint32(8 * step), words)
                continue
        elif step < bytes_low:
            nbytes = (count + 1) >> 1
        elif step > bytes_low:
            if low + 8 >= bits:
                break
            if step == bytes_low + 1:
                more = _read_number(encoded, used)
                used += 4
                if more < 0 or more * _ABOVE > count:
                    return -1
                for i in range(more):
                    rest[i] = 0
            if more == 0:
                break
            begin = count
            nbytes = more
        used = read_plane(encoded, used, made, begin, nbytes, planes)
        if used < 0:
            return -1
        if step > bytes_low:
            _paste(plane, begin, nbytes, np.uint32(8 * (step - bytes_low - 1)), rest)
        elif step == bytes_low:
            _paste(plane, _FIRST, count, shift, words)
        elif step >= low >> 3:
            _paste_halves(plane, count, shift - _4, words)
        elif step >= 0:
            _paste(plane, _FIRST, count, np.uint32(8 * step), words)
    if low + 8 < bits and not _put_above(rest, more, plane, shift, words, count):
        return -1
    if form == ALL:
        return used
    if form == GAPS:
        fits = _put_after_gaps(places, changed, found, differences)
    else:
        fits = _put_in_places(places, changed, found, differences)
    return used if fits else -1
