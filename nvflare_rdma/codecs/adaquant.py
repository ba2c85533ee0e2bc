"""FLARE's ADAQUANT: as many levels as the range of a tensor asks for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes, Codec, Float32, Parts
from nvflare_rdma.codecs.runs import float32_runs, output_runs
from nvflare_rdma.errors import CodecError, UnrepresentableError

_HEADER = np.dtype(np.float64)
_HEADER_NBYTES = 3 * _HEADER.itemsize
_WEIGHT = 0.01  # FLARE's default trade-off between size and error
_INFINITE = 0x7F800000
_LARGEST = float(np.finfo(np.float32).max)


class AdaQuant(Codec):
    """Evenly spaced levels from the smallest to the largest value of a piece (arXiv 2208.05174, which FLARE refers to).

    The number of levels is 2**b - 1, with b such that it is at least `sqrt(range * bits * ln(4) / 0.01)` for values
    of so many bits; codes take one byte if b <= 8, else two. All is computed in float64, with the formulas and in the
    order of `nvflare.app_opt.pt.quantization.ada_quant.AdaQuantizer`, so that codes, offset, norm and level equal
    FLARE's. There are two differences. Where FLARE arrives at zero levels (a range below 2.3e-4 in float32) and then
    decodes NaN, this codec uses one level. And codes are not compressed with bz2 afterwards, for that takes a hundred
    times as long as all the rest.

    Parts: `header`, float64: offset, norm (the range) and level; `codes`, uint8 or uint16, none if all values are
    the same. They belong to the encoded piece, so pieces of a tensor have other codes than the whole. The size is
    known only after encoding.

    NaN and Inf are not representable, nor is a range that takes more than 16 bits (9.7e5 or more in float32) or
    wouldn't make the values smaller (`UnrepresentableError`). Error: at most half of `norm / level`.
    """

    name = "adaquant"
    bits = 8
    block_size = 1
    splits = False

    def encoded_nbytes(self, n: int) -> int:
        """Return the most that `n` values can take: a header, and two bytes each."""
        return _HEADER_NBYTES + 2 * n

    def parts(self, encoded: Any, n: int) -> dict[str, Array]:
        """Return the header and the codes as views of `encoded`; see `Codec.parts`.

        Raises:
            CodecError: the header is damaged, or its level and the number of bytes don't fit `n` values.
        """
        flat = self._bytes(encoded)
        if flat.size < _HEADER_NBYTES:
            raise CodecError(f"{self.name}: {flat.size} encoded bytes are too few for a header")
        header = flat[:_HEADER_NBYTES].view(_HEADER)
        offset, norm, level = header.tolist()
        # Also refuses NaN: every value lies between the two ends, and those are float32.
        in_range = abs(offset) <= _LARGEST and abs(norm - offset) <= _LARGEST
        if not (in_range and norm >= 0 and 0 <= level <= 65535):
            raise CodecError(f"{self.name}: a header of offset {offset}, norm {norm} and level {level} is damaged")
        itemsize = 0 if norm == 0 else 1 if level <= 255 else 2
        if (norm > 0 and level < 1) or flat.size != _HEADER_NBYTES + itemsize * n:
            raise CodecError(f"{self.name}: {flat.size} encoded bytes don't fit {n} values and level {level:g}")
        return {"header": header, "codes": flat[_HEADER_NBYTES:].view(np.uint16 if itemsize == 2 else np.uint8)}

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return a bound per value: half a level, and what float64 sums and rounding to float32 lose."""
        offset, norm, level = self.parts(encoded, values.size)["header"].tolist()
        # The float64 sums lose something of the larger of range and offset; decoding rounds to float32.
        bound = norm / max(level, 1) * 0.5 + (norm + abs(offset)) * 2.0**-50
        result: Float32 = np.abs(values) * np.float32(2.0**-23)
        result += np.float32(bound * (1 + 2.0**-20) + 2.0**-149)
        return result

    def _encode(self, src: Array, out: Bytes) -> int:
        from nvflare_rdma.codecs.kernels import adaquant

        low, high = self._extremes(src)
        offset = -low
        norm = high + offset
        level = self._level(norm, 8 * src.itemsize) if norm > 0 else 0
        out[:_HEADER_NBYTES].view(_HEADER)[:] = offset, norm, level
        if norm == 0:
            return _HEADER_NBYTES
        itemsize = 1 if level <= 255 else 2
        used = _HEADER_NBYTES + itemsize * src.size
        codes = out[_HEADER_NBYTES:used].view(np.uint16 if itemsize == 2 else np.uint8)
        for start, values in float32_runs(src):
            adaquant.encode(values, offset, norm, float(level), codes[start : start + values.size])
        return used

    def _extremes(self, src: Array) -> tuple[float, float]:
        """Return the smallest and the largest value, as float64."""
        from nvflare_rdma.codecs.kernels import adaquant

        found = [adaquant.extremes(values.view(np.uint32)) for _, values in float32_runs(src)]
        if not found:
            return 0.0, 0.0
        keys = np.array([min(f[0] for f in found), max(f[1] for f in found)], np.int32)
        if keys[1] >= _INFINITE or keys[0] <= ~_INFINITE:
            self._refuse_not_finite()
        values = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(np.float32)
        return float(values[0]), float(values[1])

    def _level(self, norm: float, source_bits: int) -> int:
        wanted = math.ceil(max(1, math.sqrt(norm * source_bits * math.log(4) / _WEIGHT)))
        bits = max(1, math.ceil(math.log2(wanted)))
        if bits > 16 or bits >= source_bits:
            raise UnrepresentableError(f"{self.name} would take {bits} bits per value for a range of {norm:g}")
        return int(2**bits) - 1

    def _decode(self, parts: Parts, out: Array) -> None:
        from nvflare_rdma.codecs.kernels import adaquant

        offset, norm, level = parts["header"].tolist()
        for start, values in output_runs(out):
            if norm == 0:
                values.fill(-offset)
            else:
                adaquant.decode(parts["codes"][start : start + values.size], offset, norm, level, values)
