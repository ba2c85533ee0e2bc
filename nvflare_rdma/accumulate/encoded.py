"""Encoded values of one tensor, which can be decoded, or added to a sum, run by run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from nvflare_rdma.codecs import NUMPY_DTYPES, TILE, Array, FixedSizeCodec, Float32


class Encoded(ABC):
    """The values of one tensor, flat.

    Any number of threads may use it at once. What it is made of has been checked, and does not change.

    Attributes:
        n: how many values there are.
        dtype: the name of the tensor's: float32, float16 or bfloat16.
        run: values of a run. Runs begin at multiples of it.
        nbytes: the memory that it keeps.
    """

    n: int
    dtype: str
    run: int
    nbytes: int

    @abstractmethod
    def decode(self, start: int, out: Array) -> None:
        """Write the values from `start` on to `out`, flat, float32 or of the tensor's dtype (uint16 for bfloat16), at
        most a run."""

    @abstractmethod
    def add(self, start: int, weight: float, out: Float32) -> None:
        """Add `weight` times the values from `start` on to `out`, at most a run: what `decode` and then `add_scaled`
        would do, bit for bit. For float32 tensors."""


class Pieces(Encoded):
    """Pieces of `values` values each, one after the other in `memory`, as a transfer brings them."""

    def __init__(self, codec: FixedSizeCodec, values: int, n: int, dtype: str, memory: memoryview) -> None:
        self.n, self.dtype, self.run, self.nbytes = n, dtype, values, len(memory)
        self._codec = codec
        self._unit = codec.encoded_nbytes(values)
        self._memory = memory

    def decode(self, start: int, out: Array) -> None:
        """See `Encoded.decode`."""
        self._codec.decode_into(self._piece(start, out.size), out)

    def add(self, start: int, weight: float, out: Float32) -> None:
        """See `Encoded.add`."""
        self._codec.add_into(self._piece(start, out.size), weight, out)

    def _piece(self, start: int, n: int) -> memoryview:
        first = start // self.run * self._unit
        return self._memory[first : first + self._codec.encoded_nbytes(n)]


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


def numpy_dtype(encoded: Encoded) -> Any:
    """Return numpy's dtype for the values: uint16 stands for bfloat16."""
    return NUMPY_DTYPES[encoded.dtype]
