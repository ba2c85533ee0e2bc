"""The 4-bit codecs that bitsandbytes also has, with float32 scales and with scales that are quantized themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvflare_rdma.codecs.base import MOST_AT_ONCE, Array, Bytes, FixedSizeCodec, Float32, Layout, Parts
from nvflare_rdma.codecs.blockwise import EPS, AbsmaxCodec, Blockwise8
from nvflare_rdma.codecs.runs import TILE, float32_runs, scratch
from nvflare_rdma.codecs.tables import INFINITE_FROM, float4, normal_float4
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES
from nvflare_rdma.errors import UnrepresentableError

_NESTED_BLOCK = 256  # scales that share a scale
_INFINITE_FROM = {NUMPY_DTYPES[name]: limit for name, limit in INFINITE_FROM.items()}


class _FourBit(AbsmaxCodec):
    bits = 4
    block_size = 64
    weak_below = np.float32(1e-38)
    longest_sum = MOST_AT_ONCE

    def __init__(self, table: Float32) -> None:
        self.table: Float32 = table
        ascending = np.argsort(table, kind="stable")
        self.order: NDArray[np.uint8] = ascending.astype(np.uint8)
        byte = np.arange(256)
        #: The two codes for each byte of two ranks; empty where ranks are codes.
        self.orders: NDArray[np.uint8] = self.order[byte >> 4] << 4 | self.order[byte & 15]
        if (self.orders == byte).all():
            self.orders = self.orders[:0]
        entries = table[ascending]
        self.half_gap = np.float32(np.diff(entries).max() / 2)
        self.middles: Float32 = (entries[:-1] + entries[1:]) / np.float32(2)
        self.pairs: Float32 = np.stack([table[byte >> 4], table[byte & 15]], axis=1).reshape(512)

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        if not fourbit.encode(values, self.middles, self.orders, parts["scales"], parts["codes"]):
            self._refuse_not_finite()

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        fourbit.decode(parts["codes"], parts["scales"], self.pairs, out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        fourbit.add(parts["codes"], parts["scales"], self.pairs, weight, out)


class NormalFloat4(_FourBit):
    """4-bit NormalFloat with one absmax per 64 values (Dettmers et al., "QLoRA", 2023).

    Two codes a byte, the first value in the high nibble; an odd length ends with the code of 0 in the low nibble.
    Codes and scales equal those of bitsandbytes 0.50 on a CPU, bit for bit, for every finite input. That includes
    two habits of its encoder: an incomplete last block is divided by its absmax where full blocks are multiplied
    by its reciprocal, and the absmax of an incomplete block is raised to at least 1e-38.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most `0.152 * absmax` of the block; if
    absmax is below 1e-38, at most `absmax`.
    """

    name = "normfloat4"

    def __init__(self) -> None:
        super().__init__(normal_float4())


class Float4(_FourBit):
    """4-bit floating point (sign, two bits of exponent, one of mantissa) with one absmax per 64 values.

    bitsandbytes' `fp4`, and equal to it in the same way as `NormalFloat4`, for every finite input. Its codes are
    bit patterns, not ranks; the pattern 8 stands for zero as well, and small positive values get it.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most `0.167 * absmax` of the block; if
    absmax is below 1e-38, at most `absmax`.
    """

    name = "float4"

    def __init__(self) -> None:
        super().__init__(float4())


class DoubleQuantized(FixedSizeCodec):
    """A 4-bit codec whose scales are quantized to 8 bits in blocks of 256 (Dettmers et al., "QLoRA", 2023).

    From the absmax of each block the mean of them all is taken away; the rest is encoded as `Blockwise8` does, with
    one scale per 256 blocks. Parts: `nested_scales` and `offset` (the mean), float32; `scales`, uint8;
    `codes`, as without double quantization. The offset is one per encoded piece, so pieces of a tensor have other
    scales than the whole, though the same codes. For a whole tensor the parts equal those of bitsandbytes'
    `compress_statistics` on a CPU bit for bit, given the same mean: here it is a float64 sum rounded once, and
    torch's float32 sum may differ from that in its last bits (and from itself with another number of threads), or
    overflow.

    NaN and Inf are not representable, nor are values within a hundredth of the largest of their type if their scale
    would be rounded up to infinity (`UnrepresentableError`). Error: that of the 4-bit codec, plus `0.00705` of
    the largest difference from the mean among the 256 scales.
    """

    block_size = 64
    bits = 4
    splits = False
    longest_run = TILE * block_size  # the scales of a run have to fit into scratch memory
    longest_sum = MOST_AT_ONCE

    def __init__(self, inner: _FourBit) -> None:
        self.name = f"{inner.name}_dq"
        self.inner = inner
        self.nested = Blockwise8()

    def layout(self, n: int) -> Layout:
        """Return the scales of the scales, their offset, the scales, and the codes."""
        blocks = -(-n // self.block_size)
        return (
            ("nested_scales", np.float32, -(-blocks // _NESTED_BLOCK)),
            ("offset", np.float32, 1),
            ("scales", np.uint8, blocks),
            ("codes", np.uint8, -(-n // 2)),
        )

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return the 4-bit codec's bound, plus what the scales may be off by."""
        parts = self.parts(encoded, values.size)
        decoded = np.empty(parts["scales"].size, np.float32)
        self._decode_scales(parts, decoded)
        of_scales = self.nested.bound(parts["nested_scales"], _NESTED_BLOCK, decoded.size)
        of_scales += (np.abs(decoded) + np.abs(parts["offset"])) * EPS
        scales = np.abs(decoded) + of_scales  # at least the absmax
        return (
            self.inner.bound(scales, self.block_size, values.size)
            + np.repeat(of_scales, self.block_size)[: values.size]
        )

    def _encode(self, src: Array, out: Bytes) -> int:
        from nvflare_rdma.codecs.kernels import fourbit

        parts = self.parts(out, src.size)
        if parts["scales"].size <= TILE:
            absmax = scratch("scales", np.float32, parts["scales"].size)
            for start, values in float32_runs(src):
                stop = start + values.size
                self._encode_codes(
                    values,
                    absmax[start // self.block_size :][: -(-values.size // self.block_size)],
                    parts["codes"][start // 2 : -(-stop // 2)],
                )
            self.encode_scales(absmax, parts, src.dtype)
            return out.size
        # Twice over the values, because memory for all scales would grow with the tensor.
        total = 0.0
        for _, values in float32_runs(src, TILE):
            absmax = scratch("scales", np.float32, -(-values.size // self.block_size))
            fourbit.absmax(values, absmax)
            total += float(absmax.sum(dtype=np.float64))
        self._encode_with(src, parts, np.float32(total / max(parts["scales"].size, 1)))
        self._refuse_overflow(parts, src.dtype)
        return out.size

    def encode_scales(self, absmax: Float32, parts: Parts, dtype: Any) -> None:
        """Fill in all `parts` but the codes with what `encode_into` would write there.

        Args:
            absmax: the inner codec's scales of all blocks, finite. Used up.
            parts: of the whole, see `parts`.
            dtype: numpy's of the values: float32, float16, or uint16 for bfloat16.

        Raises:
            UnrepresentableError: values so large that a scale could be rounded up to infinity.
        """
        total, step = 0.0, TILE // self.block_size
        for start in range(0, absmax.size, step):  # sums of the same runs as above, so that the bits are the same
            total += float(absmax[start : start + step].sum(dtype=np.float64))
        parts["offset"][:] = np.float32(total / max(absmax.size, 1))
        self._nest(absmax, parts)
        self._refuse_overflow(parts, dtype)

    def _refuse_overflow(self, parts: Parts, dtype: Any) -> None:
        """Refuse scales that, rounded up, would make a value of a 16-bit type infinite."""
        largest = _INFINITE_FROM.get(dtype)
        if largest is None:
            return
        step = TILE - TILE % _NESTED_BLOCK
        for start in range(0, parts["scales"].size, step):
            blocks = min(step, parts["scales"].size - start)
            nested = parts["nested_scales"][start // _NESTED_BLOCK :][: -(-blocks // _NESTED_BLOCK)]
            scales = scratch("scales", np.float32, blocks)
            run = {
                "scales": parts["scales"][start : start + blocks],
                "nested_scales": nested,
                "offset": parts["offset"],
            }
            self._decode_scales(run, scales)
            if scales.max() >= largest:
                raise UnrepresentableError(f"{self.name} can't carry values so near to the largest of 16 bits")

    def _encode_with(self, src: Array, parts: Parts, offset: np.float32) -> None:
        """Encode with this mean of the scales."""
        if not np.isfinite(offset):  # the sum of float32 can't overflow float64, so a value is NaN or Inf
            self._refuse_not_finite()
        parts["offset"][:] = offset
        for start, values in float32_runs(src, self.longest_run):
            self._encode_run(values, self._slice(parts, start, start + values.size))

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        absmax = scratch("scales", np.float32, parts["scales"].size)
        self._encode_codes(values, absmax, parts["codes"])
        self._nest(absmax, parts)

    def _encode_codes(self, values: Float32, absmax: Float32, codes: Bytes) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        if not fourbit.encode(values, self.inner.middles, self.inner.orders, absmax, codes):
            self._refuse_not_finite()

    def _nest(self, absmax: Float32, parts: Parts) -> None:
        """Encode scales less the offset, which is in `parts` already. `absmax` is used up."""
        from nvflare_rdma.codecs.kernels import blockwise

        absmax -= parts["offset"]
        blockwise.encode(absmax, _NESTED_BLOCK, self.nested.nearest, parts["nested_scales"], parts["scales"])
        self._decode_scales(parts, absmax)
        if not np.isfinite(absmax).all():
            raise UnrepresentableError(f"{self.name} can't carry values so near to the largest float32")

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        absmax = scratch("scales", np.float32, parts["scales"].size)
        self._decode_scales(parts, absmax)
        fourbit.decode(parts["codes"], absmax, self.inner.pairs, out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        absmax = scratch("scales", np.float32, parts["scales"].size)
        self._decode_scales(parts, absmax)
        fourbit.add(parts["codes"], absmax, self.inner.pairs, weight, out)

    def _decode_scales(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.decode(parts["scales"], parts["nested_scales"], _NESTED_BLOCK, self.nested.table, out)
        with np.errstate(all="ignore"):  # damaged bytes may be anything
            out += parts["offset"]

    def _slice(self, parts: Parts, start: int, stop: int) -> dict[str, Array]:
        return super()._slice(parts, start, stop) | {"offset": parts["offset"]}
