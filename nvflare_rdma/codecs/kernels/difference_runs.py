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
numba compiles them into each such place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from nvflare_rdma.codecs.kernels.huffman import STORED, read_plane, write_plane
from nvflare_rdma.codecs.kernels.jit import bits_used, kernel, size, uint8, uint8_out, uint32_out

SAME, GAPS, PLACES, ALL = 0, 1, 2, 3
FEW = 20  # `GAPS`, if at most one in so many is not 0
_MOST = 0.55  # `ALL`, if a larger share is not 0
_ABOVE = 16  # at most one in so many has more above its low bits than fits a byte
_SAMPLES = 2048
_1, _4, _7, _HALF, _ESCAPE = (np.uint32(n) for n in (1, 4, 7, 15, 255))


@njit(nogil=True, error_model="numpy")
def _write_number(number: Any, out: Any, used: Any) -> Any:
    for k in range(4):
        out[used + k] = (number >> (8 * k)) & 0xFF
    return used + 4


@njit(nogil=True, error_model="numpy")
def _read_number(encoded: Any, used: Any) -> Any:
    """The number, or -1 if nothing is there."""
    if used + 4 > encoded.size:
        return -1
    number: Any = 0
    for k in range(4):
        number |= np.intp(encoded[used + k]) << (8 * k)
    return number


@njit(nogil=True, error_model="numpy")
def _find_gaps(differences: Any, found: Any, gaps: Any, changed: Any) -> None:
    last, k = -1, 0
    for i in range(differences.size):
        if differences[i] != 0:
            gap = i - last - 1
            gaps[k], gaps[changed + k], found[k] = gap & 0xFF, gap >> 8, differences[i]
            last, k = i, k + 1


@njit(nogil=True, error_model="numpy")
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


@njit(nogil=True, error_model="numpy")
def _find_places(differences: Any, found: Any, places: Any) -> None:
    k, byte = np.uint64(0), np.uint32(0)
    for i in range(differences.size):
        word = differences[i]
        other = np.uint32(word != 0)
        found[k] = word  # the next one takes its place if it is 0
        k += np.uint64(other)
        byte = (byte >> _1) | (other << _7)
        places[np.uint64(i) >> np.uint64(3)] = np.uint8(byte)
    left = differences.size % 8
    if left:
        places[differences.size // 8] = np.uint8(byte >> np.uint32(8 - left))


@njit(nogil=True, error_model="numpy")
def _put_in_places(places: Any, changed: Any, found: Any, differences: Any) -> Any:
    """Return whether as many bits as differences were there. `found` has as much memory as `differences`."""
    k = np.uint64(0)
    for i in range(differences.size):
        other = (np.uint32(places[np.uint64(i) >> np.uint64(3)]) >> (np.uint32(i) & _7)) & _1
        differences[i] = found[k] & (np.uint32(0) - other)
        k += np.uint64(other)
    return np.intp(k) == changed


@njit(nogil=True, error_model="numpy")
def _cut(words: Any, n: Any, shift: Any, plane: Any, begin: Any) -> None:
    """Write a byte of each of the first `n` words."""
    begin = np.uint64(begin)
    for i in range(np.uint64(n)):
        plane[begin + i] = np.uint8(words[i] >> shift)


@njit(nogil=True, error_model="numpy")
def _cut_halves(words: Any, n: Any, shift: Any, plane: Any) -> None:
    half = np.uint64((n + 1) // 2)
    for i in range(np.uint64(n) - half):
        plane[i] = np.uint8(((words[i] >> shift) & _HALF) | (((words[half + i] >> shift) & _HALF) << _4))
    if n % 2:
        plane[n // 2] = np.uint8((words[n // 2] >> shift) & _HALF)


@njit(nogil=True, error_model="numpy")
def _paste(plane: Any, begin: Any, n: Any, shift: Any, words: Any) -> None:
    """Undo `_cut`, for words that have zeros there."""
    begin = np.uint64(begin)
    for i in range(np.uint64(n)):
        words[i] |= np.uint32(plane[begin + i]) << shift


@njit(nogil=True, error_model="numpy")
def _paste_halves(plane: Any, n: Any, shift: Any, words: Any) -> None:
    half = np.uint64((n + 1) // 2)
    for i in range(half):
        words[i] |= (np.uint32(plane[i]) & _HALF) << shift
    for i in range(np.uint64(n) - half):
        words[half + i] |= (np.uint32(plane[i]) >> _4) << shift


@njit(nogil=True, error_model="numpy")
def _has_escape(above: Any, begin: Any, end: Any) -> Any:
    top = np.uint8(0)
    for i in range(np.uint64(begin), np.uint64(end)):
        top = max(top, above[i])
    return top == 255


@njit(nogil=True, error_model="numpy")
def _move_together(words: Any, n: Any, above: Any, low: Any) -> Any:
    """Move what is above the low bits of those that have too much to the front; return how many there are."""
    k = 0
    for begin in range(0, n, 64):
        if _has_escape(above, begin, min(begin + 64, n)):
            for i in range(begin, min(begin + 64, n)):
                if above[i] == 255:
                    words[k] = words[i] >> low
                    k += 1
    return k


@njit(nogil=True, error_model="numpy")
def _put_above(rest: Any, above: Any, low: Any, words: Any, n: Any) -> Any:
    """Return whether there are as many as are needed."""
    k, kept = 0, (_1 << low) - _1
    for begin in range(0, n, 64):
        if _has_escape(above, begin, min(begin + 64, n)):
            for i in range(begin, min(begin + 64, n)):
                if above[i] == 255:
                    if k == rest.size:
                        return False
                    words[i] = (words[i] & kept) | (rest[k] << low)
                    k += 1
    return k == rest.size


@njit(nogil=True, error_model="numpy")
def _is_even(counts: Any, begin: Any, n: Any, samples: Any) -> Any:
    """Whether symbols are about equally frequent: that two samples are the same is then as rare as it can be."""
    same: Any = 0
    for symbol in range(begin, begin + n):
        same += np.intp(counts[symbol]) * np.intp(counts[symbol])
    return 20 * n * same < 23 * samples * samples + 20 * n * samples


@njit(nogil=True, error_model="numpy")
def _low_bits(words: Any, n: Any, bits: Any, even: Any) -> Any:
    """How many low bits are to be written as they are. `even`: for each byte of them, whether a code would gain
    nothing."""
    lengths, counts, halves = np.zeros(33, np.int64), np.zeros(768, np.uint32), np.zeros(16, np.uint32)
    samples = 0
    for i in range(0, n, (n // _SAMPLES) | 1):
        word = words[i]
        lengths[bits_used(word)] += 1
        for k in range(3):
            counts[np.uint32(256 * k) + ((word >> np.uint32(8 * k)) & _ESCAPE)] += _1
        samples += 1
    low, longer = bits - 8, 0
    while low >= 4:
        for length in range(low + 5, low + 9):
            longer += lengths[length]
        if longer * _ABOVE > samples:
            break
        low -= 4
    while low < bits - 8:
        shift, beyond = np.uint32(low), np.uint32(0)
        for i in range(n):
            beyond += np.uint32((words[i] >> shift) >= _ESCAPE)
        if np.intp(beyond) * _ABOVE <= n:
            break
        low += 4
    if samples < 1024:  # too few to tell
        return low
    for k in range(3):
        even[k] = _is_even(counts, 256 * k, 256, samples)
    for symbol in range(256):
        halves[symbol & 15] += counts[256 * min(low // 8, 2) + symbol]
    if low % 8 and not _is_even(halves, 0, 16, samples):
        low += 4  # as bytes they can have a code
    return low


@njit(nogil=True, error_model="numpy")
def _parts(planes: Any) -> Any:
    """Memory to work in: a byte for each difference, two bytes for each, and more."""
    part = planes.size // 8
    return planes[:part], planes[part : 3 * part], planes[3 * part :]


@kernel(size(uint32_out, size, size, uint8_out, size, uint32_out, uint8_out))
def write_run(differences: Any, bits: Any, changed: Any, out: Any, used: Any, found: Any, planes: Any) -> Any:
    """Write a run to `out` from `used` on; return where it ends. `differences` are left with no meaning.

    Args:
        bits: that a difference has, 16 or 32.
        changed: how many of the differences are not 0.
        found, planes: memory to work in: as many words, and eight bytes for each of `TILE` differences.
    """
    places, plane, room = _parts(planes)
    n, form = differences.size, ALL
    if changed == 0:
        form = SAME
    elif changed * FEW <= n:
        form = GAPS
    elif changed <= _MOST * n:
        form = PLACES
    out[used], used = form, used + 1
    if form == SAME:
        return used
    words, count = differences, n
    if form != ALL:
        used = _write_number(changed, out, used)
        words, count = found, changed
    if form == GAPS:
        _find_gaps(differences, found, places, changed)
    elif form == PLACES:
        _find_places(differences, found, places)
    even = np.zeros(3, np.bool_)
    low = _low_bits(words, count, bits, even)
    out[used], used = low, used + 1
    shift, more = np.uint32(low), 0
    bytes_low, bytes_all = (low + 7) // 8, (low + 7) // 8 + 1 + (bits - low + 7) // 8
    for step in range(-2, bytes_all):
        made, begin, nbytes = plane, 0, count
        if step < 0:
            if form == ALL or (form == PLACES and step == -1):
                continue
            made = places
            nbytes = changed if form == GAPS else (n + 7) // 8
            begin = changed if step == -1 else 0
        elif step < low // 8:
            if even[step]:
                out[used] = STORED
                _cut(words, count, np.uint32(8 * step), out, used + 1)
                used += 1 + count
                continue
            _cut(words, count, np.uint32(8 * step), plane, 0)
        elif step < bytes_low:
            nbytes = (count + 1) // 2
            _cut_halves(words, count, shift - _4, plane)
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
            _cut(words, more, np.uint32(8 * (step - bytes_low - 1)), plane, 0)
        used = write_plane(made, begin, nbytes, out, used, room)
    return used


@kernel(size(uint8, size, size, uint32_out, uint32_out, uint8_out))
def read_run(encoded: Any, used: Any, bits: Any, differences: Any, found: Any, planes: Any) -> Any:
    """Fill in the `differences` that begin at `used`; return where they end, or -1: they are damaged. `found`,
    `planes`: see `write_run`."""
    places, plane, room = _parts(planes)
    n, changed = differences.size, 0
    if used >= encoded.size:
        return -1
    form, used = encoded[used], used + 1
    words, count = differences, n
    if form in (GAPS, PLACES):
        changed, used = _read_number(encoded, used), used + 4
        if changed < 1 or changed > n or (form == GAPS and changed * FEW > n):
            return -1
        words, count = found, changed
    for i in range(count):
        words[i] = 0
    if form == SAME:
        return used
    if form > ALL or used >= encoded.size:
        return -1
    low, used = np.intp(encoded[used]), used + 1
    if low % 4 or low > bits - 8:
        return -1
    shift, rest = np.uint32(low), np.zeros(0, np.uint32)
    bytes_low, bytes_all = (low + 7) // 8, (low + 7) // 8 + 1 + (bits - low + 7) // 8
    for step in range(-2, bytes_all):
        made, begin, nbytes = plane, 0, count
        if step < 0:
            if form == ALL or (form == PLACES and step == -1):
                continue
            made = places
            nbytes = changed if form == GAPS else (n + 7) // 8
            begin = changed if step == -1 else 0
        elif step < low // 8:
            if used < encoded.size and encoded[used] == STORED:
                used += 1 + count
                if used > encoded.size:
                    return -1
                _paste(encoded, used - count, count, np.uint32(8 * step), words)
                continue
        elif step < bytes_low:
            nbytes = (count + 1) // 2
        elif step > bytes_low:
            if low + 8 >= bits:
                break
            if step == bytes_low + 1:
                more, used = _read_number(encoded, used), used + 4
                if more < 0 or more * _ABOVE > count:
                    return -1
                rest = np.zeros(more, np.uint32)
            if rest.size == 0:
                break
            begin, nbytes = count, rest.size
        used = read_plane(encoded, used, made, begin, nbytes, room)
        if used < 0:
            return -1
        if step > bytes_low:
            _paste(plane, begin, nbytes, np.uint32(8 * (step - bytes_low - 1)), rest)
        elif step == bytes_low:
            _paste(plane, 0, count, shift, words)
        elif step >= low // 8:
            _paste_halves(plane, count, shift - _4, words)
        elif step >= 0:
            _paste(plane, 0, count, np.uint32(8 * step), words)
    if low + 8 < bits and not _put_above(rest, plane, shift, words, count):
        return -1
    if form == ALL:
        return used
    if form == GAPS:
        fits = _put_after_gaps(places, changed, found, differences)
    else:
        fits = _put_in_places(places, changed, found, differences)
    return used if fits else -1
