"""What codecs that carry every bit have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes, Codec, Float32
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES
from nvflare_rdma.errors import CodecError

KINDS = tuple(NUMPY_DTYPES[name] for name in ("float32", "float16", "bfloat16"))  # by the number in a header


class EveryBitCodec(Codec):
    """A codec that carries every bit of the values. Its header says which type they have."""

    bits = 32
    block_size = 1
    splits = False

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return zeros: every bit arrives."""
        return np.zeros(values.size, np.float32)

    @staticmethod
    def _kind(values: Array) -> int:
        return KINDS.index(values.dtype)

    def _check_kind(self, kind: int, out: Array) -> None:
        if kind >= len(KINDS) or KINDS[kind] != out.dtype:
            known = KINDS[kind].name if kind < len(KINDS) else "damaged"
            raise CodecError(f"{self.name}: the encoded type is {known}, but out has dtype {out.dtype}")

    def _check_end(self, encoded: Bytes, used: int) -> None:
        if used != encoded.size:
            raise CodecError(f"{self.name}: {encoded.size - used} encoded bytes are left over")
