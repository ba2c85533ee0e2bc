"""Planes of bytes, each compressed with zstd on its own or stored as it is, one after the other in a buffer."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes
from nvflare_rdma.codecs.runs import TILE, scratch
from nvflare_rdma.errors import CodecError

LENGTH = np.dtype("<u4")
LENGTH_NBYTES = LENGTH.itemsize


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
