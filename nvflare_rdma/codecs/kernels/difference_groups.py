"""Differences of two-byte values, in groups by how large the values of the base are.

A step of training moves a number by about as much whatever it is, which is many units in the last place of a small one
and none of a large one. So differences are less random among numbers of about one size. Both sides hold the base, and
know by its exponents where each difference belongs.

Of each run, this is written: one byte, how many groups there are; for each but the last, the last of its exponents, a
byte; and each group's differences, as `difference_runs` has them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nvflare_rdma.codecs.kernels.difference_runs import MEMORY, read_run, write_run
from nvflare_rdma.codecs.kernels.jit import (
    bits_used,
    inner,
    int64_out,
    kernel,
    size,
    together,
    uint8,
    uint8_out,
    uint16,
    uint32_out,
)

MOST = 16
#: A group has so many values at least, and so many of them have changed; but the last one's may be few.
_LEAST, _LEAST_CHANGED = 512, 256
_SAMPLES = 4096
#: What one more group takes for its form and its codes, in bytes: they have to gain more than that.
_COST = 96
_MAGNITUDE = np.uint32(0x7FFF)

# What `work` has: the group of each exponent; for each group, how many differences it has; where the next one of each
# half of the run goes; how many samples there are of each exponent; and of each exponent, and then of each group, with
# each number of bits.
_SIZES, _FIRST, _SECOND, _SAMPLED = (np.uint64(256 + n * MOST) for n in range(4))
_COUNTS = _SAMPLED + np.uint64(256)
_OF_GROUPS = _COUNTS + np.uint64(256 * 32)
WORK = int(_OF_GROUPS) + MOST * 32
_1, _5 = np.uint64(1), np.uint64(5)


@inner
def _exponent(base: Any, i: Any, shift: Any) -> Any:
    return np.uint64((np.uint32(base[i]) & _MAGNITUDE) >> shift)


@inner
def _group(base: Any, i: Any, shift: Any, work: Any) -> Any:
    return np.uint64(work[_exponent(base, i, shift)])


@inner
def _count(differences: Any, base: Any, shift: Any, work: Any) -> Any:
    """Count the bits of some differences, by exponent; return how many they are."""
    for i in range(_SAMPLED, np.uint64(work.size)):
        work[i] = 0
    samples = np.intp(0)
    for i in range(0, differences.size, (differences.size // _SAMPLES) | 1):
        exponent = _exponent(base, i, shift)
        work[_SAMPLED + exponent] += 1
        work[_COUNTS + (exponent << _5) + np.uint64(bits_used(differences[i]))] += 1
        samples += 1
    return samples


@inner
def _gain(groups: Any, samples: Any, work: Any) -> Any:
    """By how many bits a sample is less random if its group is known: the mutual information of that and its number of
    bits."""
    bits = 0.0
    for length in range(np.uint64(32)):
        total = np.intp(0)
        for group in range(np.uint64(groups)):
            total += work[_OF_GROUPS + (group << _5) + length]
        for group in range(np.uint64(groups)):
            count = work[_OF_GROUPS + (group << _5) + length]
            if count > 0:
                bits += count * math.log2(count * samples / (total * work[_SIZES + group]))
    return bits / samples


@inner
def _choose(differences: Any, base: Any, shift: Any, work: Any) -> Any:
    """Write the group of each exponent to `work`, and return how many groups there are."""
    n = differences.size
    samples = _count(differences, base, shift, work)
    share = samples / n
    least = max(_LEAST, n // MOST) * share
    least_changed = _LEAST_CHANGED * share
    group = np.uint64(0)
    values = np.intp(0)
    changed = np.intp(0)
    left = samples
    for exponent in range(np.uint64(256)):
        work[exponent] = np.intp(group)
        here = work[_SAMPLED + exponent]
        if here == 0:
            continue
        for length in range(np.uint64(32)):
            work[_OF_GROUPS + (group << _5) + length] += work[_COUNTS + (exponent << _5) + length]
        values += here
        changed += here - work[_COUNTS + (exponent << _5)]
        left -= here
        work[_SIZES + group] = values
        if values >= least and changed >= least_changed and left >= least and group + _1 < np.uint64(MOST):
            group += _1
            values = np.intp(0)
            changed = np.intp(0)
    groups = np.intp(group) + 1
    if groups > 1 and _gain(groups, samples, work) * n < 8 * _COST * (groups - 1):
        groups = np.intp(1)
    return groups


@inner
def _find_places(base: Any, shift: Any, groups: Any, work: Any) -> None:
    """Write to `work` how many differences each group has, and where the first one of each half of the run goes. With
    two halves, a number that was just written is not waited for as often."""
    for group in range(np.uint64(groups)):
        work[_FIRST + group] = 0
        work[_SECOND + group] = 0
    half = np.uint64(base.size >> 1)
    for i in range(half):
        first = _group(base, i, shift, work)
        second = _group(base, half + i, shift, work)
        work[_FIRST + first] += 1
        work[_SECOND + second] += 1
    if base.size & 1:
        work[_SECOND + _group(base, half + half, shift, work)] += 1
    place = np.intp(0)
    for group in range(np.uint64(groups)):
        before = work[_FIRST + group]
        after = work[_SECOND + group]
        work[_FIRST + group] = place
        work[_SECOND + group] = place + before
        work[_SIZES + group] = before + after
        place += before + after


@inner
def _take_place(group: Any, work: Any) -> Any:
    """`group` is that of a half."""
    place = work[group]
    work[group] = place + 1
    return np.uint64(place)


@inner
def _gather(differences: Any, base: Any, shift: Any, grouped: Any, work: Any) -> None:
    half = np.uint64(base.size >> 1)
    for i in range(half):
        first = _take_place(_FIRST + _group(base, i, shift, work), work)
        second = _take_place(_SECOND + _group(base, half + i, shift, work), work)
        grouped[first] = differences[i]
        grouped[second] = differences[half + i]
    if base.size & 1:
        last = half + half
        grouped[_take_place(_SECOND + _group(base, last, shift, work), work)] = differences[last]


@inner
def _scatter(differences: Any, base: Any, shift: Any, grouped: Any, work: Any) -> None:
    """Undo `_gather`."""
    half = np.uint64(base.size >> 1)
    for i in range(half):
        first = _take_place(_FIRST + _group(base, i, shift, work), work)
        second = _take_place(_SECOND + _group(base, half + i, shift, work), work)
        differences[i] = grouped[first]
        differences[half + i] = grouped[second]
    if base.size & 1:
        last = half + half
        differences[last] = grouped[_take_place(_SECOND + _group(base, last, shift, work), work)]


@inner
def _count_changed(grouped: Any, begin: Any, end: Any) -> Any:
    changed = np.uint32(0)
    for i in range(np.uint64(begin), np.uint64(end)):
        changed += np.uint32(grouped[i] != 0)
    return np.intp(changed)


# What the kernels take to work in: a word for each of `TILE` differences, `WORK` numbers, and what runs take.
_MEMORY = together(uint32_out, int64_out, MEMORY)


@kernel(size(uint32_out, uint16, size, size, uint8_out, size, _MEMORY))
def write_groups(differences: Any, base: Any, shift: Any, changed: Any, out: Any, used: Any, memory: Any) -> Any:
    """Write a run to `out` from `used` on; return where it ends. `differences` are left with no meaning.

    Args:
        base: the values that they are differences from.
        shift: the exponent of a value is its magnitude's bits above so many.
        changed: how many of the differences are not 0.
        memory: see `_MEMORY`.
    """
    grouped = memory[0]
    work = memory[1]
    runs = memory[2]
    shift = np.uint32(shift)
    groups = np.intp(1)
    if changed > 0 and differences.size >= 2 * _LEAST:
        groups = _choose(differences, base, shift, work)
    out[used] = groups
    used += 1
    if groups == 1:
        return write_run(differences, 16, changed, out, used, runs)
    for exponent in range(255):
        if work[exponent + 1] != work[exponent]:
            out[used] = exponent
            used += 1
    _find_places(base, shift, groups, work)
    _gather(differences, base, shift, grouped, work)
    begin = np.intp(0)
    for group in range(groups):
        end = begin + work[_SIZES + np.uint64(group)]
        changed = _count_changed(grouped, begin, end)
        used = write_run(grouped[begin:end], 16, changed, out, used, runs)
        begin = end
    return used


@kernel(size(uint8, size, uint16, size, uint32_out, _MEMORY))
def read_groups(encoded: Any, used: Any, base: Any, shift: Any, differences: Any, memory: Any) -> Any:
    """Fill in the `differences` that begin at `used`; return where they end, or -1: they are damaged. The others: see
    `write_groups`."""
    grouped = memory[0]
    work = memory[1]
    runs = memory[2]
    shift = np.uint32(shift)
    if used >= encoded.size:
        return -1
    groups = np.intp(encoded[used])
    used += 1
    if groups == 1:
        return read_run(encoded, used, 16, differences, runs)
    if groups < 1 or groups > MOST or used + groups - 1 > encoded.size:
        return -1
    exponent = np.intp(0)
    for group in range(groups):
        last = np.intp(255)
        if group < groups - 1:
            last = np.intp(encoded[used])
            used += 1
            if last < exponent or last == 255:
                return -1
        while exponent <= last:
            work[exponent] = group
            exponent += 1
    _find_places(base, shift, groups, work)
    begin = np.intp(0)
    for group in range(groups):
        end = begin + work[_SIZES + np.uint64(group)]
        used = read_run(encoded, used, 16, grouped[begin:end], runs)
        if used < 0:
            return -1
        begin = end
    _scatter(differences, base, shift, grouped, work)
    return used
