"""The 16-bit codecs: IEEE half precision and bfloat16. No blocks, no scales."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvflare_rdma.codecs.base import Codec, Float32, Layout, Parts
from nvflare_rdma.codecs.bf16 import bf16_to_float32, float32_to_bf16
from nvflare_rdma.errors import UnrepresentableError


def _refuse_overflow(codec: str, infinite: NDArray[np.bool_], values: Float32) -> None:
    """Raise if a code is infinite where the value was not."""
    if infinite.any():
        lost = infinite & np.isfinite(values)
        if lost.any():
            worst = float(np.abs(values[lost]).max())
            raise UnrepresentableError(f"{codec} can't carry the finite value {worst:g}: it would become infinite")


class Float16(Codec):
    """IEEE 754 half precision, rounded to nearest even.

    NaN and Inf are carried natively. Error: at most ``2**-11 * abs(x)`` in the normal range and ``2**-25``
    below it, so float32 magnitudes under 2**-25 become 0: that is within the bound and not reported. A finite
    magnitude that would round to Inf (65520 and more) is not representable (`UnrepresentableError`); FLARE's own
    filter clips it to 65504 instead.
    """

    name = "float16"
    bits = 16
    block_size = 1

    def layout(self, n: int) -> Layout:
        return (("codes", np.float16, n),)

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        return np.abs(values) * np.float32(2.0**-11) + np.float32(2.0**-25)

    def _encode_tile(self, values: Float32, parts: Parts) -> None:
        codes = parts["codes"]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            np.copyto(codes, values, casting="unsafe")
        magnitude = codes.view(np.uint16) & np.uint16(0x7FFF)
        _refuse_overflow(self.name, magnitude == 0x7C00, values)

    def _decode_tile(self, parts: Parts, out: Float32) -> None:
        with np.errstate(invalid="ignore"):
            np.copyto(out, parts["codes"])


class BFloat16(Codec):
    """bfloat16 (the upper half of a float32), rounded to nearest even; codes are bit patterns in uint16.

    NaN and Inf are carried natively. Error: at most ``2**-8 * abs(x)``, and ``2**-134`` among denormals. A finite
    magnitude that would round to Inf (3.396e38 and more) is not representable (`UnrepresentableError`).
    """

    name = "bfloat16"
    bits = 16
    block_size = 1

    def layout(self, n: int) -> Layout:
        return (("codes", np.uint16, n),)

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        return np.abs(values) * np.float32(2.0**-8) + np.float32(2.0**-134)

    def _encode_tile(self, values: Float32, parts: Parts) -> None:
        codes = parts["codes"]
        float32_to_bf16(values, codes)
        _refuse_overflow(self.name, (codes & np.uint16(0x7FFF)) == 0x7F80, values)

    def _decode_tile(self, parts: Parts, out: Float32) -> None:
        bf16_to_float32(parts["codes"], out)
