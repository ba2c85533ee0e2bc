"""What a file transfer adds to `Service` and `Pull`: a content and a destination, from disk to disk through slots of
the pool."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.channel import Sink
from nvflare_rdma.errors import IntegrityError, ProtocolError, RdmaError, TransferError, UnrepresentableError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.addresses import site_of
from nvflare_rdma.transfer.content import Content
from nvflare_rdma.transfer.files.layout import Layout
from nvflare_rdma.transfer.files.partial_file import PartialFile, is_begun
from nvflare_rdma.transfer.files.parts import FilePart, PartSink, PartSource, parts_of
from nvflare_rdma.transfer.files.receipt import receipt_of
from nvflare_rdma.transfer.files.source import FileIdentity, OpenFile
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.peers import PeerLinks
from nvflare_rdma.transfer.receipt import Receipt
from nvflare_rdma.transfer.receiver import AbortedError, LostError, Pull, ask_for
from nvflare_rdma.transfer.records import Meter
from nvflare_rdma.transfer.sinks import Arrivals, Destination

log = get_logger(__name__)

#: How many parts are compared in a request: they are read before it is answered. If that takes too long, they are sent.
_COMPARED = 2


class FileContent(Content):
    """Sends the parts of one file to all its receivers."""

    def __init__(self, file: OpenFile) -> None:
        self.size = 1, file.identity.size
        self.parts = parts_of(file)
        self._file = file
        self._lock = threading.Lock()
        #: Names of parts of which it is logged that they are sent exact.
        self._exact: set[str] = set()
        #: Sites for which parts are being read.
        self._comparing: set[str] = set()

    @property
    def extra(self) -> Mapping[str, Any]:
        """See `Content.extra`."""
        return {"file": self._file.identity.pack()}

    def items(self, compact: bool = False) -> list[Item]:
        """See `Content.items`."""
        return [self._item(part) for part in self.parts.values()]

    def _item(self, part: FilePart) -> Item:
        if not part.unrepresentable:
            return part.item
        with self._lock:
            known = part.item.name in self._exact
            self._exact.add(part.item.name)
        if not known:
            what = f"{part.item.shape[0]} values of tensor {part.tensor}"
            log.warning("%s: %s are sent exact: %s", self._file.identity.name, what, part.unrepresentable)
        return part.exact_item

    def source(self, item: Item) -> PartSource:
        """See `Content.source`."""
        return self.parts[item.name].source(item.cut is None)

    def send_exact(self, item: Item, reason: str) -> None:
        """Do nothing: the part knows it, and had to before its receiver could ask again."""

    def receipt(self, items: Sequence[Item] | None) -> Receipt | None:
        """See `Content.receipt`."""
        return None if items is None else receipt_of(self._file, self.parts, items)

    def answer(self, request: Any, receiver: str) -> dict[str, Any] | None:
        """See `Content.answer`."""
        what = request.get("do") if isinstance(request, Mapping) else None
        try:
            if what not in ("done", "give up"):
                self._file.check()
            if what == "digests":
                parts = self._wanted(request.get("items"))
                return {"digests": [part.current().digests.whole() for part in parts]}
            if what == "compare":
                return {"digests": self._compare(self._wanted(request.get("items"))[:_COMPARED], site_of(receiver))}
        except (RdmaError, OSError) as error:
            log.info("the request of %s for a file was refused: %s", receiver, error)
            return {"refused": str(error)}
        return None

    def _compare(self, parts: list[FilePart], site: str) -> list[bytes]:
        """Read what is on disk: one request of a site at a time, as this is a thread that others need."""
        with self._lock:
            if site in self._comparing:
                raise TransferError("the last request for digests is still being answered")
            self._comparing.add(site)
        try:
            return [self._digest(part) for part in parts]
        finally:
            with self._lock:
                self._comparing.discard(site)

    def _digest(self, part: FilePart) -> bytes:
        with contextlib.suppress(UnrepresentableError):
            return part.current().digest()
        return part.source(True).digest()

    def _wanted(self, numbers: Any) -> list[FilePart]:
        if not isinstance(numbers, list | tuple) or any(str(n) not in self.parts for n in numbers):
            raise ProtocolError("request for digests of what is not being sent")
        return [self.parts[str(n)] for n in numbers]


@dataclass(frozen=True, slots=True)
class FileTarget:
    """What file is to be received, and where it is put.

    Args:
        expected: which file it has to be.
        folder: where it is received.
        path: its name when it is whole, in `folder`.
        owner: the site that receives it, and may have a part of it in `folder` already.
        sender: the site that sends it: what came from another one is not gone on with.
    """

    expected: FileIdentity
    folder: str
    path: str
    owner: str
    sender: str


def pull_file(
    links: PeerLinks,
    peer: str,
    ask: Callable[[dict[str, Any]], Any],
    target: FileTarget,
    aborted: Callable[[], bool] = lambda: False,
    meter: Meter | None = None,
) -> None:
    """Receive the file that `peer` holds.

    What came is kept in the target's folder for another attempt if this one fails, unless the disk is the reason.

    Raises:
        AbortedError: `aborted` said so. StorageError: the disk is full, or refuses it. IntegrityError: what came is
        not what was read. RdmaError: there is no direct way, or the transfer failed.
    """
    meter = meter or Meter("received", links.name, peer, "file", links.ledger)
    destination = FileDestination(target, peer, ask, links.budget.limit, aborted)
    Pull(links, peer, ask, destination, aborted, lambda done: None, meter).run()


class FileDestination(Destination):
    """A `PartialFile` that gets its name when all of its parts are here and have the sender's digests.

    Args:
        ask: sends requests to `peer`, for its digests.
        budget: bytes that chunks may take, of this file and all else that comes.
        aborted: whether to stop.
    """

    durable = True

    @property
    def begun(self) -> bool:
        """See `Destination.begun`."""
        target = self._target
        return is_begun(target.folder, target.expected, target.owner, target.sender)

    def __init__(
        self,
        target: FileTarget,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        budget: int,
        aborted: Callable[[], bool],
    ) -> None:
        self._target = target
        self._peer = peer
        self._ask = ask
        self._budget = budget
        self._aborted = aborted
        self._items: list[Item] = []
        self._layout: Layout
        self._opened: PartialFile | None = None
        #: Parts that are here, with digests of what came and of what was written, and not compared yet.
        self._unchecked: queue.SimpleQueue[tuple[int, bytes, bytes]] = queue.SimpleQueue()

    def accept(self, items: list[Item], described: Mapping[str, Any]) -> None:
        """See `Destination.accept`."""
        identity = FileIdentity.unpack(described.get("file"))
        if identity != self._target.expected:
            raise ProtocolError(f"{self._peer} announced {self._target.expected}, but sends {identity}")
        self._items, self._layout = items, Layout(identity, items)

    def begin(self) -> Set[int]:
        """See `Destination.begin`."""
        self._opened = PartialFile(self._target.folder, self._layout, self._target.owner, self._target.sender)
        self._compare()
        return self._file.whole

    @property
    def _file(self) -> PartialFile:
        assert self._opened is not None
        return self._opened

    def sink(self, number: int, arrivals: Arrivals, start: int) -> Sink:
        """See `Destination.sink`."""
        landed = self._unchecked.put
        return PartSink(self._file, self._items[number], arrivals, lambda *part: landed(part), self._budget)

    def check(self, attempt_is_over: bool) -> None:
        """See `Destination.check`."""
        if attempt_is_over and self._file.error is not None:
            raise self._file.error
        self._check_digests(attempt_is_over)

    def finish(self) -> None:
        """See `Destination.finish`."""
        self._raise_if_aborted()
        self._file.finish(self._target.path)

    def close(self) -> None:
        """See `Destination.close`."""
        if self._opened is not None:
            self._opened.keep()

    def _raise_if_aborted(self) -> None:
        if self._aborted():
            raise AbortedError(f"the transfer from {self._peer} was aborted")

    def _compare(self) -> None:
        """Keep of what was here those parts that the sender has, too: its file may be another than it looks."""
        ours, theirs = self._file.digests(), dict[int, Any]()
        parts = sorted(ours)
        try:
            for start in range(0, len(parts), _COMPARED):
                self._raise_if_aborted()
                asked = parts[start : start + _COMPARED]
                theirs |= zip(asked, self._digests("compare", asked), strict=True)
        except TransferError as error:
            log.info("some parts that are here could not be compared: %s", error)
        wrong = [part for part in parts if theirs.get(part) != ours[part]]
        if wrong:
            name = self._target.expected.name
            log.warning(
                "%s: %d of the parts that are here will be sent again: the sender did not confirm them",
                name,
                len(wrong),
            )
        for part in wrong:
            self._file.drop(part)

    def _digests(self, what: str, parts: list[int]) -> list[Any] | tuple[Any, ...]:
        found = ask_for(self._ask, {"do": what, "items": parts}).get("digests")
        if not isinstance(found, list | tuple) or len(found) != len(parts):
            raise ProtocolError(f"{self._peer} answered with no digests")
        return found

    def _check_digests(self, all_of_them: bool) -> None:
        """Compare what has come with what the sender has read; later, if it does not answer and there is time."""
        came: dict[int, tuple[bytes, bytes]] = {}
        while not self._unchecked.empty():
            part, digest, kept = self._unchecked.get()
            came[part] = digest, kept
        if not came:
            return
        try:
            theirs = self._digests("digests", list(came))
        except LostError:
            if all_of_them:
                raise
            for part, digests in came.items():
                self._unchecked.put((part, *digests))
            return
        for (part, (digest, kept)), read in zip(came.items(), theirs, strict=True):
            if read != digest:
                raise IntegrityError(
                    f"part {part} of {self._target.expected.name} differs from what {self._peer} has read: digest "
                    f"{digest.hex()}, {read.hex() if isinstance(read, bytes) else read} there"
                )
            self._file.add(part, digest, kept)
