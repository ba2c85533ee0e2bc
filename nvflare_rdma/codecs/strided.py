"""Runs of a tensor's values in C order, whatever its strides, copied to and from flat memory.

numpy has no call for this that keeps to a bounded amount of memory: `ndarray.flat` and `reshape` copy, and
`nditer` chooses sizes of its own.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def read_run(tensor: Array, start: int, out: Array) -> None:
    """Copy ``tensor.reshape(-1)[start : start + out.size]`` to `out` (flat), converting to its dtype."""
    for part, first, last in _boxes(tensor, start, start + out.size, 0):
        np.copyto(out[first:last].reshape(part.shape), part, casting="unsafe")


def write_run(tensor: Array, start: int, values: Array) -> None:
    """The opposite of `read_run`: `values` (flat) become the elements of `tensor` from `start` on, in C order."""
    for part, first, last in _boxes(tensor, start, start + values.size, 0):
        np.copyto(part, values[first:last].reshape(part.shape), casting="unsafe")


def _boxes(tensor: Array, start: int, stop: int, done: int) -> list[tuple[Array, int, int]]:
    """Views that together are elements `start` to `stop` of `tensor`, each with its place in the flat run."""
    if start >= stop:
        return []
    if tensor.ndim <= 1 or tensor.flags.c_contiguous:
        return [(tensor.reshape(-1)[start:stop], done, done + stop - start)]
    row = tensor[0].size
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        return _boxes(tensor[last], start - last * row, stop - last * row, done)
    boxes = []
    if start < first * row:
        boxes += _boxes(tensor[first - 1], start - (first - 1) * row, row, done)
        done += first * row - start
    if first < last:
        boxes.append((tensor[first:last], done, done + (last - first) * row))
        done += (last - first) * row
    if last * row < stop:
        boxes += _boxes(tensor[last], 0, stop - last * row, done)
    return boxes
