"""The codecs' inner loops, compiled by numba for the processor at hand when a codec is first used.

Nothing here is imported with the package: numba takes half a second to import, and the first use of a module
compiles it (0.1 to 1 s per kernel). numba keeps the machine code in `__pycache__`, or in the user's cache
directory where that is read-only, so that later processes load it. Where nothing is writable, every process
compiles anew.

All kernels run without the GIL, allocate some tens of KiB at most, and are exact about rounding: no fast-math, so
that results are the same on every processor.

Only `nvflare_rdma.codecs` imports from here: a codec imports the module of its kernels when it is first used.
"""

from __future__ import annotations

__all__ = [
    "adaquant",
    "blockwise",
    "difference_groups",
    "difference_runs",
    "differences",
    "errors",
    "fourbit",
    "halves",
    "huffman",
    "linear",
    "planes",
    "sums",
    "topk",
]
