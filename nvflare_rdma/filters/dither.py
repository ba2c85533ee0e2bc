"""Stochastic rounding for `int8`: noise of one step before rounding to nearest makes the mean error zero.

With `s` a block's step, `round(x / s + u)` for u uniform in [-1/2, 1/2) has the mean `x / s` (non-subtractive
dither; Gupta et al., "Deep Learning with Limited Numerical Precision", 2015). The block's largest magnitude gets no
noise and nothing may exceed it, so that the step stays what it was: that value is a level, and those within a step of
it are rounded as without the limit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xxhash

from nvflare_rdma.codecs import Codec, Float32

DITHERED = ("int8",)  # codecs whose levels are evenly spaced between the block's largest magnitudes
_LEVELS = np.float32(127)

Dither = Callable[[Float32], Float32]


def dither_of(codec: Codec, seed: str) -> Dither:
    """Return a function that takes the block-aligned pieces of one tensor in turn and returns them with noise on them.

    Pieces are flat float32 values. The same `seed` gives the same noise.
    """
    random = np.random.default_rng(xxhash.xxh3_64_intdigest(seed.encode()))

    def dither(values: Float32) -> Float32:
        starts = np.arange(0, values.size, codec.block_size)
        magnitude = np.abs(values)
        absmax = np.repeat(np.maximum.reduceat(magnitude, starts), codec.block_size)[: values.size]
        noise = random.random(values.size, np.float32) - np.float32(0.5)
        with np.errstate(invalid="ignore"):  # what isn't finite is the codec's to refuse
            noise *= absmax / _LEVELS
            noise[magnitude == absmax] = 0
            noise += values
            return np.clip(noise, -absmax, absmax, out=noise)

    return dither
