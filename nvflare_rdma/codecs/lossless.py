"""Exact, but smaller where the values allow it: planes of bytes, each compressed with zstd."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes, Codec, Float32, Parts
from nvflare_rdma.codecs.runs import TILE, own_output_runs, own_runs, scratch
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES
from nvflare_rdma.codecs.zstd_planes import LENGTH, LENGTH_NBYTES, PlaneCoder
from nvflare_rdma.errors import CodecError

_KINDS = tuple(NUMPY_DTYPES[name] for name in ("float32", "float16", "bfloat16"))  # by the number in the header
_LEVEL = 1  # higher levels search for repetitions, which weights don't have


class Lossless(Codec):
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
    bits = 32
    block_size = 1
    splits = False

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

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return zeros: every bit arrives."""
        return np.zeros(values.size, np.float32)

    def _encode(self, src: Array, out: Bytes) -> int:
        from nvflare_rdma.codecs.kernels import planes as kernels

        coder = self._coder()
        out[:LENGTH_NBYTES].view(LENGTH)[0] = _KINDS.index(src.dtype)
        used = LENGTH_NBYTES
        for _, run in own_runs(src, TILE):
            n = run.size
            planes = scratch("planes", np.uint32, TILE).view(np.uint8)[: n * src.itemsize]
            if src.itemsize == 4:
                kernels.split32(run.view(np.uint32), planes)
            else:
                kernels.split16(run.view(np.uint16), planes)
            for plane in planes.reshape(src.itemsize, n):
                used = coder.write(plane, out, used)
        return used

    def _decode(self, parts: Parts, out: Array) -> None:
        from nvflare_rdma.codecs.kernels import planes as kernels

        kind = int(parts["header"][0])
        if kind >= len(_KINDS) or _KINDS[kind] != out.dtype:
            known = _KINDS[kind].name if kind < len(_KINDS) else "damaged"
            raise CodecError(f"{self.name}: the encoded type is {known}, but out has dtype {out.dtype}")
        coder, encoded, used = self._coder(), parts["planes"], 0
        for _, run in own_output_runs(out, TILE):
            n = run.size
            planes = scratch("planes", np.uint32, TILE).view(np.uint8)[: n * out.itemsize]
            for plane in planes.reshape(out.itemsize, n):
                used = coder.read(encoded, used, plane)
            if out.itemsize == 4:
                kernels.merge32(planes, run.view(np.uint32))
            else:
                kernels.merge16(planes, run.view(np.uint16))
        if used != encoded.size:
            raise CodecError(f"{self.name}: {encoded.size - used} encoded bytes are left over")

    def _coder(self) -> PlaneCoder:
        # Made here and not with the codec, so that zstandard is imported only when it is used.
        if self._planes is None:
            self._planes = PlaneCoder(self.name, level=_LEVEL)
        return self._planes
