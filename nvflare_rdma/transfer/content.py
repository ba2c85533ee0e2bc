"""What a `Service` sends: the items of one message, and where the bytes of each come from."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nvflare_rdma.channel import Source
from nvflare_rdma.codecs import codec_of
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer import manifest
from nvflare_rdma.transfer.arrays import raw_bytes, to_bytes
from nvflare_rdma.transfer.bundles import Bundle, TensorSource
from nvflare_rdma.transfer.encoding import EncodedChunkCache, SharedSource
from nvflare_rdma.transfer.manifest import INLINE_BYTES, INLINE_TOTAL, SMALL_TOTAL, Item
from nvflare_rdma.transfer.pieces import piece_layout
from nvflare_rdma.transfer.receipt import Receipt, Receipts

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
    def send_exact(self, item: Item, reason: str) -> None:
        """Send `item` exact from now on, so in `items`: it can't be encoded, for `reason`. Of a bundle, the source has
        said which member that is about."""

    def answer(self, request: Any, receiver: str) -> dict[str, Any] | None:
        """The answer to a request that only this kind of content knows, or that it refuses; None for all others."""
        return None

    def count_marked(self) -> int:
        """How many items are marked to be encoded on their way."""
        return 0

    def receipt(self, items: Sequence[Item] | None) -> Receipt | None:
        """What to record of a receiver that has got these items or, if that is None, the tensors as FLARE sends them.
        None if nothing is encoded."""
        return None


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
        self._groups: list[Item] | None = None
        self._bundles: weakref.WeakValueDictionary[str, Bundle] = weakref.WeakValueDictionary()
        self._receipts = Receipts(self._tensors)
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
                self._note_exact(error.name, str(error))
            else:
                self._receipts.prepare((tensor for item in items for tensor in item.tensors), self._tensors)
                self._described[compact] = exact, items

    def _with_encoded_content(self, items: list[Item]) -> list[Item]:
        """The items, with their content if they are small together, else the small ones bundled."""
        items = list(map(_compact, items))
        if sum(item.sent_nbytes for item in items) <= SMALL_TOTAL:
            return [replace(item, content=self._content_of(item)) for item in items]
        if self._groups is None:  # the same ever after: receivers that ask again have some of them
            all_encoded = list(map(_compact, self._describe(set()))) if self._exact else items
            self._groups = manifest.bundled(all_encoded)
        now = {item.name: item for item in items}
        return [
            Item.bundle([now[member.name] for member in each.members]) if each.members else now[each.name]
            for each in self._groups
        ]

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
        if item.members:
            return SharedSource(self._bundle(item))
        tensor = self._tensors[item.name]
        if item.cut is None:
            return TensorSource(tensor, item.nbytes)
        return SharedSource(self._cache.encoding(tensor, item.cut))

    def _bundle(self, item: Item) -> Bundle:
        """The bundle that its receivers share while one of them is sent it."""
        with self._lock:
            found = self._bundles.get(item.name)
            if found is None or found.item != item:
                tensors = [self._tensors[member.name] for member in item.members]
                found = self._bundles[item.name] = Bundle(item, tensors, self._cache, self._note_exact)
            return found

    def send_exact(self, item: Item, reason: str) -> None:
        """See `Content.send_exact`."""
        if not item.members:
            self._note_exact(item.name, reason)

    def _note_exact(self, name: str, reason: str) -> None:
        with self._lock:
            if name not in self._exact:
                log.warning("tensor %s is sent exact: %s", name, reason)
            self._exact.add(name)

    def receipt(self, items: Sequence[Item] | None) -> Receipt | None:
        """See `Content.receipt`."""
        sent = None if items is None else [tensor for item in items for tensor in item.tensors]
        return self._receipts.make(sent, self._tensors)

    def count_marked(self) -> int:
        """See `Content.count_marked`."""
        return sum(codec_of(tensor) is not None for tensor in self._tensors.values())


def _compact(item: Item) -> Item:
    """The item, exact if it would not get smaller, and with its content if that is nothing."""
    cut = item.cut if item.sent_nbytes < item.nbytes else None
    return replace(item, cut=cut, content=None if item.nbytes else b"")


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
