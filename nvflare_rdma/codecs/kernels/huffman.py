"""Planes of bytes in the code of Huffman (1952), and back.

A plane is written as one byte, which says how, and:

- `CONSTANT`: the byte that all are;
- `STORED`: the bytes as they are;
- `CODED`: one byte, the last symbol that occurs; how long the code of each symbol up to that one is, in four bits; how
  many bytes each of four streams has, in two; the streams. Each has a quarter of the bytes, so that a processor has
  four of them at work at once. Codes have 11 bits at most, and their first bit is the lowest that is left.

What is written is never longer than the bytes themselves, plus one. No length in it is believed: a plane's size is the
caller's, and what is read beyond a stream's end is another stream or zeros.

Planes are given by where they begin and end in an array, and bytes are copied in loops: slices of arrays take numba
several times as long to compile. Places are made unsigned, where it matters: numba looks whether others are negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from nvflare_rdma.codecs.kernels.jit import load64, store64

CONSTANT, STORED, CODED = 0, 1, 2
_LONGEST = 11
_FEWEST = 64  # bytes for which a code is worth its table
_AT_ONCE = np.uint64(5)  # codes that fit the 56 bits which are there after each load
_PLACES = 1 << _LONGEST
_0, _1, _7, _8, _15 = (np.uint64(n) for n in (0, 1, 7, 8, 15))
_INDEX, _HIGH = np.uint64(_PLACES - 1), np.uint16(8)


@njit(nogil=True, error_model="numpy")
def _copy(source: Any, begin: Any, end: Any, out: Any, place: Any) -> None:
    begin, place = np.uint64(begin), np.uint64(place)
    for i in range(np.uint64(end) - begin):
        out[place + i] = source[begin + i]


@njit(nogil=True, error_model="numpy")
def _counts(plane: Any, begin: Any, end: Any) -> Any:
    """How often each byte occurs. Four counters for each, because a processor waits for the last sum of a counter."""
    counts = np.zeros(4 * 256, np.uint32)
    whole = begin + (end - begin) // 8 * 8
    for i in range(begin, whole, 8):
        word = load64(plane, i)
        for j in range(8):
            counts[np.uint64(256 * (j & 3)) + ((word >> np.uint64(8 * j)) & np.uint64(255))] += np.uint32(1)
    for i in range(whole, end):
        counts[plane[i]] += np.uint32(1)
    for symbol in range(256):
        counts[symbol] += counts[256 + symbol] + counts[512 + symbol] + counts[768 + symbol]
    return counts


@njit(nogil=True, error_model="numpy")
def _lengths(counts: Any) -> Any:
    """How long the code of each symbol is, 0 for one that does not occur. Two symbols occur at least."""
    order, m = np.empty(256, np.int64), 0
    for k in range(256):
        symbol = 255 - k  # the lower symbols are mostly the more frequent ones, and so are nearly in order
        if counts[symbol]:
            place = m
            while place and counts[order[place - 1]] > counts[symbol]:
                order[place] = order[place - 1]
                place -= 1
            order[place] = symbol
            m += 1
    weights, parents, depths = np.zeros(512, np.int64), np.zeros(512, np.int64), np.zeros(512, np.int64)
    for i in range(m):
        weights[i] = counts[order[i]]
    leaf, node = 0, m
    for made in range(m, 2 * m - 1):
        for _ in range(2):
            if leaf < m and (node >= made or weights[leaf] <= weights[node]):
                child, leaf = leaf, leaf + 1
            else:
                child, node = node, node + 1
            weights[made] += weights[child]
            parents[child] = made
    for i in range(2 * m - 3, -1, -1):
        depths[i] = depths[parents[i]] + 1
    taken = 0  # of all places in the table
    for i in range(m):
        depths[i] = min(depths[i], _LONGEST)
        taken += 1 << (_LONGEST - depths[i])
    i = 0
    while taken > _PLACES:  # longer codes for the least frequent symbols that have not the longest
        if depths[i] == _LONGEST:
            i += 1
        else:
            depths[i] += 1
            taken -= 1 << (_LONGEST - depths[i])
    for i in range(m - 1, -1, -1):  # and what is left over to the most frequent ones that it is enough for
        while depths[i] > 1 and taken + (1 << (_LONGEST - depths[i])) <= _PLACES:
            taken += 1 << (_LONGEST - depths[i])
            depths[i] -= 1
    lengths = np.zeros(256, np.uint8)
    for i in range(m):
        lengths[order[i]] = depths[i]
    return lengths


@njit(nogil=True, error_model="numpy")
def _codes(lengths: Any) -> Any:
    """The code of each symbol, above its length, which has eight bits; empty if the lengths are no code's.

    Codes are numbered in the order of lengths and symbols, as numbers of eleven bits of which the first ones count. In
    what is returned the first bit is the lowest."""
    nexts, codes = np.zeros(_LONGEST + 2, np.int64), np.zeros(256, np.uint32)
    for symbol in range(256):
        length = np.int64(lengths[symbol])
        if length > _LONGEST:
            return codes[:0]
        if length:
            nexts[length + 1] += 1 << (_LONGEST - length)
    for k in range(2, _LONGEST + 2):
        nexts[k] += nexts[k - 1]
    if nexts[_LONGEST + 1] > _PLACES:
        return codes[:0]
    for symbol in range(256):
        length = np.int64(lengths[symbol])
        if length:
            turned = 0
            for k in range(_LONGEST):
                turned |= ((nexts[length] >> k) & 1) << (_LONGEST - 1 - k)
            codes[symbol] = (turned << 8) | length
            nexts[length] += 1 << (_LONGEST - length)
    return codes


@njit(nogil=True, error_model="numpy")
def _write_streams(plane: Any, begin: Any, n: Any, codes: Any, room: Any, sizes: Any) -> Any:
    """Write the four streams to `room`, and how many bytes each has to `sizes`; return how many all have."""
    quarter: Any = (n + 3) // 4
    place: Any = 0
    for k in range(4):
        i, end, first = np.uint64(begin + k * quarter), np.uint64(begin + min((k + 1) * quarter, n)), place
        bits, count = _0, _0
        while i < end:
            if i + _AT_ONCE <= end:
                for _ in range(_AT_ONCE):
                    code = np.uint64(codes[plane[i]])
                    bits |= (code >> _8) << count
                    count += code & _15
                    i += _1
            else:
                code = np.uint64(codes[plane[i]])
                bits |= (code >> _8) << count
                count += code & _15
                i += _1
            store64(room, place, bits)
            place += np.intp(count >> np.uint64(3))
            bits >>= count & ~_7
            count &= _7
        place += np.intp(count != _0)
        sizes[k] = place - first
    return place


@njit(nogil=True, error_model="numpy")
def write_plane(plane: Any, begin: Any, n: Any, out: Any, used: Any, room: Any) -> Any:
    """Write the `n` bytes of `plane` from `begin` on, one at least, to `out` from `used` on; return where that ends.
    `room` has 8 bytes more than they are, for work."""
    counts = _counts(plane, begin, begin + n)
    last, most = 0, np.intp(0)
    for symbol in range(256):
        most = max(most, np.intp(counts[symbol]))
        if counts[symbol]:
            last = symbol
    if most == n:
        out[used], out[used + 1] = CONSTANT, last
        return used + 2
    if n >= _FEWEST:
        lengths = _lengths(counts)
        bits: Any = 0
        for symbol in range(last + 1):
            bits += np.intp(counts[symbol]) * np.intp(lengths[symbol])
        if 15 + last // 2 + bits // 8 < n:
            sizes = np.zeros(4, np.int64)
            size = _write_streams(plane, begin, n, _codes(lengths), room, sizes)
            out[used], out[used + 1] = CODED, last
            used += 2
            for symbol in range(0, last + 1, 2):
                out[used] = lengths[symbol] | (lengths[(symbol + 1) & 255] << np.uint8(4))
                used += 1
            for k in range(4):
                out[used], out[used + 1] = sizes[k] & 0xFF, sizes[k] >> 8
                used += 2
            _copy(room, 0, size, out, used)
            return used + size
    out[used] = STORED
    _copy(plane, begin, begin + n, out, used + 1)
    return used + 1 + n


@njit(nogil=True, error_model="numpy", inline="always")
def _bits(room: Any, place: Any) -> Any:
    """The next 57 bits or more from a place, counted in bits."""
    return load64(room, np.intp(place >> np.uint64(3))) >> (place & _7)


@njit(nogil=True, error_model="numpy")
def _read_streams(room: Any, begins: Any, size: Any, table: Any, plane: Any, begin: Any, n: Any) -> None:
    quarter, end = (n + 3) // 4, np.uint64(8 * size)
    first = np.uint64(begin)
    second = first + np.uint64(quarter)
    third, fourth = second + np.uint64(quarter), second + np.uint64(2 * quarter)
    places = np.zeros(4, np.uint64)
    for k in range(4):
        places[k] = np.uint64(8 * begins[k])
    place0, place1, place2, place3 = places[0], places[1], places[2], places[3]
    whole = np.uint64(n - 3 * quarter) // _AT_ONCE * _AT_ONCE
    for i in range(_0, whole, _AT_ONCE):
        # Damaged lengths, of streams or codes, would lead beyond the end.
        place0, place1, place2, place3 = min(place0, end), min(place1, end), min(place2, end), min(place3, end)
        bits0, bits1 = _bits(room, place0), _bits(room, place1)
        bits2, bits3 = _bits(room, place2), _bits(room, place3)
        for j in range(i, i + _AT_ONCE):
            entry0, entry1 = table[bits0 & _INDEX], table[bits1 & _INDEX]
            entry2, entry3 = table[bits2 & _INDEX], table[bits3 & _INDEX]
            plane[first + j] = np.uint8(entry0 >> _HIGH)
            plane[second + j] = np.uint8(entry1 >> _HIGH)
            plane[third + j] = np.uint8(entry2 >> _HIGH)
            plane[fourth + j] = np.uint8(entry3 >> _HIGH)
            length0, length1 = np.uint64(entry0) & _15, np.uint64(entry1) & _15
            length2, length3 = np.uint64(entry2) & _15, np.uint64(entry3) & _15
            bits0, bits1, bits2, bits3 = bits0 >> length0, bits1 >> length1, bits2 >> length2, bits3 >> length3
            place0, place1, place2, place3 = place0 + length0, place1 + length1, place2 + length2, place3 + length3
    places[0], places[1], places[2], places[3] = place0, place1, place2, place3
    for k in range(4):
        place = places[k]
        for i in range(begin + k * quarter + np.intp(whole), begin + min((k + 1) * quarter, n)):
            place = min(place, end)
            entry = table[_bits(room, place) & _INDEX]
            plane[i] = np.uint8(entry >> _HIGH)
            place += np.uint64(entry) & _15


@njit(nogil=True, error_model="numpy")
def read_plane(encoded: Any, used: Any, plane: Any, begin: Any, n: Any, room: Any) -> Any:
    """Fill the `n` bytes of `plane` from `begin` on with what is written at `used`; return where that ends, or -1 if it
    is damaged. `room`: see `write_plane`."""
    if used + 2 > encoded.size:
        return -1
    kind, used = encoded[used], used + 1
    if kind == CONSTANT:
        for i in range(n):
            plane[begin + i] = encoded[used]
        return used + 1
    if kind == STORED:
        if used + n > encoded.size:
            return -1
        _copy(encoded, used, used + n, plane, begin)
        return used + n
    last, used = np.intp(encoded[used]), used + 1
    streams = used + last // 2 + 1 + 8
    if kind != CODED or n < _FEWEST or streams > encoded.size:
        return -1
    lengths, begins = np.zeros(256, np.uint8), np.zeros(4, np.int64)
    size: Any = 0
    for symbol in range(last + 1):
        lengths[symbol] = (encoded[used + symbol // 2] >> np.uint8(4 * (symbol & 1))) & np.uint8(15)
    for k in range(4):
        begins[k] = size
        size += np.intp(encoded[streams - 8 + 2 * k]) | (np.intp(encoded[streams - 7 + 2 * k]) << 8)
    codes = _codes(lengths)
    if size > n or streams + size > encoded.size or codes.size == 0:
        return -1
    table = np.zeros(_PLACES, np.uint16)
    for symbol in range(last + 1):
        length = np.int64(lengths[symbol])
        if length:
            for place in range(np.int64(codes[symbol]) >> 8, _PLACES, 1 << length):
                table[place] = np.uint16((symbol << 8) | length)
    _copy(encoded, streams, streams + size, room, 0)
    store64(room, size, _0)
    _read_streams(room, begins, size, table, plane, begin, n)
    return streams + size
