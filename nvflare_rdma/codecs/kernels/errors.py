"""How far values are from what they were: sums of squares in float64, in which no float32 overflows or vanishes."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.kernels.jit import float32, float64_out, kernel, nothing

_COLUMNS = 512


@kernel(nothing(float32, float32, float64_out))
def add_squares(values: Any, arrived: Any, sums: Any) -> None:
    """Add the squares of `values - arrived` to `sums[0]`, and those of `values` to `sums[1]`."""
    # A sum for each column of rows of values: a loop of vectors, and the same order on every processor.
    lost, total = np.zeros(_COLUMNS, np.float64), np.zeros(_COLUMNS, np.float64)
    for start in range(0, values.size, _COLUMNS):
        row, came = values[start : start + _COLUMNS], arrived[start : start + _COLUMNS]
        for i in range(row.size):
            value = np.float64(row[i])
            off = value - np.float64(came[i])
            lost[i] += off * off
            total[i] += value * value
    for i in range(_COLUMNS):
        sums[0] += lost[i]
        sums[1] += total[i]
