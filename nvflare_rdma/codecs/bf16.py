"""bfloat16 in numpy: bit patterns in uint16 arrays, since numpy has no such type."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def float32_to_bf16(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round `values` to the nearest bfloat16 (ties to even) and write the bit patterns to `out`.

    NaN stays NaN (made quiet, sign and upper payload kept) and Inf stays Inf. A finite value of magnitude
    3.396e38 or more rounds to Inf, as IEEE rounding has it. Allocates temporaries of the size of `values`:
    callers pass a tile.
    """
    bits = values.view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = upper & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits  # wraps only for NaN patterns, which are replaced below
    rounded >>= np.uint32(16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = upper[nan] | np.uint32(0x40)
    np.copyto(out, rounded, casting="unsafe")


def bf16_to_float32(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Widen bfloat16 bit patterns to float32. Exact."""
    wide: NDArray[Any] = out.view(np.uint32)
    np.copyto(wide, bits)
    wide <<= np.uint32(16)
