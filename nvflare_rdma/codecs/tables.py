"""The code tables, computed from their published definitions, and the largest scales that go with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: From this magnitude on, a float32 becomes infinite when it is rounded to the dtype.
INFINITE_FROM = {"float16": 65520.0, "bfloat16": (2 - 2.0**-8) * 2.0**127}

#: Blocks whose largest magnitude is below this become zeros with the codecs of `nvflare_rdma.codecs.linear`.
WEAK = np.float32(2.0**-100)

# The sixteen values of Appendix E of "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al., 2023).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def normal_float4() -> NDArray[np.float32]:
    """Return the 16 values of the 4-bit NormalFloat type, ascending, float32."""
    return np.array(_NF4, dtype=np.float32)


def dynamic_map() -> NDArray[np.float32]:
    """Return the 256 values of the signed 8-bit dynamic type, ascending, float32.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (2015) and "8-bit Optimizers via Block-wise
    Quantization" (2021): for each power of ten from 1e-6 to 1e0 the interval [0.1, 1] is cut into 1, 2, 4, ... 64
    equal parts, whose middles, times that power and with both signs, are in the table together with 0 and 1.
    Edges and middles are rounded to float32 in this order because bitsandbytes has it so; its edges come from
    `torch.linspace`, whose last bit depends on the processor (fused multiply-add, as on any recent one, is what is
    computed here).
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(1 << exponent)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = middles * np.float32(10.0 ** (exponent - 6))
        values += scaled.tolist()
        values += (-scaled).tolist()
    return np.array(sorted(values), dtype=np.float32)


def _linspace(parts: int) -> NDArray[np.float32]:
    """`parts` + 1 float32 points from 0.1 to 1, the upper half counted down from 1, each rounded once."""
    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(parts))
    i = np.arange(parts + 1)
    half = (parts + 1) // 2
    return np.where(i < half, start + step * i, end - step * (parts - i)).astype(np.float32)


def float4() -> NDArray[np.float32]:
    """Return the 16 values of bitsandbytes' 4-bit floating point type by bit pattern, divided by the largest, float32.

    A pattern is a sign, two bits of exponent and one of mantissa. The type has no value between a twelfth and two
    twelfths but one at 1/192.
    """
    magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
    return np.concatenate([magnitudes, np.float32(0) - magnitudes])


def float8_e4m3() -> NDArray[np.float32]:
    """Return what the 256 bytes stand for as float8 e4m3 (bias 7, no infinities, NaN at 0x7F and 0xFF), float32."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(byte & 0x7F) == 0x7F] = np.nan
    values: NDArray[np.float32] = np.where(byte < 128, magnitude, -magnitude).astype(np.float32)
    return values


def int2_by_byte() -> NDArray[np.float32]:
    """Return the four levels -3, -1, 1, 3 of each byte, lowest bits first, shape (1024,)."""
    codes = (np.arange(256)[:, np.newaxis] >> np.array([0, 2, 4, 6])) & 3
    levels: NDArray[np.float32] = (2 * codes - 3).astype(np.float32)
    return levels.reshape(-1)


def ternary_by_byte() -> NDArray[np.float32]:
    """Return the five values -1, 0, 1 of each byte's digits to base 3, lowest first, shape (1280,).

    Bytes from 243 on, that no encoder makes, repeat the first ones.
    """
    digits = np.arange(256)[:, np.newaxis] // 3 ** np.arange(5) % 3
    values: NDArray[np.float32] = (digits - 1).astype(np.float32)
    return values.reshape(-1)


def largest_scale(level: int) -> np.float32:
    """Return the largest float32 whose product with `level` is finite: a scale rounded up could give an infinity."""
    with np.errstate(over="ignore"):
        scale = np.float32(np.finfo(np.float32).max / level)
        while np.isinf(np.multiply(scale, np.float32(level))):
            scale = np.nextafter(scale, np.float32(0))
    return scale
