"""Encoding that knows the past: with the residual of the last message added, against a model both sides hold.

With `x` the tensor, `e` the residual of the last message and `b` the base (all absent or zero if there is
none), `target = x + e`, `codes = Q(target - b)`, `arrived = b + D(codes)` rounded to x's dtype, and the new
residual is `target - arrived`. Sums are in float32, one rounding each, so that both sides get the same bits.

Error feedback: Seide et al., "1-Bit Stochastic Gradient Descent" (2014); Karimireddy et al., "Error Feedback Fixes
SignSGD" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvflare_rdma.accumulate import Encoded
from nvflare_rdma.codecs import (
    LOSSLESS,
    Array,
    Codec,
    ExactDelta,
    FixedSizeCodec,
    Float32,
    RelativeError,
    Squares,
    add_scaled,
    float32_runs,
    output_runs,
    sample_runs,
    squares_of,
    to_array,
    to_flat,
)
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.filters.delta_base import Base
from nvflare_rdma.filters.dither import DITHERED, Dither, dither_of
from nvflare_rdma.filters.encoding import TensorEncoder
from nvflare_rdma.filters.residuals import fitting

_ALL = np.float32(1)
#: Of a residual, with codecs that leave most values out: those wait for many rounds, and the older, the less they fit
#: (Sarfi et al., "SparseLoCo", 2025).
_KEPT = np.float32(0.95)
PIECE = 1 << 20  # elements worked on at a time, so that scratch memory stays at some MiB


@dataclass(frozen=True)
class Corrected:
    """One tensor that was encoded with what the past says about it.

    Attributes:
        encoded: the bytes that count.
        arrived: what the receiver gets, flat, in the tensor's own dtype (uint16 for bfloat16).
        residual: what it lacks, flat, bfloat16 bits; zero where the value is not finite.
        lost: how far `arrived` is from the tensor, in which no residual is.
    """

    encoded: Array
    arrived: Array
    residual: Array
    lost: Squares


@dataclass
class CorrectingEncoder(TensorEncoder):
    """Encodes a message's tensors with what the past says about them, and collects what the next message needs.

    Attributes:
        before: the residuals of the last message, by name.
        whole: whether the message is a model, and not a difference already.
        base: the model that tensors are encoded as the difference from, if there is one.
        noise: seed of the noise of stochastic rounding; None for none.
        arrived: what the receiver gets, by name, flat.
        lacking: what it lacks, by name, in the tensor's shape.
        owed: what it still lacks of the messages before, by name, where a tensor travels whole for want of a base.
        based: names of the tensors that are differences from `base`.
        limit: the largest relative error that a tensor may have; None for any.
    """

    before: Mapping[str, Array]
    whole: bool
    base: Base | None
    noise: str | None
    arrived: dict[str, Array] = field(default_factory=dict)
    lacking: dict[str, Array] = field(default_factory=dict)
    owed: dict[str, Array] = field(default_factory=dict)
    based: set[str] = field(default_factory=set)
    limit: float | None = None

    def choose(self, name: str, codec: Codec, value: Any) -> Codec:
        """Return the policy's codec, unless that is for differences and this would be none, or none that is smaller."""
        if isinstance(codec, ExactDelta):
            known = None if self.base is None else self._known(name, to_flat(value), value)
            return super().choose(name, codec, value) if known is None else codec
        if not codec.needs_feedback or not self.whole:
            return codec
        flat = to_flat(value)
        known = self._known(name, flat, value)
        residual = fitting(self.before, name, tuple(value.shape))
        if known is not None and difference_is_smaller(flat, residual, known):
            return codec
        if residual is not None and known is None:
            # The values are exact, but what was left out of earlier differences is in none of them: this side began
            # with a model that has not got it. Where a difference would not be smaller, the tensor has been made anew,
            # and nothing is owed to the new one.
            self.owed[name] = aged(residual).reshape(value.shape)
        return super().choose(name, codec, value)

    def estimate(self, name: str, codec: Codec, value: Any) -> RelativeError:
        """Return what would be lost of the tensor, from a sample of it and of what the past says about it."""
        if codec.name in LOSSLESS:
            return RelativeError(0.0)
        flat = to_flat(value)
        runs = sample_runs(flat.size)

        def sample(whole: Array | None) -> Array | None:
            return None if whole is None else np.concatenate([whole[run] for run in runs])

        values = np.concatenate([flat[run] for run in runs])
        known = self._known(name, flat, value)
        residual = fitting(self.before, name, tuple(value.shape))
        corrected, _ = self._corrected(name, codec, values, sample(residual), sample(known))
        return RelativeError(corrected.lost.relative, values.size < flat.size)

    def encode(self, name: str, codec: Codec, value: Any) -> tuple[Array, RelativeError]:
        """Encode the sum or difference if the codec can carry it, or else the values themselves. What was lost is
        measured."""
        self.based.discard(name)  # another codec may have been tried
        values = to_array(value)
        if codec.name == "lossless":
            self.arrived[name] = values.flatten()
            return super().encode(name, codec, values)
        flat = np.ascontiguousarray(values).reshape(-1)
        known = self._known(name, flat, value)
        if isinstance(codec, ExactDelta):
            assert known is not None  # `choose` has seen to that
            self.arrived[name] = values.flatten()
            return self._exactly(name, codec, flat, known)
        corrected, based = self._corrected(name, codec, flat, fitting(self.before, name, values.shape), known)
        self.arrived[name], self.lacking[name] = corrected.arrived, corrected.residual.reshape(values.shape)
        if based:
            self.based.add(name)
        return corrected.encoded, RelativeError(corrected.lost.relative)

    def _known(self, name: str, flat: Array, value: Any) -> Array | None:
        return self.base.for_sending(name, flat, tuple(value.shape)) if self.base is not None else None

    def _corrected(
        self, name: str, codec: Codec, flat: Array, residual: Array | None, known: Array | None
    ) -> tuple[Corrected, bool]:
        """Encode with residual and base if that helps, and say whether it is a difference from the base."""
        if known is not None and not codec.needs_feedback and not difference_is_smaller(flat, residual, known):
            known = None
        dither = self._dither(name, codec)
        try:
            return encode_corrected(codec, flat, residual, known, dither), known is not None
        except UnrepresentableError:
            if codec.needs_feedback or (residual is None and known is None):
                raise
            return encode_corrected(codec, flat, None, None, self._dither(name, codec)), False

    def _exactly(self, name: str, codec: ExactDelta, flat: Array, known: Array) -> tuple[Array, RelativeError]:
        self.based.add(name)
        encoded = np.empty(codec.encoded_nbytes(flat.size), np.uint8)
        return encoded[: codec.encode_against(flat, known, encoded)], RelativeError(0.0)

    def _dither(self, name: str, codec: Codec) -> Dither | None:
        at_random = self.noise is not None and codec.name in DITHERED
        return dither_of(codec, f"{self.noise}\0{name}") if at_random else None


def aged(residual: Array) -> Array:
    """Return a flat residual, bfloat16 bits, as it is after one more message that carried nothing of it."""
    left = np.empty_like(residual)
    for start in range(0, residual.size, PIECE):
        run = slice(start, start + PIECE)
        from_float32(to_float32(residual[run]) * _KEPT, left[run])
    return left


def difference_is_smaller(values: Array, residual: Array | None, base: Array) -> bool:
    """Return whether what `values` and residual are more than `base` is smaller than what they are.

    A codec's error follows the size of what it encodes, the largest of a block or all of it. So the difference has to
    be smaller as a whole, and no larger at its largest. If it isn't finite, it is not smaller.
    """
    squares, largest = np.zeros(2), np.zeros(2)
    for start in range(0, values.size, PIECE):
        stop = min(start + PIECE, values.size)
        target = to_float32(values[start:stop])
        if residual is not None:
            target += to_float32(residual[start:stop])
        with np.errstate(over="ignore", invalid="ignore"):
            for i, part in enumerate((target - to_float32(base[start:stop]), target)):
                squares[i] += np.dot(part, part)
                largest[i] = np.maximum(largest[i], np.abs(part).max())
    return bool(squares[0] < squares[1] and largest[0] <= largest[1])


def encode_corrected(
    codec: Codec, values: Array, residual: Array | None, base: Array | None, dither: Dither | None = None
) -> Corrected:
    """Encode flat `values` (float32, float16 or bfloat16 bits) with what the past says about them.

    Args:
        residual: bfloat16 bits of `values.size`, from the message before; None for none.
        base: flat, dtype and size of `values`; None to encode `values` themselves.
        dither: puts noise on what is encoded, piece by piece; None for none.

    Raises:
        UnrepresentableError: see `Codec.encode_into`; or there is a base and the difference from it is not finite, or
            a finite value would arrive as infinite in the tensor's own dtype.
    """
    n = values.size
    arrived, left = np.empty_like(values), np.empty(n, np.uint16)
    fixed = isinstance(codec, FixedSizeCodec) and codec.splits
    step = max(PIECE // codec.block_size, 1) * codec.block_size if fixed else max(n, 1)
    encoded = np.empty(codec.encoded_nbytes(n), np.uint8)
    written, gone = 0, Squares()
    for start in range(0, n, step):
        stop = min(start + step, n)
        target = to_float32(values[start:stop])
        if residual is not None:
            target += to_float32(residual[start:stop]) * (_KEPT if codec.needs_feedback else _ALL)
        offset = None if base is None else to_float32(base[start:stop])
        difference = target if offset is None else _difference(codec, target, offset)
        piece = encoded if step >= n else np.empty(codec.encoded_nbytes(stop - start), np.uint8)
        written = codec.encode_into(difference if dither is None else dither(difference), piece)
        if piece is not encoded:
            assert isinstance(codec, FixedSizeCodec)
            _place(codec, piece, encoded, start, stop, n)
        decoded = np.empty(stop - start, np.float32)
        codec.decode_into(piece[:written], decoded)
        add_base(decoded, offset, arrived[start:stop])
        gone += squares_of(values[start:stop], arrived[start:stop])
        finite = np.isfinite(target)
        with np.errstate(invalid="ignore"):
            target -= to_float32(arrived[start:stop])
        lost = ~np.isfinite(target)
        if (lost & finite).any():
            raise UnrepresentableError(f"{codec.name} can't carry its largest values: they would arrive as infinite")
        target[lost] = 0
        from_float32(target, left[start:stop])
    return Corrected(encoded[:written] if step >= n else encoded, arrived, left, gone)


def _difference(codec: Codec, target: Float32, offset: Float32) -> Float32:
    with np.errstate(over="ignore", invalid="ignore"):
        difference: Float32 = target - offset
    # Some codecs carry NaN and Inf, but a sum with the base would not give back what the difference was made of.
    if not np.isfinite(difference).all():
        raise UnrepresentableError(f"{codec.name} can't carry a difference that is NaN or Inf")
    return difference


def add_base(decoded: Float32, base: Array | None, out: Array) -> None:
    """Write `base + decoded` to `out`, rounded once to float32 and once to `out`'s dtype. `decoded` is used up."""
    if base is not None:
        decoded += base if base.dtype == np.float32 else to_float32(base)
    from_float32(decoded, out)


class OnBase(Encoded):
    """Values that are the sum of a base's and of a difference, which is encoded."""

    def __init__(self, difference: Encoded, base: Array) -> None:
        self.n, self.dtype, self.run, self.nbytes = difference.n, difference.dtype, difference.run, difference.nbytes
        self._difference = difference
        self._base = base

    def decode(self, start: int, out: Array) -> None:
        """See `Encoded.decode`."""
        difference = np.empty(out.size, np.float32)
        self._difference.decode(start, difference)
        add_base(difference, self._base[start : start + out.size], out)

    def add(self, start: int, weight: float, out: Float32) -> None:
        """See `Encoded.add`."""
        values = np.empty(out.size, np.float32)
        self.decode(start, values)
        add_scaled(values, weight, out)


def to_float32(values: Array) -> Float32:
    """Return a float32 copy of flat float32, float16, or uint16 (bfloat16 bits) values."""
    out = np.empty(values.size, np.float32)
    for start, run in float32_runs(values):
        out[start : start + run.size] = run
    return out


def from_float32(values: Float32, out: Array) -> None:
    """Write `values` to `out`, rounded to nearest even to its dtype (uint16 stands for bfloat16)."""
    for start, run in output_runs(out):
        run[:] = values[start : start + run.size]


def _place(codec: FixedSizeCodec, piece: Array, whole: Array, start: int, stop: int, n: int) -> None:
    """Copy the parts of the piece from `start` to `stop` to where they belong among those of all `n` values."""
    parts, before = codec.parts(whole, n), codec.layout(start)
    for (name, part), (_, _, first) in zip(codec.parts(piece, stop - start).items(), before, strict=True):
        parts[name][first : first + part.size] = part
