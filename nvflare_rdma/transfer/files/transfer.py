"""Both halves of a direct file transfer, from disk to disk through slots of the pool.

A file is a message of `serving` whose tensors are its parts (`file_layout`); besides, a receiver may ask for

    digests    those of parts that have come, as the sender has read them
    compare    those of parts that an earlier transfer has left, which the sender reads now
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable, Mapping, Set
from typing import Any

from nvflare_rdma.channel import Sink
from nvflare_rdma.errors import IntegrityError, ProtocolError, RdmaError, UnrepresentableError
from nvflare_rdma.transfer.files.layout import Layout, plan
from nvflare_rdma.transfer.files.partial_file import PartialFile
from nvflare_rdma.transfer.files.parts import HERE, FilePart, PartSink, PartSource
from nvflare_rdma.transfer.files.source import FileIdentity, OpenFile
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.peers import DataChannels
from nvflare_rdma.transfer.receiver import AbortedError, LostError, Progress, Pull
from nvflare_rdma.transfer.records import Meter, Meters
from nvflare_rdma.transfer.service import Service
from nvflare_rdma.transfer.sinks import Landings

log = logging.getLogger(__name__)

#: Parts in a request: they are read before it is answered. If that takes too long, they are sent.
_COMPARED = 2


class FileService(Service):
    """For one file and all its receivers."""

    def __init__(
        self, file: OpenFile, channels: Callable[[], DataChannels | None], meters: Meters | None = None
    ) -> None:
        super().__init__(_parts(file), channels, meters=meters)
        self._size = 1, file.identity.size
        self._file = file

    def answer(self, request: Any, receiver: str) -> dict[str, Any]:
        """See `Service.answer`."""
        what = request.get("do") if isinstance(request, Mapping) else None
        try:
            if what not in ("done", "give up"):
                self._file.check()
            if what == "digests":
                parts = self._wanted(request.get("items"))
                return {"digests": [part.current().digests.whole() for part in parts]}
            if what == "compare":
                return {"digests": [self._digest(part) for part in self._wanted(request.get("items"))[:_COMPARED]]}
        except (RdmaError, OSError) as error:
            log.info("%s is refused: %s", receiver, error)
            return {"refused": str(error)}
        answer = super().answer(request, receiver)
        if "manifest" in answer:
            answer["file"] = self._file.identity.pack()
        return answer

    def _digest(self, part: FilePart) -> bytes:
        with contextlib.suppress(UnrepresentableError):
            return part.current().digest()
        return part.source(True).digest()

    def _send_exact(self, name: str, reason: str) -> None:
        """The part knows it, and had to before its receiver could ask again."""

    def _manifest(self, tensors: Mapping[str, Any], exact: set[str]) -> list[Item]:
        return [self._item(part) for part in tensors.values()]

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

    def _body(self, item: Item, tensors: Mapping[str, Any]) -> PartSource:
        part: FilePart = tensors[item.name]
        return part.source(item.cut is None)

    def _wanted(self, numbers: Any) -> list[FilePart]:
        tensors = self._tensors
        if tensors is None or not isinstance(numbers, list | tuple) or any(str(n) not in tensors for n in numbers):
            raise ProtocolError("request for digests of what is not being sent")
        return [tensors[str(n)] for n in numbers]


def _parts(file: OpenFile) -> dict[str, FilePart]:
    planned = plan(file.identity, file.tensors)
    layout = Layout(file.identity, [item for item, _ in planned])
    return {item.name: FilePart(file, layout.start(n), item, name) for n, (item, name) in enumerate(planned)}


def pull_file(
    channels: DataChannels,
    peer: str,
    ask: Callable[[dict[str, Any]], Any],
    expected: FileIdentity,
    folder: str,
    path: str,
    owner: str,
    aborted: Callable[[], bool] = lambda: False,
    meter: Meter | None = None,
) -> None:
    """The file that ``peer`` holds, which is to be the ``expected`` one, as ``path`` in ``folder``, where ``owner``
    (a site) may have a part of it already.

    What came is kept in ``folder`` for another attempt if this one fails, unless the disk is the reason.

    Raises:
        AbortedError: ``aborted`` said so. StorageError: the disk is full, or refuses it. IntegrityError: what came is
        not what was read. RdmaError: there is no direct way, or the transfer failed.
    """
    meter = meter or Meter("received", channels.name, peer, "file")
    _FilePull(channels, peer, ask, expected, folder, path, owner, aborted, meter).receive()


class _FilePull(Pull):
    def __init__(
        self,
        channels: DataChannels,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        expected: FileIdentity,
        folder: str,
        path: str,
        owner: str,
        aborted: Callable[[], bool],
        meter: Meter,
    ) -> None:
        super().__init__(channels, peer, ask, lambda item: HERE, aborted, self._check, meter)
        self._expected = expected
        self._folder = folder
        self._path = path
        self._owner = owner
        self._layout: Layout
        self._file: PartialFile
        #: Parts that are here, with digests of what came and of what was written, and not compared yet.
        self._unchecked: queue.SimpleQueue[tuple[int, bytes, bytes]] = queue.SimpleQueue()

    def receive(self) -> None:
        """See `pull_file`."""
        try:
            self._receive(self._describe())
        except Exception:
            with contextlib.suppress(Exception):  # the error is told as it is
                self._ask_peer({"do": "give up"})
            raise
        with contextlib.suppress(RdmaError):  # it is here, whoever knows
            self._ask({"do": "done"})

    def _describe(self) -> Mapping[str, Any]:
        described = super()._describe()
        identity = FileIdentity.unpack(described.get("file"))
        if identity != self._expected:
            raise ProtocolError(f"{self._peer} announced {self._expected}, but sends {identity}")
        self._layout = Layout(identity, self.items)
        return described

    def _receive(self, described: Mapping[str, Any]) -> None:
        self._file = PartialFile(self._folder, self._layout, self._owner)
        try:
            self._compare()
            self._landed = dict.fromkeys(self._file.whole, HERE)
            self._land(described)
            if self._aborted():
                raise AbortedError(f"the transfer from {self._peer} was aborted")
            self._file.finish(self._path)
        finally:
            self._file.keep()

    def _compare(self) -> None:
        """Keep of what was here those parts that the sender has, too: its file may be another than it looks."""
        ours, theirs = self._file.digests(), dict[int, Any]()
        parts = sorted(ours)
        try:
            for start in range(0, len(parts), _COMPARED):
                if self._aborted():
                    raise AbortedError(f"the transfer from {self._peer} was aborted")
                asked = parts[start : start + _COMPARED]
                theirs |= zip(asked, self._digests("compare", asked), strict=True)
        except LostError as error:
            log.info("%s: %s", self._peer, error)
        wrong = [part for part in parts if theirs.get(part) != ours[part]]
        if wrong:
            log.warning("%s: %d parts of those here will be sent again", self._expected.name, len(wrong))
        for part in wrong:
            self._file.drop(part)

    def _digests(self, what: str, parts: list[int]) -> list[Any] | tuple[Any, ...]:
        found = self._ask({"do": what, "items": parts}).get("digests")
        if not isinstance(found, list | tuple) or len(found) != len(parts):
            raise ProtocolError(f"{self._peer} answered with no digests")
        return found

    def _attempt(self, missing: Set[int], described: Mapping[str, Any]) -> str:
        reason = super()._attempt(missing, described)
        if self._file.error is not None:
            raise self._file.error
        self._check()
        return reason

    def _sink(self, number: int, landings: Landings) -> Sink:
        budget = self._channels.budget.limit
        return PartSink(self._file, self.items[number], landings, lambda *landed: self._unchecked.put(landed), budget)

    def _check(self, progress: Progress | None = None) -> None:
        """Compare what has come with what the sender has read."""
        came: dict[int, tuple[bytes, bytes]] = {}
        while not self._unchecked.empty():
            part, digest, kept = self._unchecked.get()
            came[part] = digest, kept
        if not came:
            return
        try:
            theirs = self._digests("digests", list(came))
        except LostError:
            if progress is None:
                raise
            for part, digests in came.items():  # later
                self._unchecked.put((part, *digests))
            return
        for (part, (digest, kept)), read in zip(came.items(), theirs, strict=True):
            if read != digest:
                raise IntegrityError(
                    f"part {part} of {self._expected.name} differs from what {self._peer} has read: digest "
                    f"{digest.hex()}, {read.hex() if isinstance(read, bytes) else read} there"
                )
            self._file.add(part, digest, kept)
