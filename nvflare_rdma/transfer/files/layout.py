"""Where each part of a file lies, and how it travels.

Parts follow each other without gaps; none is longer than `FileIdentity.part_bytes`. A part is some of the file's bytes
as they are (an item of dtype uint8), or, if the file is encoded on the way, values of one tensor. Those are encoded
piece by piece, as tensors of messages are, unless their codec can't carry them. The sender describes the parts in a
manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from nvflare_rdma.codecs import FLOAT_NAMES, NUMPY_DTYPES, FixedSizeCodec, Policy, StoredTensor
from nvflare_rdma.errors import ProtocolError, SourceError
from nvflare_rdma.transfer.files.source import FileIdentity
from nvflare_rdma.transfer.manifest import INLINE_BYTES, MAX_ITEMS, Item
from nvflare_rdma.transfer.pieces import PieceLayout


class Layout:
    """Knows where the parts of a file are, as its sender has described them, and checks that.

    Raises:
        ProtocolError: these items are no parts of that file.
    """

    def __init__(self, identity: FileIdentity, items: Sequence[Item]) -> None:
        self.identity = identity
        for number, item in enumerate(items):
            if not _is_part(identity, number, item):
                how = f", encoded as {item.cut.codec.name}" if item.cut is not None else ""
                raise ProtocolError(
                    f"part {number} of {identity.name} can't be {item.name}, {item.dtype} of shape {item.shape}{how}"
                )
        self._starts = list(accumulate((item.nbytes for item in items), initial=0))
        if self._starts[-1] != identity.size:
            raise ProtocolError(f"parts of {self._starts[-1]} bytes in all are no file of {identity.size}")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def start(self, part: int) -> int:
        """Where a part begins in the file."""
        return self._starts[part]

    def nbytes(self, part: int) -> int:
        """How long a part is in the file."""
        return self._starts[part + 1] - self._starts[part]


def _is_part(identity: FileIdentity, number: int, item: Item) -> bool:
    if item.name != str(number) or len(item.shape) != 1 or item.content is not None:
        return False
    if not 0 < item.nbytes <= identity.part_bytes:
        return False
    if (item.dtype, item.torch, item.cut) == ("uint8", False, None):
        return True
    codec = identity.codec
    if codec is None or item.dtype not in FLOAT_NAMES or not item.torch:
        return False
    return item.cut in (None, PieceLayout.choose(codec, item.shape[0]))


def plan(identity: FileIdentity, tensors: Sequence[StoredTensor] = ()) -> list[tuple[Item, str]]:
    """Plan the parts of a file with these tensors: each part's item, and the name of the tensor whose values it has,
    "" if it has none.

    Tensors of up to `INLINE_BYTES` are not encoded, as in messages, nor are those that would not get smaller.

    Raises:
        SourceError: there are too many parts.
    """
    found, end = list[tuple[Item, str]](), 0

    def add(name: str, dtype: str, n: int, cut: PieceLayout | None) -> None:
        if len(found) == MAX_ITEMS:
            raise SourceError(f"{identity.name} has more than {MAX_ITEMS} parts: send it as it is")
        item = Item(str(len(found)), bool(name), dtype, (n,), None, cut)
        # The few values at the end of a tensor may not get smaller.
        found.append((item if item.sent_nbytes < item.nbytes else replace(item, cut=None), name))

    def add_bytes(nbytes: int) -> None:
        for start in range(0, nbytes, identity.part_bytes):
            add("", "uint8", min(identity.part_bytes, nbytes - start), None)

    for tensor, codec in _encoded(identity, tensors):
        add_bytes(tensor.start - end)
        n, piece = math.prod(tensor.shape), PieceLayout.choose(codec, 0).values
        longest = identity.part_bytes // NUMPY_DTYPES[tensor.dtype].itemsize // piece * piece
        for first in range(0, n, longest):
            values = min(longest, n - first)
            add(tensor.name, tensor.dtype, values, PieceLayout.choose(codec, values))
        end = tensor.start + tensor.nbytes
    add_bytes(identity.size - end)
    return found


def _encoded(identity: FileIdentity, tensors: Sequence[StoredTensor]) -> Iterator[tuple[StoredTensor, FixedSizeCodec]]:
    if identity.codec is None:
        return
    policy = Policy(identity.quantization_type)
    for tensor in tensors:
        codec = policy.decide(tensor.name, tensor.dtype, tensor.shape).codec
        if isinstance(codec, FixedSizeCodec) and tensor.nbytes > INLINE_BYTES:
            yield tensor, codec
