"""4-bit NormalFloat in short blocks, whose scales are 8-bit floating-point numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import MOST_AT_ONCE, Array, Bytes, FixedSizeCodec, Float32, Layout, Parts
from nvflare_rdma.codecs.blockwise import EPS, TINY
from nvflare_rdma.codecs.fourbit import NormalFloat4
from nvflare_rdma.codecs.runs import float32_runs
from nvflare_rdma.codecs.tables import WEAK, float8_e4m3, largest_scale

_TOP = 448  # the largest number of float8 e4m3


class NormalFloat4E4M3(FixedSizeCodec):
    """4-bit NormalFloat with a float8 e4m3 scale per 32 values, under one float32 scale.

    The values are those of `NormalFloat4`, and two levels of scales are as in NVIDIA's NVFP4 ("Pretraining Large
    Language Models with NVFP4", 2025): the float32 scale is `absmax / 448` of all values, and that of a block the
    e4m3 number nearest to the block's absmax over it. Half as long a block makes up for more than the scales' three
    bits of mantissa lose: normally distributed values have 9 % less squared error than with `normfloat4`, and those
    of heavy tails 24 %, in 4.25 bits a value where that takes 4.5.

    Parts: `scale`, float32, one per encoded piece, so pieces of a tensor have other scales than the whole; `scales`,
    uint8; `codes`, two a byte, the first value in the high nibble; an odd length ends with the code of 0.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most `0.162 * absmax` of the block plus
    2.2e-6 of the largest magnitude of all, below which a block becomes zeros; if that largest is below 2**-100, all
    do. A value is never off by more than itself, but for rounding.
    """

    name = "normfloat4_e4m3"
    bits = 4
    block_size = 32
    splits = False
    longest_sum = MOST_AT_ONCE

    def __init__(self) -> None:
        inner = NormalFloat4()
        self.middles, self.pairs, self._half_gap = inner.middles, inner.pairs, inner.half_gap
        # No encoder makes the sign, nor the type's NaN: damaged ones become zeros.
        self.table: Float32 = float8_e4m3()
        self.table[127:] = 0
        self._largest_scale = largest_scale(_TOP)

    def layout(self, n: int) -> Layout:
        """Return the shared scale, one scale per block, and the codes."""
        return ("scale", np.float32, 1), ("scales", np.uint8, -(-n // self.block_size)), ("codes", np.uint8, -(-n // 2))

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return half of the largest gap between levels or what is beyond the outermost one, plus rounding."""
        parts = self.parts(encoded, values.size)
        top = np.repeat(self.table[parts["scales"]] * parts["scale"], self.block_size)[: values.size]
        magnitude = np.abs(values)
        off: Float32 = np.maximum(top * self._half_gap, magnitude - top)
        off += np.maximum(magnitude, top) * EPS + TINY
        return off

    def shared_scale(self, absmax: np.float32) -> np.float32:
        """Return the float32 scale of values whose largest magnitude is `absmax`.

        Raises:
            UnrepresentableError: it is NaN or infinite.
        """
        if not np.isfinite(absmax):
            self._refuse_not_finite()
        return np.float32(0) if absmax < WEAK else min(absmax / np.float32(_TOP), self._largest_scale)

    def _encode(self, src: Array, out: Bytes) -> int:
        from nvflare_rdma.codecs.kernels import fourbit

        top = 0
        for _, values in float32_runs(src):  # twice over the values: the shared scale comes first
            top = max(top, fourbit.largest_bits(values.view(np.uint32)))
        self.parts(out, src.size)["scale"][:] = self.shared_scale(np.uint32(top).view(np.float32))
        return super()._encode(src, out)

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        scale = parts["scale"][0]
        fourbit.encode_short(values, self.middles, self.table, scale, parts["scales"], parts["codes"])

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        fourbit.decode_short(parts["codes"], parts["scales"], self.table, parts["scale"][0], self.pairs, out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import fourbit

        scale = parts["scale"][0]
        fourbit.add_short(parts["codes"], parts["scales"], self.table, scale, self.pairs, weight, out)

    def _slice(self, parts: Parts, start: int, stop: int) -> dict[str, Array]:
        return super()._slice(parts, start, stop) | {"scale": parts["scale"]}
