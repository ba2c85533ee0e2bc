"""Exact, as the difference from values that the receiver has: integers, in planes of bytes, in Huffman's code."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs.base import Array, Bytes, Parts
from nvflare_rdma.codecs.every_bit import EveryBitCodec
from nvflare_rdma.codecs.runs import TILE, own_output_runs, own_runs, scratch
from nvflare_rdma.errors import CodecError

_WORDS: dict[int, Any] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
_HEADER = np.dtype([("kind", "<u4"), ("digest", "<u8")])
_RUN_NBYTES = 24  # that a run may take besides the bytes of its values


class ExactDelta(EveryBitCodec):
    """Carries every bit of the values, NaN's too, as the difference from values that both sides hold (the *base*).

    The difference is that of two integers that are ordered as the numbers are, so a value that training has moved by
    a little has a small one. Of each 65536 differences, the low bits of which nothing is known are written as they
    are, and what is above them in Huffman's code, a byte for each. Where many values have not changed, it is written
    which have, and the differences of those. Integers only: nothing is rounded. Those of values of two bytes are
    written in groups, by the exponents of the base: a step of training changes small numbers in many units in the last
    place, and large ones in none.

    The header has a digest (xxh3, 64 bits) of the values, and decoding compares it: a base other than the sender's is
    found out as damaged bytes are. Without a base, the values are those by which zeros differ from them, and take about
    what they take with `lossless`, but zeros nearly nothing: the filters send `lossless` then, as who receives a few
    bytes that stand for that many values can't know them from an attack.

    Parts: `header`: which type the values have (uint32), and the digest (uint64); `runs`, bytes: for each 65536 values
    what `kernels/difference_runs.py` says, or `kernels/difference_groups.py` for values of two bytes. The size is known
    only after encoding and at most 4 bytes per value, plus 12, and 24 for each 65536 values. Values decode to their own
    type only.
    """

    name = "exact_delta"

    def encoded_nbytes(self, n: int) -> int:
        """Return the most that `n` values can take: all bits stored as they are."""
        return _HEADER.itemsize + 4 * n + _RUN_NBYTES * -(-n // TILE)

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

        from nvflare_rdma.codecs.kernels import difference_runs, differences

        digest, used = xxhash.xxh3_64(), _HEADER.itemsize
        word = _WORDS[src.itemsize]
        coded, memory = _memory()
        for start, values in own_runs(src, TILE):
            run = values.view(word)
            differing, known = coded[: run.size], _base_run(base, word, start, run.size)
            digest.update(run.data.cast("B"))
            if word.itemsize == 4:
                changed = differences.subtract32(run, known, differing)
                used = difference_runs.write_run(differing, 32, changed, out, used, memory)
            else:
                from nvflare_rdma.codecs.kernels import difference_groups  # takes seconds to compile

                changed = differences.subtract16(run, known, differing)
                used = difference_groups.write_groups(
                    differing, known, _below_exponent(src), changed, out, used, (*_memory_of_groups(), memory)
                )
        out[: _HEADER.itemsize].view(_HEADER)[0] = self._kind(src), digest.intdigest()
        return int(used)

    def _decode_difference(self, parts: Parts, base: Array | None, out: Array) -> None:
        import xxhash

        from nvflare_rdma.codecs.kernels import difference_runs, differences

        self._check_kind(int(parts["header"]["kind"][0]), out)
        digest, encoded, used = xxhash.xxh3_64(), parts["runs"], 0
        word = _WORDS[out.itemsize]
        coded, memory = _memory()
        for start, values in own_output_runs(out, TILE):
            run = values.view(word)
            differing, known = coded[: run.size], _base_run(base, word, start, run.size)
            if word.itemsize == 4:
                used = difference_runs.read_run(encoded, used, 32, differing, memory)
            else:
                from nvflare_rdma.codecs.kernels import difference_groups

                used = difference_groups.read_groups(
                    encoded, used, known, _below_exponent(out), differing, (*_memory_of_groups(), memory)
                )
            if used < 0:
                raise CodecError(f"{self.name}: the encoded bytes end too early, or are damaged")
            (differences.add32 if word.itemsize == 4 else differences.add16)(differing, known, run)
            digest.update(run.data.cast("B"))
        self._check_end(encoded, used)
        if digest.intdigest() != int(parts["header"]["digest"][0]):
            raise CodecError(
                f"{self.name}: other values came out than were encoded: the bytes are damaged, or are the difference "
                "from another base"
            )


def _memory() -> tuple[Array, tuple[Array, ...]]:
    """Return scratch memory for the differences of a run, and for what it takes to write and to read them."""
    from nvflare_rdma.codecs.kernels import difference_runs, huffman

    return scratch("differences", np.uint32, TILE), (
        scratch("found", np.uint32, TILE),
        scratch("places", np.uint8, TILE),
        scratch("plane", np.uint16, TILE).view(np.uint8),
        scratch("above", np.uint32, TILE // 16),
        scratch("room", np.uint32, TILE).view(np.uint8),
        scratch("work", np.int64, difference_runs.WORK),
        scratch("table", np.uint16, huffman.PLACES),
    )


def _memory_of_groups() -> tuple[Array, Array]:
    from nvflare_rdma.codecs.kernels import difference_groups

    return scratch("grouped", np.uint32, TILE), scratch("groups", np.int64, difference_groups.WORK)


def _below_exponent(values: Array) -> int:
    """Return how many bits are below the exponent of values of two bytes: float16's, else bfloat16's."""
    return 10 if values.dtype == np.float16 else 7


def _base_run(base: Array | None, word: Any, start: int, n: int) -> Array:
    if base is not None and word.itemsize == 4:
        return base[start : start + n].view(word)
    known = scratch("base", word, n)
    # A copy: it is read twice to group by it, and must be the same both times, whoever changes it meanwhile.
    known[:] = 0 if base is None else base[start : start + n].view(word)
    return known
