"""Planes of bytes, each compressed with zstd on its own or stored as it is, one after the other in a buffer; and what
codecs that are made of them have in common."""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes, Codec, Float32
from nvflare_rdma.codecs.runs import TILE, scratch
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES
from nvflare_rdma.errors import CodecError

LENGTH = np.dtype("<u4")
LENGTH_NBYTES = LENGTH.itemsize
_KINDS = tuple(NUMPY_DTYPES[name] for name in ("float32", "float16", "bfloat16"))  # by the number in a header


class PlaneCoder(threading.local):
    """Writes and reads planes. zstd's working memory is the thread's: only one thread may use it at a time.

    Args:
        codec: the name that error messages begin with.
        options: what zstd's compressor is made with.
    """

    def __init__(self, codec: str, **options: Any) -> None:
        import zstandard

        self._codec = codec
        self._compressor = zstandard.ZstdCompressor(**options)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 20)

    def write(self, plane: Bytes, out: Bytes, used: int) -> int:
        """Write a plane, after its length, to `out` from `used` on; return where the next one begins."""
        content = self._compressor.compress(plane.data)
        stored = plane if len(content) >= plane.size else np.frombuffer(content, np.uint8)
        begin = used + LENGTH_NBYTES
        out[used:begin].view(LENGTH)[0] = stored.size
        out[begin : begin + stored.size] = stored
        return begin + stored.size

    def read(self, encoded: Bytes, used: int, plane: Bytes) -> int:
        """Fill `plane` from what begins at `used`; return where the next one begins.

        Raises:
            CodecError: the bytes end too early, or are damaged.
        """
        import zstandard

        begin = used + LENGTH_NBYTES
        length = int(encoded[used:begin].view(LENGTH)[0]) if begin <= encoded.size else 0
        content = encoded[begin : begin + length]
        if not length or content.size != length:
            raise CodecError(f"{self._codec}: the encoded bytes end too early")
        if length == plane.size:
            plane[:] = content
            return begin + length
        try:
            # Asked first, because zstd would allocate whatever the frame says.
            if zstandard.get_frame_parameters(content.data).content_size != plane.size:
                raise CodecError(f"{self._codec}: a plane has another size than its {plane.size} values")
            plane[:] = np.frombuffer(self._decompressor.decompress(content.data), np.uint8)
        except (zstandard.ZstdError, ValueError) as error:
            if isinstance(error, CodecError):
                raise
            raise CodecError(f"{self._codec}: damaged: {error}") from None
        return begin + length


def plane_memory(words: Array) -> Bytes:
    """Return scratch memory for the planes of at most `TILE` words, one in each row."""
    planes: Bytes = scratch("planes", np.uint32, TILE).view(np.uint8)[: words.nbytes]
    return planes.reshape(words.itemsize, words.size)


class PlaneCodec(Codec):
    """A codec that carries every bit of the values, in planes. Its header says which type they have."""

    bits = 32
    block_size = 1
    splits = False

    def __init__(self) -> None:
        self._planes: PlaneCoder | None = None

    def max_abs_error(self, values: Float32, encoded: Any) -> Float32:
        """Return zeros: every bit arrives."""
        return np.zeros(values.size, np.float32)

    @abstractmethod
    def _zstd_options(self) -> dict[str, Any]:
        """Return what zstd's compressor is made with."""

    def _coder(self) -> PlaneCoder:
        # Made here and not with the codec, so that zstandard is imported only when it is used.
        if self._planes is None:
            self._planes = PlaneCoder(self.name, **self._zstd_options())
        return self._planes

    @staticmethod
    def _kind(values: Array) -> int:
        return _KINDS.index(values.dtype)

    def _check_kind(self, kind: int, out: Array) -> None:
        if kind >= len(_KINDS) or _KINDS[kind] != out.dtype:
            known = _KINDS[kind].name if kind < len(_KINDS) else "damaged"
            raise CodecError(f"{self.name}: the encoded type is {known}, but out has dtype {out.dtype}")

    def _check_end(self, encoded: Bytes, used: int) -> None:
        if used != encoded.size:
            raise CodecError(f"{self.name}: {encoded.size - used} encoded bytes are left over")
