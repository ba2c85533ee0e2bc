"""How much of a tensor a codec loses: its relative error.

The relative error of a tensor x that arrives as x' is::

    sqrt(sum((x - x') ** 2) / sum(x ** 2))

over all of its values, as the receiver gets them, in the tensor's own dtype. It is 0 of zeros that arrive as zeros, and
infinite of zeros that don't. NaN and infinities that arrive as they were are left out of both sums; where one of them
comes or goes, the error is infinite. Differences and sums are taken in float64, so neither denormal nor huge values
fall out of them.

It is *measured* over the whole tensor where what arrives is at hand, where there is a limit to it, and where the tensor
has up to 65536 values. Else it is *estimated* from 16 runs of 4096 values, evenly spaced from its first to its last
full run. The same tensor always gives the same estimate.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from nvflare_rdma.codecs.base import Codec, FixedSizeCodec
from nvflare_rdma.codecs.runs import TILE, Array, Float32, read_run, scratch
from nvflare_rdma.codecs.tensors import is_on_gpu, to_array
from nvflare_rdma.errors import UnrepresentableError

#: So many values an estimate is made of at most, in runs that all codecs can begin with.
SAMPLED = 1 << 16
_RUN = 4096
#: Codecs that lose nothing.
LOSSLESS = ("lossless", "exact_delta")


@dataclass(frozen=True, slots=True)
class Squares:
    """What some values have lost, as the sum of its squares, and the sum of their own squares."""

    lost: float = 0.0
    total: float = 0.0

    def __add__(self, other: Squares) -> Squares:
        return Squares(self.lost + other.lost, self.total + other.total)

    @property
    def relative(self) -> float:
        """The relative error of these values."""
        if not self.lost:
            return 0.0
        return math.sqrt(self.lost / self.total) if self.total else math.inf


@dataclass(frozen=True, slots=True)
class RelativeError:
    """The relative error of one tensor; `estimated` from a sample, or measured over the whole of it."""

    value: float
    estimated: bool = False

    def __str__(self) -> str:
        return f"{self.value:.3g}{' (estimated from a sample)' if self.estimated else ''}"


def squares_of(values: Array, arrived: Array) -> Squares:
    """Compare `values` with what arrives of them: both flat, of one size and dtype (float32, float16, or uint16 for
    bfloat16)."""
    from nvflare_rdma.codecs.kernels import errors

    found = Squares()
    for start in range(0, values.size, TILE):
        one = _in_float32(values[start : start + TILE], "errors")
        other = _in_float32(arrived[start : start + TILE], "errors arrived")
        sums = np.zeros(2)
        errors.add_squares(one, other, sums)
        # No square of a float32 overflows in float64.
        found += Squares(*sums.tolist()) if np.isfinite(sums).all() else _squares_of_finite(one, other)
    return found


def _squares_of_finite(values: Float32, arrived: Float32) -> Squares:
    finite = np.isfinite(values)
    same = np.array_equal(values[~finite], arrived[~finite], equal_nan=True) and np.isfinite(arrived[finite]).all()
    if not same:
        return Squares(math.inf, 1.0)
    wide = values[finite].astype(np.float64)
    off = wide - arrived[finite]
    return Squares(float(off @ off), float(wide @ wide))


def _in_float32(run: Array, name: str) -> Float32:
    if run.dtype == np.float32:
        return np.ascontiguousarray(run)
    from nvflare_rdma.codecs.kernels import halves

    out = scratch(name, np.float32, run.size)
    if run.dtype == np.float16:
        halves.from_half(np.ascontiguousarray(run).view(np.uint16), out)
    else:
        halves.from_bfloat16(np.ascontiguousarray(run), out.view(np.uint32))
    return out


def sample_runs(n: int) -> list[slice]:
    """Where the values lie that the error of a tensor of `n` values is estimated from: all of them if they are few."""
    if n <= SAMPLED:
        return [slice(0, n)]
    runs, last = SAMPLED // _RUN, n // _RUN - 1
    return [slice(start, start + _RUN) for start in (i * last // (runs - 1) * _RUN for i in range(runs))]


def sample_of(tensor: Any) -> Array:
    """The values of an encodable tensor at `sample_runs`, flat, in CPU memory."""
    runs = sample_runs(math.prod(tensor.shape))
    if is_on_gpu(tensor):
        flat = tensor.detach().reshape(-1)
        return np.concatenate([to_array(flat[run]) for run in runs])
    array = to_array(tensor)
    sample = np.empty(sum(run.stop - run.start for run in runs), array.dtype)
    filled = 0
    for run in runs:
        length = run.stop - run.start
        read_run(array, run.start, sample[filled : filled + length])
        filled += length
    return sample


def estimate_error(codec: Codec, tensor: Any) -> RelativeError:
    """Estimate what `codec` loses of an encodable tensor: encode a sample of it, and decode that.

    Raises:
        UnrepresentableError: the codec can't carry a value of the sample.
    """
    values = sample_of(tensor)
    return RelativeError(_lost_of(codec, values).relative, values.size < math.prod(tensor.shape))


def _lost_of(codec: Codec, values: Array) -> Squares:
    """Encode some flat values, decode that, and compare."""
    encoded, arrived = np.empty(codec.encoded_nbytes(values.size), np.uint8), np.empty_like(values)
    codec.decode_into(encoded[: codec.encode_into(values, encoded)], arrived)
    return squares_of(values, arrived)


def measure_error(codec: Codec, encoded: Any, tensor: Any) -> RelativeError:
    """Measure what was lost of an encodable tensor by encoding all of it to `encoded`."""
    return (
        RelativeError(0.0)
        if codec.name in LOSSLESS
        else RelativeError(lost_by(codec, encoded, to_array(tensor)).relative)
    )


def lost_by(codec: Codec, encoded: Any, values: Array) -> Squares:
    """Decode what `values`, of any shape and strides, were encoded to, run by run, and compare."""
    found = Squares()
    flat = values.reshape(-1) if values.flags.c_contiguous else None
    for start, arrived in _decoded_runs(codec, encoded, values.size, values.dtype):
        if flat is not None:
            run = flat[start : start + arrived.size]
        else:
            run = scratch("errors own", values.dtype, arrived.size)
            read_run(values, start, run)
        found += squares_of(run, arrived)
    return found


def _decoded_runs(codec: Codec, encoded: Any, n: int, dtype: Any) -> Iterator[tuple[int, Array]]:
    """Decode a tensor run by run; each run overwrites the one before."""
    parts = codec.parts(encoded, n)
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        out = scratch("errors decoded", dtype, stop - start)
        if isinstance(codec, FixedSizeCodec):
            codec.decode_parts_into(codec.parts_of_run(parts, start, stop), out)
        else:  # adaquant: any run of the codes, behind the header, is a piece
            codes = parts["codes"][start:stop]
            codec.decode_into(np.concatenate([parts["header"].view(np.uint8), codes.view(np.uint8)]), out)
        yield start, out


class SampledLoss:
    """Estimates the relative error of a tensor that is never whole in memory, from the values that `estimate_error`
    would take, as they come by. Several threads may show it values at once, and the same ones several times."""

    def __init__(self, codec: Codec, n: int) -> None:
        """The tensor has `n` values."""
        self._codec = codec
        self._n = n
        self._runs = sample_runs(n)
        self._lock = threading.Lock()
        #: By where a run begins; None of one that is left out.
        self._lost: dict[int, Squares | None] = {}

    def note(self, first: int, values: Array) -> None:
        """Look at the flat values that begin with the tensor's value `first`. None of them is unrepresentable; what a
        codec can't carry for all that, if it is encoded without the values around it, is left out."""
        for run in self._within(first, values.size):
            if run.start in self._lost:
                continue
            lost = None
            with contextlib.suppress(UnrepresentableError):  # two levels of scales depend on more values than a run's
                lost = _lost_of(self._codec, values[run.start - first : run.stop - first])
            with self._lock:
                self._lost.setdefault(run.start, lost)

    def leave_out(self, first: int, count: int) -> None:
        """Forget so many values from the tensor's value `first` on, and look at them no more: they travel exact."""
        with self._lock:
            self._lost |= dict.fromkeys(run.start for run in self._within(first, count))

    def _within(self, first: int, count: int) -> list[slice]:
        return [run for run in self._runs if first <= run.start and run.stop <= first + count]

    @property
    def error(self) -> RelativeError | None:
        """The relative error; None if nothing of the sample has come by."""
        with self._lock:
            known = [lost for lost in self._lost.values() if lost is not None]
        return RelativeError(sum(known, Squares()).relative, self._n > SAMPLED) if known else None


class PieceNotes:
    """Knows one marked tensor's encoded pieces, however many receivers they go to: digests of their bytes, and what
    they have lost, if there is a limit to that. Several threads may note pieces at once.

    Args:
        estimate: the tensor's relative error as it was estimated beforehand.
        limit: the relative error that it may have; None for any.
    """

    def __init__(self, estimate: RelativeError | None = None, limit: float | None = None) -> None:
        self.estimate = estimate
        self.limit = limit
        self._lock = threading.Lock()
        self._pieces: dict[int, tuple[bytes, Squares | None]] = {}
        self._measured: RelativeError | None = None

    def knows(self, first: int) -> bool:
        """Whether the piece that begins with value `first` was noted."""
        return first in self._pieces

    def note(self, first: int, encoded: Any, lost: Squares | None) -> None:
        """Note the piece that begins with value `first`: its encoded bytes, and what it lost if that was measured."""
        digest = xxhash.xxh3_128(encoded).digest()
        with self._lock:
            self._pieces[first] = digest, lost

    def digest(self, pieces: int) -> bytes | None:
        """The digest of a tensor of so many pieces: of those of its pieces, in order. None if some are not known."""
        with self._lock:
            if len(self._pieces) < pieces:
                return None
            return xxhash.xxh3_128(b"".join(digest for _, (digest, _) in sorted(self._pieces.items()))).digest()

    def error(self, pieces: int) -> RelativeError | None:
        """The relative error of a tensor of so many pieces: measured if all of them were, else estimated."""
        with self._lock:
            if self._measured is None and len(self._pieces) >= pieces:
                known = [lost for _, (_, lost) in sorted(self._pieces.items()) if lost is not None]
                if len(known) == len(self._pieces):
                    self._measured = RelativeError(sum(known, Squares()).relative)
            return self._measured or self.estimate

    def excess(self, pieces: int) -> float | None:
        """The relative error of a tensor of so many pieces, if it was measured and is beyond the limit."""
        if self.limit is None:
            return None
        found = self.error(pieces)
        return found.value if found is not None and not found.estimated and not found.value <= self.limit else None
