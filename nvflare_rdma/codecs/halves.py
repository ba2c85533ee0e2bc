"""The 16-bit codecs: IEEE half precision and bfloat16. No blocks, no scales."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import MOST_AT_ONCE, FixedSizeCodec, Float32, Layout, Parts
from nvflare_rdma.codecs.tables import INFINITE_FROM
from nvflare_rdma.errors import UnrepresentableError


class _Half(FixedSizeCodec):
    bits = 16
    block_size = 1
    longest_sum = MOST_AT_ONCE
    largest: float  # finite magnitudes from here on would round to infinity

    def _refuse_overflow(self, values: Float32) -> None:
        for start in range(0, values.size, 1 << 16):  # by and by, for a bounded amount of memory
            magnitude = np.abs(values[start : start + (1 << 16)])
            lost = magnitude[np.isfinite(magnitude) & (magnitude >= self.largest)]
            if lost.size:
                raise UnrepresentableError(
                    f"{self.name} can't carry the finite value {lost.max():g}: it would become infinite"
                )


class Float16(_Half):
    """IEEE 754 half precision, rounded to nearest even.

    NaN and Inf are carried natively. Error: at most `2**-11 * abs(x)` in the normal range and `2**-25`
    below it, so float32 magnitudes under 2**-25 become 0: that is within the bound and not reported. A finite
    magnitude that would round to Inf (65520 and more) is not representable (`UnrepresentableError`); FLARE's own
    filter clips it to 65504 instead.
    """

    name = "float16"
    largest = INFINITE_FROM[name]

    def layout(self, n: int) -> Layout:
        """Return the codes alone, one for each value."""
        return (("codes", np.float16, n),)

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return half of the distance to the next representable value, or of the smallest denormal."""
        return np.abs(values) * np.float32(2.0**-11) + np.float32(2.0**-25)

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels.halves import to_half

        if to_half(values, parts["codes"].view(np.uint16)):
            self._refuse_overflow(values)

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels.halves import from_half

        from_half(parts["codes"].view(np.uint16), out)

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels.sums import add_half

        add_half(parts["codes"].view(np.uint16), weight, out)


class BFloat16(_Half):
    """bfloat16 (the upper half of a float32), rounded to nearest even; codes are bit patterns in uint16.

    NaN and Inf are carried natively. Error: at most `2**-8 * abs(x)`, and `2**-134` among denormals. A finite
    magnitude that would round to Inf (3.396e38 and more) is not representable (`UnrepresentableError`).
    """

    name = "bfloat16"
    largest = INFINITE_FROM[name]

    def layout(self, n: int) -> Layout:
        """Return the codes alone, one for each value."""
        return (("codes", np.uint16, n),)

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return half of the distance to the next representable value, or of the smallest denormal."""
        return np.abs(values) * np.float32(2.0**-8) + np.float32(2.0**-134)

    def _encode_run(self, values: Float32, parts: Parts) -> None:
        from nvflare_rdma.codecs.kernels.halves import to_bfloat16

        if to_bfloat16(values.view(np.uint32), parts["codes"]):
            self._refuse_overflow(values)

    def _decode_run(self, parts: Parts, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels.halves import from_bfloat16

        from_bfloat16(parts["codes"], out.view(np.uint32))

    def _add_run(self, parts: Parts, weight: np.float32, out: Float32) -> None:
        from nvflare_rdma.codecs.kernels.sums import add_bfloat16

        add_bfloat16(parts["codes"], weight, out)
