"""Describes a message's tensors to the peer that receives them, before any of their bytes move.

Tensors of up to `INLINE_BYTES` are in the manifest themselves (all together at most `INLINE_TOTAL`), and so are all
tensors of a message that has no more than `SMALL_TOTAL` as it is sent; each of the others is a message of its own on
the link. Its bytes are the tensor's values in C order, little-endian, or what a codec makes of them piece by piece (see
`pieces`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from nvflare_rdma.codecs import FLOAT_NAMES, MAX_DIMENSIONS, dtype_name, is_plain, is_torch, width
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.transfer.pieces import PieceLayout

INLINE_BYTES = 16 * 1024
INLINE_TOTAL = 1024 * 1024
SMALL_TOTAL = 256 * 1024
MAX_ITEMS = 1 << 20
#: Where a request has the bytes of each item's message that are not to be sent again, and the answer has those that
#: will not be.
STARTS = "starts"


@dataclass(frozen=True, slots=True)
class Item:
    """Describes one tensor, or one part of a file.

    `name` is its id in its message. `content` has its bytes, or is None if they come apart; `cut` tells how they are
    encoded, and is None if they are not.
    """

    name: str
    torch: bool
    dtype: str
    shape: tuple[int, ...]
    content: bytes | None = None
    cut: PieceLayout | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * width(self.dtype, self.torch)

    @property
    def sent_nbytes(self) -> int:
        """Bytes of its content, or of its message on the link."""
        return self.cut.nbytes if self.cut is not None else self.nbytes


def describe(tensors: Mapping[str, Any]) -> list[Item]:
    """Describe a message's tensors, without their content.

    Raises:
        TransferError: one of them is no plain dense tensor, and is left to the fallback.
    """
    return [_describe(name, tensor) for name, tensor in tensors.items()]


def is_sendable(tensor: Any) -> bool:
    """Whether a tensor or array is a plain dense one, which can be received into memory of its own."""
    plain = is_plain(tensor) and width(dtype_name(tensor), is_torch(tensor)) > 0
    return plain and sys.byteorder == "little"


def _describe(name: str, tensor: Any) -> Item:
    if not is_sendable(tensor):
        what = f"{type(tensor).__name__} of dtype {getattr(tensor, 'dtype', None)}"
        raise TransferError(f"{name} is a {what}, which is no plain dense tensor")
    return Item(name, is_torch(tensor), dtype_name(tensor), tuple(tensor.shape))


def pack(items: list[Item]) -> bytes:
    """Make bytes of a manifest, for `unpack`."""
    packed: bytes = msgpack.packb(
        [
            [i.name, i.torch, i.dtype, list(i.shape), i.content, *([i.cut.codec.name, i.cut.values] if i.cut else [])]
            for i in items
        ]
    )
    return packed


def unpack(data: Any) -> list[Item]:
    """Check a peer's manifest, and give the items that `pack` was given there.

    Raises:
        ProtocolError: `data` is malformed.
    """
    if type(data) is not bytes:
        raise ProtocolError(f"a manifest should be bytes, but is {type(data).__name__}")
    try:
        rows = msgpack.unpackb(data, max_array_len=MAX_ITEMS)
        if type(rows) is not list:
            raise ValueError(f"a list is expected, not {type(rows).__name__}")
        items = [_item(*row) for row in rows]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed manifest: {error}") from error
    if len({item.name for item in items}) != len(items):
        raise ProtocolError("malformed manifest: a name comes twice")
    return items


def _item(name: Any, torch: Any, dtype: Any, shape: Any, content: Any, codec: Any = None, values: Any = 0) -> Item:
    if not (type(name) is type(dtype) is str and type(torch) is bool and type(shape) is list):
        raise ValueError("an item's name and dtype are strings, its shape is a list")
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"{name!r} has shape {shape}")
    if not width(dtype, torch):
        raise ValueError(f"{name!r} has dtype {dtype!r}")
    item = Item(name, torch, dtype, tuple(shape), content)
    # Neither framework makes an empty tensor of which the rest is too large.
    if math.prod(n or 1 for n in shape) * width(dtype, torch) >= 1 << 48 or (content is None and not item.nbytes):
        raise ValueError(f"{name!r} has {item.nbytes} bytes")
    if codec is not None:
        if type(codec) is not str or type(values) is not int or dtype not in FLOAT_NAMES or not item.nbytes:
            raise ValueError(f"{name!r} of dtype {dtype} is encoded with {codec!r}")
        item = replace(item, cut=PieceLayout.from_peer(codec, math.prod(shape), values))
    if content is not None and (type(content) is not bytes or len(content) != item.sent_nbytes):
        raise ValueError(f"{name!r} has other content than {item.sent_nbytes} bytes")
    return item
