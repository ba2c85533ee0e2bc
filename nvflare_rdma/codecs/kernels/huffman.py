"""Planes of bytes in the code of Huffman (1952), and back.

A plane is written as one byte, which says how, and:

- `CONSTANT`: the byte that all are;
- `STORED`: the bytes as they are;
- `CODED`: one byte, the last symbol that occurs; how long the code of each symbol up to that one is, in four bits; how
  many bytes each of four streams has, in two; the streams. Each has a quarter of the bytes, so that a processor has
  four of them at work at once. Codes have 11 bits at most, and their first bit is the lowest that is left.

What is written is never longer than the bytes themselves, plus one. No length in it is believed: a plane's size is the
caller's, and what is read beyond a stream's end is another stream or zeros.

It is written so that numba compiles it soon. Planes are given by where they begin and end in an array, and bytes are
copied in loops, for slices take several times as long. Memory to work in is the caller's: `room` has 8 bytes more than
the plane, `work` is `WORK` numbers, of which each function says by its constants which are its own, and `table` has
`PLACES` entries. All that is passed to a function has the same types at each call, literals too (`_FIRST`): it is
compiled for each types that there are. Functions that call others are few: one is optimized again in each that calls
it. Places are made unsigned, where it matters: numba looks whether others are
negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from nvflare_rdma.codecs.kernels.jit import inner, load64, store64

CONSTANT, STORED, CODED = 0, 1, 2
WORK, PLACES = 2584, 1 << 11
_LONGEST, _TAKEN, _ONE, _FIRST = (np.intp(n) for n in (11, PLACES, 1, 0))
_FEWEST = 64  # bytes for which a code is worth its table
_AT_ONCE = np.uint64(5)  # codes that fit the 56 bits which are there after each load
_0, _1, _3, _7, _8, _15, _255 = (np.uint64(n) for n in (0, 1, 3, 7, 8, 15, 255))
_INDEX, _HIGH = np.uint64(PLACES - 1), np.uint16(8)
_HUGE = np.intp(1 << 40)  # more than any weight

# Where `work` has what: the counters of bytes from 0 on, of which the first 256 are the counts; symbols in the order of
# their counts, and those in this order, between two others; the nodes' weights; parents, which become depths; the
# lengths of codes; the codes; where the next code of each length begins; how long streams are, or where they begin.
_ORDER, _LEAVES, _NODES, _DEPTHS = (np.intp(n) for n in (1024, 1281, 1540, 2052))
_LENGTHS, _CODES, _NEXTS, _SIZES = (np.intp(n) for n in (256, 512, 2564, 2580))
_CODE = np.uint64(_CODES)


@inner
def _copy(source: Any, begin: Any, end: Any, out: Any, place: Any) -> None:
    first = np.uint64(begin)
    to = np.uint64(place)
    for i in range(np.uint64(end) - first):
        out[to + i] = source[first + i]


@inner
def _count(plane: Any, begin: Any, end: Any, work: Any) -> None:
    """How often each byte occurs. Four counters for each, because a processor waits for the last sum of a counter."""
    for i in range(1024):
        work[i] = 0
    whole = begin + ((end - begin) & -8)
    for i in range(begin, whole, 8):
        word = load64(plane, i)
        for j in range(8):
            work[np.uint64(256 * (j & 3)) + ((word >> np.uint64(8 * j)) & _255)] += 1
    for i in range(whole, end):
        work[plane[i]] += 1
    for symbol in range(256):
        work[symbol] += work[256 + symbol] + work[512 + symbol] + work[768 + symbol]


@inner
def _sort(work: Any) -> Any:
    """Put the symbols that occur in the order of their counts; return how many there are."""
    m: Any = np.intp(0)
    work[_LEAVES - 1] = 0
    for k in range(256):
        symbol = 255 - k  # the lower symbols are mostly the more frequent ones, and so are nearly in order
        count = work[symbol]
        if count > 0:
            place = m
            while work[_LEAVES + place - 1] > count:
                work[_LEAVES + place] = work[_LEAVES + place - 1]
                work[_ORDER + place] = work[_ORDER + place - 1]
                place -= 1
            work[_LEAVES + place] = count
            work[_ORDER + place] = symbol
            m += 1
    work[_LEAVES + m] = _HUGE
    return m


@inner
def _find_depths(m: Any, work: Any) -> None:
    """How deep in Huffman's tree the `m` symbols are, which are in order."""
    for i in range(512):
        work[_NODES + i] = _HUGE
    leaf = np.intp(0)
    node = m
    for made in range(m, 2 * m - 1):
        weight = np.intp(0)
        for _ in range(2):
            if work[_LEAVES + leaf] <= work[_NODES + node]:
                weight += work[_LEAVES + leaf]
                work[_DEPTHS + leaf] = made
                leaf += 1
            else:
                weight += work[_NODES + node]
                work[_DEPTHS + node] = made
                node += 1
        work[_NODES + made] = weight
    work[_DEPTHS + 2 * m - 2] = 0
    for i in range(2 * m - 3, -1, -1):
        work[_DEPTHS + i] = work[_DEPTHS + work[_DEPTHS + i]] + 1


@inner
def _find_lengths(m: Any, work: Any) -> None:
    """How long the code of each symbol is, 0 for one that does not occur. The `m` that do are two at least, in order,
    and it is known how deep they are."""
    taken = np.intp(0)  # of all places in the table
    for i in range(m):
        depth = min(work[_DEPTHS + i], _LONGEST)
        work[_DEPTHS + i] = depth
        taken += _ONE << (_LONGEST - depth)
    rarest: Any = np.intp(0)
    while taken > _TAKEN:  # longer codes for the least frequent symbols that have not the longest
        depth = work[_DEPTHS + rarest]
        if depth == _LONGEST:
            rarest += 1
        else:
            work[_DEPTHS + rarest] = depth + 1
            taken -= _ONE << (_LONGEST - depth - 1)
    for symbol in range(256):
        work[_LENGTHS + symbol] = 0
    for i in range(m - 1, -1, -1):  # and what is left over to the most frequent ones that it is enough for
        depth = work[_DEPTHS + i]
        while depth > 1 and taken + (_ONE << (_LONGEST - depth)) <= _TAKEN:
            taken += _ONE << (_LONGEST - depth)
            depth -= 1
        work[_LENGTHS + work[_ORDER + i]] = depth


@inner
def _find_codes(work: Any) -> Any:
    """The code of each symbol, above its length, which has eight bits; return whether the lengths are a code's.

    Codes are numbered in the order of lengths and symbols, as numbers of eleven bits of which the first ones count. In
    what is found the first bit is the lowest."""
    for k in range(16):
        work[_NEXTS + k] = 0
    for symbol in range(256):
        length = work[_LENGTHS + symbol]
        if length > _LONGEST:
            return False
        if length > 0:
            work[_NEXTS + length + 1] += _ONE << (_LONGEST - length)
    for k in range(2, 13):
        work[_NEXTS + k] += work[_NEXTS + k - 1]
    if work[_NEXTS + _LONGEST + 1] > _TAKEN:
        return False
    for symbol in range(256):
        length = work[_LENGTHS + symbol]
        work[_CODES + symbol] = 0
        if length > 0:
            code = work[_NEXTS + length]
            work[_NEXTS + length] = code + (_ONE << (_LONGEST - length))
            turned = np.intp(0)
            for _ in range(11):
                turned = (turned << 1) | (code & 1)
                code >>= 1
            work[_CODES + symbol] = (turned << 8) | length
    return True


@inner
def _write_streams(plane: Any, begin: Any, n: Any, work: Any, room: Any) -> Any:
    """Write the four streams to `room`, and how many bytes each has to `work`; return how many all have."""
    quarter = (n + 3) >> 2
    place: Any = np.intp(0)
    for k in range(4):
        i = np.uint64(begin + k * quarter)
        end = np.uint64(begin + min((k + 1) * quarter, n))
        first = place
        bits = _0
        count = _0
        while i < end:
            if i + _AT_ONCE <= end:
                for _ in range(_AT_ONCE):
                    code = np.uint64(work[np.uint64(plane[i]) + _CODE])
                    bits |= (code >> _8) << count
                    count += code & _15
                    i += _1
            else:
                code = np.uint64(work[np.uint64(plane[i]) + _CODE])
                bits |= (code >> _8) << count
                count += code & _15
                i += _1
            store64(room, place, bits)
            place += np.intp(count >> _3)
            bits >>= count & ~_7
            count &= _7
        if count != _0:
            place += 1
        work[_SIZES + k] = place - first
    return place


@njit(nogil=True, error_model="numpy")
def write_plane(plane: Any, begin: Any, n: Any, out: Any, used: Any, room: Any, work: Any) -> Any:
    """Write the `n` bytes of `plane` from `begin` on, one at least, to `out` from `used` on; return where that ends."""
    _count(plane, begin, begin + n, work)
    last: Any = np.intp(0)
    most = np.intp(0)
    for symbol in range(256):
        most = max(most, work[symbol])
        if work[symbol] > 0:
            last = symbol
    if most == n:
        out[used] = CONSTANT
        out[used + 1] = last
        return used + 2
    if n >= _FEWEST:
        m = _sort(work)
        _find_depths(m, work)
        _find_lengths(m, work)
        bits = np.intp(0)
        for symbol in range(256):
            bits += work[symbol] * work[_LENGTHS + symbol]
        if 15 + (last >> 1) + (bits >> 3) < n:
            _find_codes(work)
            size = _write_streams(plane, begin, n, work, room)
            out[used] = CODED
            out[used + 1] = last
            place = used + 2
            for symbol in range(0, last + 1, 2):
                out[place] = work[_LENGTHS + symbol] | (work[_LENGTHS + symbol + 1] << 4)
                place += 1
            for k in range(4):
                out[place] = work[_SIZES + k] & 0xFF
                out[place + 1] = work[_SIZES + k] >> 8
                place += 2
            _copy(room, _FIRST, size, out, place)
            return place + size
    out[used] = STORED
    _copy(plane, begin, begin + n, out, used + 1)
    return used + 1 + n


@njit(nogil=True, error_model="numpy", inline="always")
def _bits(room: Any, place: Any) -> Any:
    """The next 57 bits or more from a place, counted in bits."""
    return load64(room, np.intp(place >> _3)) >> (place & _7)


@inner
def _read_streams(room: Any, size: Any, table: Any, plane: Any, begin: Any, n: Any, work: Any) -> None:
    quarter = (n + 3) >> 2
    end = np.uint64(8 * size)
    step = np.uint64(quarter)
    first = np.uint64(begin)
    second = first + step
    third = second + step
    fourth = third + step
    place0 = np.uint64(work[_SIZES])
    place1 = np.uint64(work[_SIZES + 1])
    place2 = np.uint64(work[_SIZES + 2])
    place3 = np.uint64(work[_SIZES + 3])
    whole = np.uint64(n - 3 * quarter) // _AT_ONCE * _AT_ONCE
    for i in range(_0, whole, _AT_ONCE):
        # Damaged lengths, of streams or codes, would lead beyond the end.
        place0 = min(place0, end)
        place1 = min(place1, end)
        place2 = min(place2, end)
        place3 = min(place3, end)
        bits0 = _bits(room, place0)
        bits1 = _bits(room, place1)
        bits2 = _bits(room, place2)
        bits3 = _bits(room, place3)
        for j in range(i, i + _AT_ONCE):
            entry0 = table[bits0 & _INDEX]
            entry1 = table[bits1 & _INDEX]
            entry2 = table[bits2 & _INDEX]
            entry3 = table[bits3 & _INDEX]
            plane[first + j] = np.uint8(entry0 >> _HIGH)
            plane[second + j] = np.uint8(entry1 >> _HIGH)
            plane[third + j] = np.uint8(entry2 >> _HIGH)
            plane[fourth + j] = np.uint8(entry3 >> _HIGH)
            length0 = np.uint64(entry0) & _15
            length1 = np.uint64(entry1) & _15
            length2 = np.uint64(entry2) & _15
            length3 = np.uint64(entry3) & _15
            bits0 = bits0 >> length0
            bits1 = bits1 >> length1
            bits2 = bits2 >> length2
            bits3 = bits3 >> length3
            place0 = place0 + length0
            place1 = place1 + length1
            place2 = place2 + length2
            place3 = place3 + length3
    work[_SIZES] = np.intp(place0)
    work[_SIZES + 1] = np.intp(place1)
    work[_SIZES + 2] = np.intp(place2)
    work[_SIZES + 3] = np.intp(place3)
    for k in range(4):
        place = np.uint64(work[_SIZES + k])
        for i in range(begin + k * quarter + np.intp(whole), begin + min((k + 1) * quarter, n)):
            place = min(place, end)
            entry = table[_bits(room, place) & _INDEX]
            plane[i] = np.uint8(entry >> _HIGH)
            place += np.uint64(entry) & _15


@inner
def _fill_table(last: Any, work: Any, table: Any) -> None:
    """Each symbol and the length of its code, at all places that begin with this."""
    for place in range(PLACES):
        table[place] = 0
    for symbol in range(last + 1):
        length = work[_LENGTHS + symbol]
        if length > 0:
            for place in range(work[_CODES + symbol] >> 8, _TAKEN, _ONE << length):
                table[place] = np.uint16((symbol << 8) | length)


@njit(nogil=True, error_model="numpy")
def read_plane(encoded: Any, used: Any, plane: Any, begin: Any, n: Any, memory: Any) -> Any:
    """Fill the `n` bytes of `plane` from `begin` on with what is written at `used`; return where that ends, or -1 if it
    is damaged. `memory`: room, work and table."""
    room = memory[0]
    work = memory[1]
    table = memory[2]
    if used + 2 > encoded.size:
        return -1
    kind = encoded[used]
    if kind == CONSTANT:
        for i in range(n):
            plane[begin + i] = encoded[used + 1]
        return used + 2
    if kind == STORED:
        if used + 1 + n > encoded.size:
            return -1
        _copy(encoded, used + 1, used + 1 + n, plane, begin)
        return used + 1 + n
    last = np.intp(encoded[used + 1])
    streams = used + 2 + (last >> 1) + 1 + 8
    if kind != CODED or n < _FEWEST or streams > encoded.size:
        return -1
    for symbol in range(256):
        work[_LENGTHS + symbol] = 0
    for symbol in range(last + 1):
        work[_LENGTHS + symbol] = (np.intp(encoded[used + 2 + (symbol >> 1)]) >> (4 * (symbol & 1))) & 15
    size = np.intp(0)
    for k in range(4):
        work[_SIZES + k] = 8 * size
        size += np.intp(encoded[streams - 8 + 2 * k]) | (np.intp(encoded[streams - 7 + 2 * k]) << 8)
    if size > n or streams + size > encoded.size:
        return -1
    if not _find_codes(work):
        return -1
    _fill_table(last, work, table)
    _copy(encoded, streams, streams + size, room, _FIRST)
    store64(room, size, _0)
    _read_streams(room, size, table, plane, begin, n, work)
    return streams + size
