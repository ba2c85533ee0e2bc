"""What a `Service` sends: the items of one message, and where the bytes of each come from."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nvflare_rdma.channel import Source, Take
from nvflare_rdma.codecs import codec_of, is_torch, read_run
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer import manifest
from nvflare_rdma.transfer.arrays import raw_bytes, strided, to_bytes
from nvflare_rdma.transfer.encoding import EncodedChunkCache, EncodedSource
from nvflare_rdma.transfer.manifest import INLINE_BYTES, INLINE_TOTAL, SMALL_TOTAL, Item
from nvflare_rdma.transfer.pieces import piece_layout

log = get_logger(__name__)


class Content(ABC):
    """Knows what one message holds for all its receivers. Several threads call its methods at once."""

    size: tuple[int, int]
    """How many items, and how many bytes of them, are recorded of a receiver that has everything."""

    @property
    def extra(self) -> Mapping[str, Any]:
        """What receivers are told besides the manifest, in msgpack types."""
        return {}

    @abstractmethod
    def items(self, compact: bool = False) -> list[Item]:
        """The items as they would be sent now. `compact` says that the receiver takes content that is encoded.

        Raises:
            RdmaError: they can't be sent.
        """

    @abstractmethod
    def source(self, item: Item) -> Source:
        """The bytes of `item`, encoded as `item.cut` says."""

    @abstractmethod
    def send_exact(self, name: str, reason: str) -> None:
        """Send the item called `name` exact from now on, so in `items`: it can't be encoded, for `reason`."""

    def answer(self, request: Any, receiver: str) -> dict[str, Any] | None:
        """The answer to a request that only this kind of content knows, or that it refuses; None for all others."""
        return None

    def count_marked(self) -> int:
        """How many items are marked to be encoded on their way."""
        return 0


class TensorContent(Content):
    """Sends the tensors of one message.

    Args:
        tensors: FLARE's item id -> tensor. Not changed.
        entries: how many entries are recorded, where not all of them are tensors.
        cache: keeps encoded chunks for other receivers; None for one of its own.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        entries: int | None = None,
        cache: EncodedChunkCache | None = None,
    ) -> None:
        self.size = len(tensors) if entries is None else entries, raw_bytes(tensors)
        self._tensors = dict(tensors)
        self._cache = cache if cache is not None else EncodedChunkCache()
        self._lock = threading.Lock()
        #: Marked tensors that their codec can't carry.
        self._exact: set[str] = set()
        #: The items that receivers are told of, compact or not, and which tensors were exact when these were made.
        self._described: dict[bool, tuple[set[str], list[Item]]] = {}

    def items(self, compact: bool = False) -> list[Item]:
        """See `Content.items`."""
        while True:
            with self._lock:
                exact = set(self._exact)
            known, items = self._described.get(compact, (None, []))
            if known == exact:  # all receivers share one list, and the content in it
                return items
            described = self._describe(exact)
            try:
                items = self._with_encoded_content(described) if compact else _with_content(described, self._tensors)
            except _NotEncodableError as error:
                self.send_exact(error.name, str(error))
            else:
                self._described[compact] = exact, items

    def _with_encoded_content(self, items: list[Item]) -> list[Item]:
        """The items, with the content of the small ones, or of all if they are small together."""
        # What would not get smaller travels exact.
        items = [replace(item, cut=None) if item.sent_nbytes >= item.nbytes else item for item in items]
        small = sum(item.sent_nbytes for item in items) <= SMALL_TOTAL
        found, room = [], INLINE_TOTAL
        for item in items:
            if small or (item.nbytes <= INLINE_BYTES and item.sent_nbytes <= room):
                item = replace(item, content=self._content_of(item))
                room -= item.sent_nbytes
            found.append(item)
        return found

    def _content_of(self, item: Item) -> bytes:
        if not item.nbytes:
            return b""
        source = self.source(item)
        try:
            return bytes(source.read(0, source.nbytes, lambda nbytes: memoryview(bytearray(nbytes))))
        except UnrepresentableError as error:
            raise _NotEncodableError(item.name, str(error)) from error

    def _describe(self, exact: set[str]) -> list[Item]:
        items = manifest.describe(self._tensors)
        cuts = {
            name: piece_layout(tensor, codec_of(tensor)) for name, tensor in self._tensors.items() if name not in exact
        }
        return [item if (cut := cuts.get(item.name)) is None else replace(item, cut=cut) for item in items]

    def source(self, item: Item) -> Source:
        """See `Content.source`."""
        tensor = self._tensors[item.name]
        if item.cut is None:
            return TensorSource(tensor, item.nbytes)
        return EncodedSource(self._cache.encoding(tensor, item.cut))

    def send_exact(self, name: str, reason: str) -> None:
        """See `Content.send_exact`."""
        with self._lock:
            if name not in self._exact:
                log.warning("tensor %s is sent exact: %s", name, reason)
            self._exact.add(name)

    def count_marked(self) -> int:
        """See `Content.count_marked`."""
        return sum(codec_of(tensor) is not None for tensor in self._tensors.values())


def _with_content(items: list[Item], tensors: Mapping[str, Any]) -> list[Item]:
    """The items, the small ones with their content, which is not encoded: so it was before `compact`."""
    found, room = [], INLINE_TOTAL
    for item in items:
        if item.nbytes == 0 or item.nbytes <= min(INLINE_BYTES, room):
            content = bytes(to_bytes(tensors[item.name])) if item.nbytes else b""
            item = replace(item, content=content, cut=None)
            room -= item.nbytes
        found.append(item)
    return found


class _NotEncodableError(UnrepresentableError):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class TensorSource(Source):
    """The bytes of a tensor. Each chunk is a copy if the tensor is on a GPU, or not contiguous."""

    def __init__(self, tensor: Any, nbytes: int) -> None:
        self.nbytes = nbytes
        self._tensor = tensor
        plain = tensor.is_contiguous() and tensor.is_cpu if is_torch(tensor) else tensor.flags.c_contiguous
        self.ready = bool(plain)
        self._bytes = to_bytes(tensor) if plain else None

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        if self._bytes is not None:
            return self._bytes[offset : offset + length]
        tensor = self._tensor
        if is_torch(tensor) and not tensor.is_cpu and not tensor.is_contiguous():
            tensor = self._tensor = tensor.detach().contiguous()  # on its device, once
        width = tensor.element_size() if is_torch(tensor) else tensor.itemsize
        first, last = offset // width, -(-(offset + length) // width)
        copy = take((last - first) * width)
        if is_torch(tensor) and not tensor.is_cpu:
            copy[:] = to_bytes(tensor.detach().reshape(-1)[first:last])
        else:
            array = strided(tensor)
            read_run(array, first, np.frombuffer(copy, array.dtype))
        return copy[offset - first * width :][:length]
