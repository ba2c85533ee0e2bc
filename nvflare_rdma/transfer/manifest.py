"""Describes a message's tensors to the peer that receives them, before any of their bytes move.

All tensors of a message that has no more than `SMALL_TOTAL` as it is sent are in the manifest themselves. Of a larger
one each tensor is a message of its own on the link, and small ones are bundled in one, since a message costs both sides
some work, whatever is in it. The bytes are the tensor's values in C order, little-endian, or what a codec makes
of them piece by piece (see `pieces`); a bundle is those of its members one after the other, and travels as one chunk.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

from nvflare_rdma.channel import MAX_UNIT_BYTES, MIN_CHUNK_BYTES
from nvflare_rdma.codecs import FLOAT_NAMES, MAX_DIMENSIONS, dtype_name, is_loadable, is_plain, is_torch, width
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.transfer.pieces import PieceLayout

INLINE_BYTES = 16 * 1024
INLINE_TOTAL = 1024 * 1024
SMALL_TOTAL = 256 * 1024
#: So much an item may have, as it is sent, to be bundled, and so much a bundle.
BUNDLED_BYTES = 128 * 1024
BUNDLE_BYTES = 256 * 1024
#: Where there is less for all bundles together, there are so many of them: for as many rails.
_BUNDLES = 16
#: Of a message, or a file. What an item is made of takes half a KiB or so here, which no budget counts.
MAX_ITEMS = 1 << 16
#: A row and its shape.
_LISTS_OF_ITEM = 2
#: Where a request has the bytes of each item's message that are not to be sent again, and the answer has those that
#: will not be.
STARTS = "starts"


@dataclass(frozen=True, slots=True)
class Item:
    """Describes one tensor, one part of a file, or a bundle of tensors.

    `name` is its id in its message. `content` has its bytes, or is None if they come apart; `cut` tells how they are
    encoded, and is None if they are not. `position` is its place among the tensors of its message, in whose order they
    are given to who receives them. A bundle has its `members`, and the name of the first of them.
    """

    name: str
    torch: bool
    dtype: str
    shape: tuple[int, ...]
    content: bytes | None = None
    cut: PieceLayout | None = None
    members: tuple[Item, ...] = ()
    position: int = field(default=0, compare=False)

    @classmethod
    def bundle(cls, members: Sequence[Item]) -> Item:
        """Bundle items that come apart."""
        nbytes = sum(member.sent_nbytes for member in members)
        return cls(members[0].name, False, "uint8", (nbytes,), members=tuple(members))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * width(self.dtype, self.torch)

    @property
    def sent_nbytes(self) -> int:
        """Bytes of its content, or of its message on the link."""
        return self.cut.nbytes if self.cut is not None else self.nbytes

    @property
    def needs_relay(self) -> bool:
        """Whether FLARE's own messages can't bring it: it is encoded, or of a dtype that they can't make tensors of."""
        return self.cut is not None or (self.torch and not is_loadable(self.dtype))

    @property
    def unit(self) -> int:
        """The unit of its message on the link, where it is sent from its beginning: see `channel.Sink`."""
        if self.members:
            return max(self.nbytes, MIN_CHUNK_BYTES)
        return self.cut.unit if self.cut is not None else 1

    @property
    def tensors(self) -> tuple[Item, ...]:
        """Its members, or itself."""
        return self.members or (self,)


def describe(tensors: Mapping[str, Any]) -> list[Item]:
    """Describe a message's tensors, without their content.

    Raises:
        TransferError: one of them is no plain dense tensor, or there are too many. They are left to the fallback.
    """
    if len(tensors) > MAX_ITEMS:
        raise TransferError(f"a message has {len(tensors)} tensors, and {MAX_ITEMS} are the most that one can have")
    return [_describe(position, name, tensor) for position, (name, tensor) in enumerate(tensors.items())]


def bundled(items: list[Item]) -> list[Item]:
    """The same items, with the small ones that come apart in bundles. A bundle remains one if some of its members, or
    all, turn out to travel exact."""

    def is_small(item: Item) -> bool:
        return item.content is None and item.sent_nbytes <= BUNDLED_BYTES and item.nbytes <= MAX_UNIT_BYTES

    small = [item for item in items if is_small(item)]
    most = min(max(sum(item.sent_nbytes for item in small) // _BUNDLES, MIN_CHUNK_BYTES), BUNDLE_BYTES)
    bundles: list[list[Item]] = [[]]
    room, exact_room = most, MAX_UNIT_BYTES
    for item in small:
        if bundles[-1] and (item.sent_nbytes > room or item.nbytes > exact_room):
            bundles.append([])
            room, exact_room = most, MAX_UNIT_BYTES
        bundles[-1].append(item)
        room, exact_room = room - item.sent_nbytes, exact_room - item.nbytes
    several = [bundle for bundle in bundles if len(bundle) > 1]
    within = {item.name for bundle in several for item in bundle}
    return [item for item in items if item.name not in within] + [Item.bundle(bundle) for bundle in several]


def is_sendable(tensor: Any) -> bool:
    """Whether a tensor or array is a plain dense one, which can be received into memory of its own."""
    plain = is_plain(tensor) and width(dtype_name(tensor), is_torch(tensor)) > 0
    return plain and sys.byteorder == "little"


def in_order(items: Iterable[Item]) -> list[Item]:
    """The tensors of the items, those of bundles among them, in the order that they have in their message."""
    return sorted((tensor for item in items for tensor in item.tensors), key=lambda tensor: tensor.position)


def _describe(position: int, name: str, tensor: Any) -> Item:
    if not is_sendable(tensor):
        what = f"{type(tensor).__name__} of dtype {getattr(tensor, 'dtype', None)}"
        raise TransferError(f"{name} is a {what}, which is no plain dense tensor")
    return Item(name, is_torch(tensor), dtype_name(tensor), tuple(tensor.shape), position=position)


def pack(items: list[Item]) -> bytes:
    """Make bytes of a manifest, for `unpack`. It has the tensors in their order; before one that is in a bundle is the
    bundle's number. Bundles follow the other items, as `bundled` gives them."""
    bundles = [item for item in items if item.members]
    numbers = {member.name: number for number, bundle in enumerate(bundles) for member in bundle.members}
    rows = [
        [numbers[tensor.name], *_row(tensor)] if tensor.name in numbers else _row(tensor) for tensor in in_order(items)
    ]
    packed: bytes = msgpack.packb(rows)
    return packed


def _row(item: Item) -> list[Any]:
    cut = [item.cut.codec.name, item.cut.values] if item.cut else []
    return [item.name, item.torch, item.dtype, list(item.shape), item.content, *cut]


def unpack(data: Any, bundles: bool = False) -> list[Item]:
    """Check a peer's manifest, and give the items that `pack` was given there. There may be `bundles` among them only
    where the receiver knows how to take them.

    Raises:
        ProtocolError: `data` is malformed.
    """
    if type(data) is not bytes:
        raise ProtocolError(f"a manifest should be bytes, but is {type(data).__name__}")
    try:
        rows = msgpack.unpackb(data, max_array_len=MAX_ITEMS, list_hook=_Lists(), object_hook=_no_map)
        if type(rows) is not list:
            raise ValueError(f"a list is expected, not {type(rows).__name__}")
        items = _items(rows, bundles)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed manifest: {error}") from error
    names = {tensor.name for item in items for tensor in item.tensors}
    if len(names) != len(rows):
        raise ProtocolError("malformed manifest: a name comes twice")
    return items


class _Lists:
    """Counts the lists of a manifest while they are made of its bytes, each of which may be one in one."""

    def __init__(self) -> None:
        self._left = _LISTS_OF_ITEM * MAX_ITEMS + 1

    def __call__(self, values: list[Any]) -> list[Any]:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more lists than {MAX_ITEMS} items do")
        return values


def _no_map(values: dict[Any, Any]) -> Any:
    raise ValueError("it has a map, and items have none")


def _items(rows: list[Any], bundles: bool) -> list[Item]:
    alone: list[Item] = []
    bundled: list[list[Item]] = []
    for position, row in enumerate(rows):
        if not (bundles and type(row) is list and row and type(row[0]) is int):
            alone.append(replace(_item(*row), position=position))
            continue
        # Numbers follow each other, so that one that a peer makes up takes no memory.
        if row[0] == len(bundled):
            bundled.append([])
        elif not bundled or row[0] != len(bundled) - 1:
            raise ValueError(f"an item is in bundle {row[0]} after {len(bundled)} bundles")
        bundled[-1].append(replace(_item(*row[1:]), position=position))
    return alone + [_bundle(members) for members in bundled]


def _bundle(members: list[Item]) -> Item:
    bundle = Item.bundle(members)
    if any(member.content is not None for member in members):
        raise ValueError("a bundle has an item with content")
    if bundle.nbytes > MAX_UNIT_BYTES:
        raise ValueError(f"a bundle has {bundle.nbytes} bytes, {MAX_UNIT_BYTES} are the most")
    return bundle


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
