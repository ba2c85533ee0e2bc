"""Only the largest values, in two bits and their places: what training changed most, for use with error feedback."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import FixedSizeCodec, Float32, Layout, Parts
from nvflare_rdma.codecs.blockwise import EPS


class TopK2(FixedSizeCodec):
    """The largest magnitudes of each 4096 values: 12 bits for the place of each, a sign, and a bit that says which of
    two levels it has. All other values become zeros.

    As in Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo" (2025), which sends 64 of 4096 in
    two bits each, with error feedback. The levels are the means of the magnitudes above and below their common mean,
    those of least squared error. So what is lost of a chunk always has a smaller sum of squares than the chunk, which
    is what error feedback needs.

    Parts: `high`, float32, the larger level of each chunk; `low`, uint16, the smaller one in steps of its 65535th part;
    `places`, two in three bytes, the first in the lower bits; `signs`, four a byte, the first in the lowest bits, which
    say whether a value is large (1) and negative (2). Of an incomplete last chunk it is the same share of the values.
    Zeros are not chosen: where there are no others left, the last place comes again.

    NaN and Inf are not representable (`UnrepresentableError`). Error: at most the larger of `abs(x)` and the chunk's
    larger level.
    """

    block_size = 4096
    needs_feedback = True

    def __init__(self, name: str, most: int) -> None:
        """Keep `most` values of a chunk, a multiple of 4."""
        self.name = name
        self.most = most
        self.bits = 14 * most / self.block_size

    def layout(self, n: int) -> Layout:
        """Return the two levels of each chunk, the places, and what is there."""
        chunks = -(-n // self.block_size)
        whole, rest = divmod(n, self.block_size)
        left = -(-rest * self.most // self.block_size)
        places = whole * (self.most * 3 // 2) + -(-left * 3 // 2)
        signs = whole * (self.most // 4) + -(-left // 4)
        return (
            ("high", np.float32, chunks),
            ("low", np.uint16, chunks),
            ("places", np.uint8, places),
            ("signs", np.uint8, signs),
        )

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return the larger of the value itself and the larger level of its chunk."""
        # Signs are kept, so a value is off by no more than the larger of itself and what it decodes to.
        high = np.repeat(self.parts(encoded, values.size)["high"], self.block_size)[: values.size]
        bound: Float32 = np.maximum(np.abs(values), high * np.float32(1 + EPS))
        return bound

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels import topk

        if not topk.encode(values, self.most, parts["high"], parts["low"], parts["places"], parts["signs"]):
            self._refuse_not_finite()

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels import topk

        topk.decode(parts["high"], parts["low"], parts["places"], parts["signs"], self.most, out)
