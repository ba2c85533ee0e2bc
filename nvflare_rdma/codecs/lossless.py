"""Exact, but smaller where the values allow it: planes of bytes, each compressed with zstd."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes, Parts
from nvflare_rdma.codecs.every_bit import EveryBitCodec
from nvflare_rdma.codecs.runs import TILE, own_output_runs, own_runs
from nvflare_rdma.codecs.zstd_planes import LENGTH, LENGTH_NBYTES, PlaneCoder, plane_memory
from nvflare_rdma.errors import CodecError

_LEVEL = 1  # higher levels search for repetitions, which weights don't have


class Lossless(EveryBitCodec):
    """Carries every bit of the values, NaN's too, in fewer bytes where they have a pattern.

    Numbers are split into planes (all their first bytes, all their second bytes, ...) after a rotation that makes
    the exponent the first byte, as in Hershcovitch et al., "ZipNN" (2024). Each plane of each 65536 values is
    compressed with zstd on its own, or stored as it is if that doesn't make it smaller. Trained weights take about
    two thirds of their size in bfloat16 and five sixths in float32; those that were rounded to a smaller type before,
    or hold many zeros, take less.

    Parts: `header`, uint32: which type the values have; `planes`, bytes: for each 65536 values and each plane its
    length (uint32) and contents. The size is known only after encoding and at most 4 bytes per value, plus 4 and
    16 for each 65536 values. Values decode to their own type only. NaN and Inf are carried as they are.
    """

    name = "lossless"

    def __init__(self) -> None:
        self._planes: PlaneCoder | None = None

    def encoded_nbytes(self, n: int) -> int:
        """Return the most that `n` values can take: all planes stored as they are, with their lengths."""
        return LENGTH_NBYTES + 4 * n + 4 * LENGTH_NBYTES * -(-n // TILE)

    def parts(self, encoded: Any, n: int) -> dict[str, Array]:
        """Return the header and the planes as views of `encoded`; see `Codec.parts`."""
        flat = self._bytes(encoded)
        if not LENGTH_NBYTES <= flat.size <= self.encoded_nbytes(n):
            raise CodecError(f"{self.name}: {flat.size} encoded bytes can't be {n} values")
        return {"header": flat[:LENGTH_NBYTES].view(LENGTH), "planes": flat[LENGTH_NBYTES:]}

    def _encode(self, src: Array, out: Bytes) -> int:
        from nvflare_rdma.codecs.kernels import planes as kernels

        coder = self._coder()
        out[:LENGTH_NBYTES].view(LENGTH)[0] = self._kind(src)
        used = LENGTH_NBYTES
        for _, run in own_runs(src, TILE):
            planes = plane_memory(run)
            if src.itemsize == 4:
                kernels.split32(run.view(np.uint32), planes.reshape(-1))
            else:
                kernels.split16(run.view(np.uint16), planes.reshape(-1))
            for plane in planes:
                used = coder.write(plane, out, used)
        return used

    def _decode(self, parts: Parts, out: Array) -> None:
        from nvflare_rdma.codecs.kernels import planes as kernels

        self._check_kind(int(parts["header"][0]), out)
        coder, encoded, used = self._coder(), parts["planes"], 0
        for _, run in own_output_runs(out, TILE):
            planes = plane_memory(run)
            for plane in planes:
                used = coder.read(encoded, used, plane)
            if out.itemsize == 4:
                kernels.merge32(planes.reshape(-1), run.view(np.uint32))
            else:
                kernels.merge16(planes.reshape(-1), run.view(np.uint16))
        self._check_end(encoded, used)

    def _coder(self) -> PlaneCoder:
        # Made here and not with the codec, so that zstandard is imported only when it is used.
        if self._planes is None:
            self._planes = PlaneCoder(self.name, level=_LEVEL)
        return self._planes
