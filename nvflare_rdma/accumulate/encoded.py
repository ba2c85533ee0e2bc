"""Values of one tensor that are no tensor yet: they can be decoded, or added to a sum, run by run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from nvflare_rdma.accumulate.spool import Bytes, InSpool
from nvflare_rdma.codecs import NUMPY_DTYPES, TILE, Array, FixedSizeCodec, Float32, add_scaled, float32_runs

_READ = 1 << 18


class Encoded(ABC):
    """The values of one tensor, flat.

    Any number of threads may use it at once. What it is made of has been checked, and does not change.

    Attributes:
        n: how many values there are.
        dtype: the name of the tensor's: float32, float16 or bfloat16.
        run: values of a run. Runs begin at multiples of it.
        nbytes: the memory that it keeps.
        nbytes_on_disk: what it keeps on disk, at `where`.
    """

    n: int
    dtype: str
    run: int
    nbytes: int
    nbytes_on_disk: int = 0
    where: Bytes | None = None

    def check(self) -> None:
        """Look whether what is on disk can be read. Raises OSError."""
        for start in range(0, self.nbytes_on_disk, _READ):
            assert self.where is not None
            self.where.read(start, min(_READ, self.nbytes_on_disk - start))

    @abstractmethod
    def decode(self, start: int, out: Array) -> None:
        """Write the values from `start` on to `out`, flat, float32 or of the tensor's dtype (uint16 for bfloat16), at
        most a run."""

    @abstractmethod
    def add(self, start: int, weight: float, out: Float32) -> None:
        """Add `weight` times the values from `start` on to `out`, at most a run: what `decode` and then `add_scaled`
        would do, bit for bit. For float32 tensors."""


class Pieces(Encoded):
    """Pieces of `values` values each, one after the other in `where`, as a transfer brings them."""

    def __init__(self, codec: FixedSizeCodec, values: int, n: int, dtype: str, where: Bytes) -> None:
        self.n, self.dtype, self.run = n, dtype, values
        self._codec = codec
        self._unit = codec.encoded_nbytes(values)
        self._where = where
        whole, rest = divmod(n, values)
        _keep(self, where, whole * self._unit + (codec.encoded_nbytes(rest) if rest else 0))

    def decode(self, start: int, out: Array) -> None:
        """See `Encoded.decode`."""
        self._codec.decode_into(self._piece(start, out.size), out)

    def add(self, start: int, weight: float, out: Float32) -> None:
        """See `Encoded.add`."""
        self._codec.add_into(self._piece(start, out.size), weight, out)

    def _piece(self, start: int, n: int) -> memoryview:
        return self._where.read(start // self.run * self._unit, self._codec.encoded_nbytes(n))


class Plain(Encoded):
    """Values as they are in the tensor, one after the other in `where`."""

    run = 4 * TILE

    def __init__(self, n: int, dtype: str, where: Bytes) -> None:
        self.n, self.dtype = n, dtype
        self._dtype = NUMPY_DTYPES[dtype]
        self._where = where
        _keep(self, where, n * self._dtype.itemsize)

    def decode(self, start: int, out: Array) -> None:
        """See `Encoded.decode`."""
        first = start * self._dtype.itemsize
        if out.dtype == self._dtype:
            self._where.read_into(first, out.view(np.uint8).data)
            return
        own = np.frombuffer(self._where.read(first, out.size * self._dtype.itemsize), self._dtype)
        for at, values in float32_runs(own):
            out[at : at + values.size] = values

    def add(self, start: int, weight: float, out: Float32) -> None:
        """See `Encoded.add`."""
        add_scaled(np.frombuffer(self._where.read(start * 4, out.nbytes), np.float32), weight, out)


class EncodedParts(Encoded):
    """The parts that a codec has made of a whole tensor."""

    run = 4 * TILE

    def __init__(self, codec: FixedSizeCodec, parts: Mapping[str, Array], n: int, dtype: str) -> None:
        self.n, self.dtype, self.nbytes = n, dtype, sum(part.nbytes for part in parts.values())
        self._codec = codec
        self._parts = parts

    def decode(self, start: int, out: Array) -> None:
        """See `Encoded.decode`."""
        self._codec.decode_parts_into(self._of_run(start, out.size), out)

    def add(self, start: int, weight: float, out: Float32) -> None:
        """See `Encoded.add`."""
        self._codec.add_parts_into(self._of_run(start, out.size), weight, out)

    def _of_run(self, start: int, n: int) -> dict[str, Any]:
        return self._codec.parts_of_run(self._parts, start, start + n)


def _keep(encoded: Encoded, where: Bytes, nbytes: int) -> None:
    """Note where an encoded tensor's bytes are."""
    encoded.where = where
    encoded.nbytes, encoded.nbytes_on_disk = (0, nbytes) if isinstance(where, InSpool) else (nbytes, 0)
