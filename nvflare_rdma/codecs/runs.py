"""Runs of a tensor's values in C order, whatever its strides and type, to and from flat float32 memory.

Work goes through scratch memory that belongs to the calling thread, so that nothing is allocated in proportion to
the tensor and threads don't wait for each other. numpy has no call that reads a strided tensor piece by piece within
a bounded amount of memory: `ndarray.flat` and `reshape` copy, and `nditer` chooses sizes of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]

TILE = 1 << 16  # elements; 256 KiB of float32, so that a tile and its scratch stay in the second-level cache


class _ThreadBuffers(threading.local):
    """Named buffers of one tile, made on first use and kept by the thread."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], Array] = {}


_scratch = _ThreadBuffers()


def scratch(name: str, dtype: Any, n: int) -> Array:
    """Return the calling thread's buffer `name` of `n` <= `TILE` elements. Its contents are left over from before."""
    if n > TILE:
        raise ValueError(f"scratch memory is {TILE} elements, not {n}")
    key = (name, np.dtype(dtype).str)
    buffer = _scratch.buffers.get(key)
    if buffer is None:
        buffer = _scratch.buffers[key] = np.empty(TILE, dtype)
    return buffer[:n]


def float32_runs(src: Array, longest: int | None = None) -> Iterator[tuple[int, Float32]]:
    """Yield `src` (float32, float16, or uint16 for bfloat16) in C order as flat float32 runs, each with its start.

    Contiguous float32 comes as views of `src` of at most `longest` values, or as one if that is None. All else goes
    through the thread's scratch memory in runs of `TILE` values at most; the next run overwrites it.
    """
    if src.dtype == np.float32:
        yield from own_runs(src, longest)
        return
    from nvflare_rdma.codecs.kernels import halves

    for start, run in own_runs(src, min(longest or TILE, TILE)):
        values = scratch("values", np.float32, run.size)
        if src.dtype == np.float16:
            halves.from_half(run.view(np.uint16), values)
        else:
            halves.from_bfloat16(run, values.view(np.uint32))
        yield start, values


def output_runs(out: Array, longest: int | None = None) -> Iterator[tuple[int, Float32]]:
    """Yield flat float32 runs that the caller fills, each with its start; they become the elements of `out`.

    This is the opposite of `float32_runs`. Values are rounded to nearest even. A run's contents before are left over.
    """
    if out.dtype == np.float32:
        yield from own_output_runs(out, longest)
        return
    from nvflare_rdma.codecs.kernels import halves

    for start, run in own_output_runs(out, min(longest or TILE, TILE)):
        values = scratch("values", np.float32, run.size)
        yield start, values
        if out.dtype == np.float16:
            halves.to_half(values, run.view(np.uint16))
        else:
            halves.to_bfloat16(values.view(np.uint32), run)


def own_runs(src: Array, longest: int | None) -> Iterator[tuple[int, Array]]:
    """Yield `src` in C order as flat runs of its own dtype, each with its start.

    A contiguous one comes as views of at most `longest` values, or as one if that is None. All else goes through the
    thread's scratch memory in runs of `TILE` values at most; the next run overwrites it.
    """
    for start, run, is_view in _runs(src, longest):
        if not is_view:
            read_run(src, start, run)
        yield start, run


def own_output_runs(out: Array, longest: int | None) -> Iterator[tuple[int, Array]]:
    """Yield flat runs of `out`'s own dtype that the caller fills, each with its start; they become its elements."""
    for start, run, is_view in _runs(out, longest):
        yield start, run
        if not is_view:
            write_run(out, start, run)


def _runs(tensor: Array, longest: int | None) -> Iterator[tuple[int, Array, bool]]:
    """Yield the start of each run, memory for it, and whether that is a view of the tensor."""
    flat = tensor.reshape(-1) if tensor.flags.c_contiguous else None
    step = min(longest or TILE, TILE) if flat is None else longest or tensor.size or 1
    for start in range(0, tensor.size, step):
        stop = min(start + step, tensor.size)
        run = scratch("run", tensor.dtype, stop - start) if flat is None else flat[start:stop]
        yield start, run, flat is not None


def read_run(tensor: Array, start: int, out: Array) -> None:
    """Copy `tensor.reshape(-1)[start : start + out.size]` to `out`, flat and of the same dtype."""
    for part, first, last in _subviews(tensor, start, start + out.size, 0):
        np.copyto(out[first:last].reshape(part.shape), part)


def write_run(tensor: Array, start: int, values: Array) -> None:
    """Write `values` (flat) to the elements of `tensor` from `start` on, in C order."""
    for part, first, last in _subviews(tensor, start, start + values.size, 0):
        np.copyto(part, values[first:last].reshape(part.shape))


def _subviews(tensor: Array, start: int, stop: int, done: int) -> list[tuple[Array, int, int]]:
    """Return views that together are elements `start` to `stop` of `tensor`, each with its place in the flat run."""
    if start >= stop:
        return []
    if tensor.ndim <= 1 or tensor.flags.c_contiguous:
        return [(tensor.reshape(-1)[start:stop], done, done + stop - start)]
    row = tensor[0].size
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        return _subviews(tensor[last], start - last * row, stop - last * row, done)
    views = []
    if start < first * row:
        views += _subviews(tensor[first - 1], start - (first - 1) * row, row, done)
        done += first * row - start
    if first < last:
        views.append((tensor[first:last], done, done + (last - first) * row))
        done += (last - first) * row
    if last * row < stop:
        views += _subviews(tensor[last], 0, stop - last * row, done)
    return views
