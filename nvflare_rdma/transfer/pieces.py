"""How a tensor that travels encoded is cut into pieces.

A piece is a run of values, all of the same number but the last one. Its encoded bytes are a unit of the message (see
`channel.bodies`), so that any chunk can be made, and used, without the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nvflare_rdma.channel import MAX_UNIT_BYTES, MIN_CHUNK_BYTES
from nvflare_rdma.codecs import NUMPY_DTYPES, FixedSizeCodec, dtype_name, get_codec
from nvflare_rdma.errors import ProtocolError

#: Values in a piece, or the least power of two from here on that makes a unit: half a MiB of float32, which caches
#: hold.
PIECE_VALUES = 1 << 17
_MAX_PIECE_VALUES = 1 << 22


@lru_cache(maxsize=4096)
def _encoded_nbytes(codec: FixedSizeCodec, n: int) -> int:
    """`FixedSizeCodec.encoded_nbytes`, which is asked for some ten times for each tensor: a model has few sizes."""
    return codec.encoded_nbytes(n)


@dataclass(frozen=True, slots=True)
class PieceLayout:
    """Tells how a tensor of `n` values is cut: into pieces of `values` values, which `codec` encodes."""

    codec: FixedSizeCodec
    n: int
    values: int

    @classmethod
    def choose(cls, codec: FixedSizeCodec, n: int) -> PieceLayout:
        """Choose a layout; this is the sender's part."""
        values = PIECE_VALUES
        while _encoded_nbytes(codec, values) < MIN_CHUNK_BYTES:
            values *= 2
        return cls(codec, n, values)

    @classmethod
    def from_peer(cls, name: str, n: int, values: int) -> PieceLayout:
        """Check and take the layout that a sender has chosen.

        Raises:
            ProtocolError: there is no codec called `name`, or the tensor can't be cut into such pieces.
        """
        try:
            codec = get_codec(name)
        except ValueError:
            raise ProtocolError(f"unknown codec {name!r}") from None
        if not isinstance(codec, FixedSizeCodec):
            raise ProtocolError(f"{name} can't be cut into pieces")
        if not 0 < values <= _MAX_PIECE_VALUES or values % codec.block_size:
            raise ProtocolError(f"{name} can't be cut into pieces of {values} values")
        layout = cls(codec, n, values)
        if not MIN_CHUNK_BYTES <= layout.unit <= MAX_UNIT_BYTES:
            raise ProtocolError(f"{values} values of {name} are {layout.unit} bytes, which is no unit of a message")
        return layout

    @property
    def unit(self) -> int:
        """Bytes of an encoded piece."""
        return _encoded_nbytes(self.codec, self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded tensor."""
        whole, rest = divmod(self.n, self.values)
        return whole * self.unit + (_encoded_nbytes(self.codec, rest) if rest else 0)

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return -(-self.n // self.values)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, slice]]:
        """The pieces in `length` bytes of the message that begin at `offset`: the first value of each, the one after
        its last, and where its bytes are among those."""
        unit = self.unit
        for start in range(0, length, unit):
            first = (offset + start) // unit * self.values
            yield first, min(first + self.values, self.n), slice(start, min(start + unit, length))


def piece_layout(tensor: Any, codec: FixedSizeCodec | None) -> PieceLayout | None:
    """The layout for a tensor that is marked for `codec`; None if it is to travel exact."""
    if codec is None or dtype_name(tensor) not in NUMPY_DTYPES:
        return None
    return PieceLayout.choose(codec, int(np.prod(tuple(tensor.shape), dtype=np.int64)))
