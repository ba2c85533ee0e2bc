"""Exact, as the difference from values that the receiver has: integers, in planes of bytes, compressed with zstd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes, Parts
from nvflare_rdma.codecs.runs import TILE, own_output_runs, own_runs, scratch
from nvflare_rdma.codecs.zstd_planes import LENGTH, LENGTH_NBYTES, PlaneCodec, plane_memory
from nvflare_rdma.errors import CodecError

_WORDS: dict[int, Any] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
_HEADER = np.dtype([("kind", "<u4"), ("digest", "<u8")])
_FEW = 100  # at most one value in so many has changed: places and differences are written
_DENSE = 0xFFFFFFFF  # in place of the number of changed values
_ZEROS = 0x80  # a bit for each plane: it is all zeros and not there


class ExactDelta(PlaneCodec):
    """Carries every bit of the values, NaN's too, as the difference from values that both sides hold (the *base*).

    The difference is that of two integers that are ordered as the numbers are, so a value that training has moved by
    a little has a small one. Differences are split into planes (all their lowest bytes, all their second bytes, ...),
    and each plane of each 65536 values is compressed with zstd on its own, or stored as it is if that doesn't make it
    smaller; planes of zeros take no bytes. Where at most one value in a hundred has changed, the places and differences
    of those are written instead. Integers only: nothing is rounded.

    The header has a digest (xxh3, 64 bits) of the values, and decoding compares it: a base other than the sender's is
    found out as damaged bytes are. Without a base, the values are those by which zeros differ from them, and take what
    they take with `lossless`.

    Parts: `header`: which type the values have (uint32), and the digest (uint64); `runs`, bytes: for each 65536 values
    how many of them have changed (uint32) and their planes. The size is known only after encoding and at most 4
    bytes per value, plus 12, and 24 for each 65536 values. Values decode to their own type only.
    """

    name = "exact_delta"

    def encoded_nbytes(self, n: int) -> int:
        """Return the most that `n` values can take: all planes stored as they are, with their lengths."""
        return _HEADER.itemsize + 4 * n + 6 * LENGTH_NBYTES * -(-n // TILE)

    def parts(self, encoded: Any, n: int) -> dict[str, Array]:
        """Return the header and the runs as views of `encoded`; see `Codec.parts`."""
        flat = self._bytes(encoded)
        if not _HEADER.itemsize <= flat.size <= self.encoded_nbytes(n):
            raise CodecError(f"{self.name}: {flat.size} encoded bytes can't be {n} values")
        return {"header": flat[: _HEADER.itemsize].view(_HEADER), "runs": flat[_HEADER.itemsize :]}

    def encode_against(self, src: Array, base: Array, out: Any) -> int:
        """Encode the difference of `src` from `base` into `out` and return how many of its bytes count.

        Args:
            src, out: see `Codec.encode_into`.
            base: flat and C-contiguous, of the dtype and number of values of `src`.

        Raises:
            CodecError: a wrong dtype, size or layout; nothing was written.
        """
        self._check_values(src, "src")
        self._check_base(src, base)
        buffer = self._bytes(out)
        self._check_size(buffer.size, src.size)
        if not buffer.flags.writeable:
            raise CodecError(f"{self.name}: out is read-only")
        return self._encode_difference(src, base, buffer)

    def decode_against(self, encoded: Any, base: Array, out: Array) -> None:
        """Decode what `encode_against` made with the same base.

        Args:
            encoded, out: see `Codec.decode_into`.
            base: see `encode_against`.

        Raises:
            CodecError: as `Codec.decode_into`; or the base is another than that of the sender.
        """
        self._check_values(out, "out")
        self._check_base(out, base)
        self._decode_difference(self.parts(encoded, out.size), base, out)

    def _check_base(self, values: Array, base: Array) -> None:
        if base.dtype != values.dtype or base.shape != (values.size,) or not base.flags.c_contiguous:
            raise CodecError(
                f"{self.name}: the base of {values.size} values of {values.dtype} has dtype {base.dtype} and shape "
                f"{base.shape}; it must be flat and have theirs"
            )

    def _encode(self, src: Array, out: Bytes) -> int:
        return self._encode_difference(src, None, out)

    def _decode(self, parts: Parts, out: Array) -> None:
        self._decode_difference(parts, None, out)

    def _encode_difference(self, src: Array, base: Array | None, out: Bytes) -> int:
        import xxhash

        from nvflare_rdma.codecs.kernels import differences as kernels

        digest, used = xxhash.xxh3_64(), _HEADER.itemsize
        word = _WORDS[src.itemsize]
        subtract = kernels.subtract32 if word.itemsize == 4 else kernels.subtract16
        for start, values in own_runs(src, TILE):
            run = values.view(word)
            digest.update(run.data.cast("B"))
            coded = scratch("differences", word, run.size)
            changed = subtract(run, _base_run(base, word, start, run.size), coded)
            used = self._write_run(coded, changed, out, used)
        out[: _HEADER.itemsize].view(_HEADER)[0] = self._kind(src), digest.intdigest()
        return used

    def _write_run(self, coded: Array, changed: int, out: Bytes, used: int) -> int:
        """Write how many of the differences are not 0, and those; return where the next run begins."""
        from nvflare_rdma.codecs.kernels import differences as kernels

        few = changed * _FEW <= coded.size
        used += LENGTH_NBYTES
        out[used - LENGTH_NBYTES : used].view(LENGTH)[0] = changed if few else _DENSE
        if not few:
            return self._write_planes(coded, out, used)
        if changed:
            gaps, found = scratch("gaps", np.uint16, changed), scratch("found", coded.dtype, changed)
            kernels.gather(coded, gaps, found)
            used = self._write_planes(found, out, self._write_planes(gaps, out, used))
        return used

    def _write_planes(self, words: Array, out: Bytes, used: int) -> int:
        from nvflare_rdma.codecs.kernels import differences as kernels

        coder, flags = self._coder(), used
        out[flags], used = 0, used + 1
        for k, plane in enumerate(_split(words)):
            if kernels.is_zero(plane):
                out[flags] |= _ZEROS >> k
            else:
                used = coder.write(plane, out, used)
        return used

    def _decode_difference(self, parts: Parts, base: Array | None, out: Array) -> None:
        import xxhash

        from nvflare_rdma.codecs.kernels import differences as kernels

        self._check_kind(int(parts["header"]["kind"][0]), out)
        digest, encoded, used = xxhash.xxh3_64(), parts["runs"], 0
        word = _WORDS[out.itemsize]
        add = kernels.add32 if word.itemsize == 4 else kernels.add16
        for start, values in own_output_runs(out, TILE):
            run = values.view(word)
            coded = scratch("differences", word, run.size)
            used = self._read_run(encoded, used, coded)
            add(coded, _base_run(base, word, start, run.size), run)
            digest.update(run.data.cast("B"))
        self._check_end(encoded, used)
        if digest.intdigest() != int(parts["header"]["digest"][0]):
            raise CodecError(
                f"{self.name}: other values came out than were encoded: the bytes are damaged, or are the difference "
                "from another base"
            )

    def _read_run(self, encoded: Bytes, used: int, coded: Array) -> int:
        """Fill in the differences that begin at `used`; return where the next run begins."""
        from nvflare_rdma.codecs.kernels import differences as kernels

        used += LENGTH_NBYTES
        if used > encoded.size:
            raise CodecError(f"{self.name}: the encoded bytes end too early")
        changed = int(encoded[used - LENGTH_NBYTES : used].view(LENGTH)[0])
        if changed == _DENSE:
            return self._read_planes(encoded, used, coded)
        if changed * _FEW > coded.size:
            raise CodecError(f"{self.name}: damaged: {changed} of {coded.size} values are said to be few")
        gaps, found = scratch("gaps", np.uint16, changed), scratch("found", coded.dtype, changed)
        if changed:
            used = self._read_planes(encoded, self._read_planes(encoded, used, gaps), found)
        if not kernels.scatter(gaps, found, coded):
            raise CodecError(f"{self.name}: damaged: a changed value lies beyond the last one")
        return used

    def _read_planes(self, encoded: Bytes, used: int, words: Array) -> int:
        from nvflare_rdma.codecs.kernels import differences as kernels

        if used >= encoded.size:
            raise CodecError(f"{self.name}: the encoded bytes end too early")
        flags, used = int(encoded[used]), used + 1
        planes = plane_memory(words)
        for k, plane in enumerate(planes):
            if flags & (_ZEROS >> k):
                plane[:] = 0
            else:
                used = self._coder().read(encoded, used, plane)
        kernels.merge(planes.reshape(-1), words)
        return used

    def _zstd_options(self) -> dict[str, Any]:
        from zstandard import STRATEGY_FAST, ZstdCompressionParameters

        # Differences have hardly a repetition: a short search for long ones takes the least time, and leaves the most
        # to the entropy coder.
        parameters = ZstdCompressionParameters(
            strategy=STRATEGY_FAST, window_log=16, hash_log=6, min_match=7, chain_log=6, search_log=1
        )
        return {"compression_params": parameters}


def _split(words: Array) -> Iterator[Bytes]:
    from nvflare_rdma.codecs.kernels import differences as kernels

    planes = plane_memory(words)
    kernels.split(words, planes.reshape(-1))
    yield from planes


def _base_run(base: Array | None, word: Any, start: int, n: int) -> Array:
    if base is not None:
        return base[start : start + n].view(word)
    zeros = scratch("no base", word, n)
    zeros[:] = 0
    return zeros
