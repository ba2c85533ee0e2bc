"""8-bit dynamic quantization, and what all codecs with a scale per block share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvflare_rdma.codecs.base import MOST_AT_ONCE, FixedSizeCodec, Float32, Layout, Parts
from nvflare_rdma.codecs.tables import dynamic_map

EPS = np.float32(2.0**-21)  # four roundings to float32, relative to a block's scale
TINY = np.float32(2.0**-149)  # the smallest denormal: what a product may lose below the normal range


class BlockScaledCodec(FixedSizeCodec):
    """A codec whose codes stand for `x / scale`, with one float32 scale per block.

    NaN and Inf are not representable: a block with one would have no scale, and all its values would be lost.
    """

    def layout(self, n: int) -> Layout:
        """Return one scale per block, and the codes."""
        codes = -(-n * int(self.bits) // 8)
        return ("scales", np.float32, -(-n // self.block_size)), ("codes", np.uint8, codes)


class AbsmaxCodec(BlockScaledCodec):
    """A codec whose scale is the largest magnitude of the block.

    Attributes:
        half_gap: the largest distance from x / absmax to what it decodes to, before rounding errors.
        weak_below: blocks whose absmax is below this keep less than that, but at most `absmax` is lost.
    """

    half_gap: np.float32
    weak_below: np.float32

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return half of the largest gap between table entries, times the block's absmax, plus rounding."""
        return self.bound(self.parts(encoded, values.size)["scales"], self.block_size, values.size)

    def bound(self, absmax: Float32, block_size: int, n: int) -> Float32:
        """Return what `n` values may be off by when each `block_size` of them have one of these `absmax`."""
        bound = absmax * (self.half_gap + EPS) + TINY
        bound = np.where(absmax < self.weak_below, absmax + TINY, bound).astype(np.float32)
        return np.repeat(bound, block_size)[:n]


class Blockwise8(AbsmaxCodec):
    """8-bit dynamic quantization with one absmax per 4096 values (Dettmers et al., "8-bit Optimizers via
    Block-wise Quantization", 2021).

    Codes and scales equal those of bitsandbytes 0.50 on a CPU, bit for bit, for every finite input. That encoder
    doesn't search the table for the nearest entry: it first rounds `x / absmax` to one of 65536 evenly spaced
    points in [-1, 1] and takes the entry nearest to that point, which costs at most 1/65535 of the absmax. Two
    consequences are kept because they are part of the equality: a zero in a block that isn't all zeros decodes to
    about 1.2e-5 of the block's absmax, and an all-zero block has code 0 and decodes to -0.0. Older bitsandbytes
    and its GPU kernels search for the nearest entry, so their codes may differ by one or, near zero, by a few;
    either side decodes both, since the table travels with the message.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most `0.00705 * absmax` of the block;
    if absmax is below 2**-127, whose reciprocal overflows, at most `absmax`.
    """

    name = "blockwise8"
    bits = 8
    block_size = 4096
    half_gap = np.float32(0.00703125 + 1.0 / 65535)
    weak_below = np.float32(2.0**-127)
    longest_sum = MOST_AT_ONCE

    def __init__(self, table: Float32 | None = None) -> None:
        """Use `table`, 256 ascending float32 values in [-1, 1], in place of the dynamic map if it is given.

        Codes that came with a table of their own are decoded with it.
        """
        self.table: Float32 = dynamic_map() if table is None else table
        self.nearest = nearest_entries(self.table)

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        if not blockwise.encode(values, self.block_size, self.nearest, parts["scales"], parts["codes"]):
            self._refuse_not_finite()

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.decode(parts["codes"], parts["scales"], self.block_size, self.table, out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import blockwise

        blockwise.add(parts["codes"], parts["scales"], self.block_size, self.table, weight, out)


def nearest_entries(table: Float32) -> NDArray[np.uint8]:
    """Return, for each of 65536 even steps from -1 to 1, the index of the nearest entry of the ascending `table`.

    Of two entries that are as near it is the lower one.
    """
    points = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    middles = np.float32(0.5) * (table[:-1] + table[1:])
    return np.searchsorted(middles, points, side="left").astype(np.uint8)
