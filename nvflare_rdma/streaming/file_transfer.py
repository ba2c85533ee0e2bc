"""Both halves of a direct file transfer, from disk to disk through slots of the pool.

A file is a message of `serving` whose tensors are its parts (`file_parts`); besides, a receiver may ask for

    digests    those of parts that have come, as the sender has read them
    compare    those of parts that an earlier transfer has left, which the sender reads now
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable, Mapping, Set
from typing import Any

from nvflare_rdma.channel.bodies import Sink
from nvflare_rdma.errors import IntegrityError, ProtocolError, RdmaError
from nvflare_rdma.metrics.transfers import Meter, Meters
from nvflare_rdma.streaming.channels import DataChannels
from nvflare_rdma.streaming.file_parts import BLOCK_BYTES, FileIdentity, OpenFile, PartDigests, PartSource, sources
from nvflare_rdma.streaming.landing import Landings, Place
from nvflare_rdma.streaming.manifest import Item
from nvflare_rdma.streaming.partial_file import PartialFile
from nvflare_rdma.streaming.pulling import AbortedError, LostError, Progress, Pull
from nvflare_rdma.streaming.serving import Service

log = logging.getLogger(__name__)

#: Parts in a request: they are read before it is answered. If that takes too long, they are sent.
_COMPARED = 2


class FileService(Service):
    """For one file and all its receivers."""

    def __init__(
        self, file: OpenFile, channels: Callable[[], DataChannels | None], meters: Meters | None = None
    ) -> None:
        super().__init__(sources(file), channels, meters=meters)
        self._size = 1, file.identity.size
        self._file = file

    def answer(self, request: Any, receiver: str) -> dict[str, Any]:
        """See `Service.answer`."""
        what = request.get("do") if isinstance(request, Mapping) else None
        try:
            if what not in ("done", "give up"):
                self._file.check()
            if what == "digests":
                return {"digests": [part.digests.whole() for part in self._parts(request.get("items"))]}
            if what == "compare":
                return {"digests": [part.digest() for part in self._parts(request.get("items"))[:_COMPARED]]}
        except (RdmaError, OSError) as error:
            log.info("%s is refused: %s", receiver, error)
            return {"refused": str(error)}
        answer = super().answer(request, receiver)
        if "manifest" in answer:
            answer["file"] = self._file.identity.pack()
        return answer

    def _manifest(self, tensors: Mapping[str, Any], exact: set[str]) -> list[Item]:
        return _items(self._file.identity)

    def _parts(self, wanted: Any) -> list[PartSource]:
        tensors = self._tensors
        if tensors is None or not isinstance(wanted, list | tuple) or any(str(n) not in tensors for n in wanted):
            raise ProtocolError("request for digests of what is not being sent")
        return [tensors[str(n)] for n in wanted]


class _Here(Place):
    """Of a part: it is on disk."""

    def write(self, offset: int, data: memoryview) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        pass


_HERE = _Here()


class PartSink(Sink):
    """Writes a part to disk as it comes. ``landed``: told its number and digest."""

    unit = BLOCK_BYTES

    def __init__(
        self, file: PartialFile, number: int, landings: Landings, landed: Callable[[int, bytes], None]
    ) -> None:
        self.nbytes = file.identity.nbytes(number)
        self._file = file
        self._number = number
        self._digests = PartDigests(self.nbytes)
        self._landings = landings
        self._landed = landed

    def put(self, offset: int, chunk: memoryview) -> None:
        self._digests.add(offset, chunk)
        self._file.write(self._number, offset, chunk)

    def done(self) -> None:
        digest = self._digests.whole()
        if digest is None:
            self._landings.lose(self._number, f"part {self._number} came in pieces that can't be verified")
            return
        self._landed(self._number, digest)
        self._landings.came(self._number, _HERE, self.nbytes)

    def failed(self, reason: str) -> None:
        self._landings.lose(self._number, reason)


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
        super().__init__(channels, peer, ask, lambda item: _HERE, aborted, self._check, meter)
        self._expected = expected
        self._folder = folder
        self._path = path
        self._owner = owner
        self._file: PartialFile
        #: Parts that are here, with the digest of what came, and not compared yet.
        self._unchecked: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()

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

    def _receive(self, described: Mapping[str, Any]) -> None:
        identity = FileIdentity.unpack(described.get("file"))
        if identity != self._expected:
            raise ProtocolError(f"{self._peer} announced {self._expected}, but sends {identity}")
        if self.items != _items(identity):
            raise ProtocolError(f"{self._peer} sends other parts than those of {identity}")
        self._file = PartialFile(self._folder, identity, self._owner)
        try:
            self._compare()
            self._landed = dict.fromkeys(self._file.whole, _HERE)
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
        return PartSink(self._file, number, landings, lambda part, digest: self._unchecked.put((part, digest)))

    def _check(self, progress: Progress | None = None) -> None:
        """Compare what has come with what the sender has read."""
        came: dict[int, bytes] = {}
        while not self._unchecked.empty():
            part, digest = self._unchecked.get()
            came[part] = digest
        if not came:
            return
        try:
            theirs = self._digests("digests", list(came))
        except LostError:
            if progress is None:
                raise
            for entry in came.items():  # later
                self._unchecked.put(entry)
            return
        for (part, digest), read in zip(came.items(), theirs, strict=True):
            if read != digest:
                raise IntegrityError(
                    f"part {part} of {self._expected.name} differs from what {self._peer} has read: digest "
                    f"{digest.hex()}, {read.hex() if isinstance(read, bytes) else read} there"
                )
            self._file.add(part, digest)


def _items(identity: FileIdentity) -> list[Item]:
    return [Item(str(part), False, "uint8", (identity.nbytes(part),)) for part in range(identity.parts)]
