"""Reads parts of a file, and encodes them, as they are sent; decodes and writes them as they come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nvflare_rdma.channel import MAX_UNIT_BYTES, Sink, Source, Take
from nvflare_rdma.codecs import NUMPY_DTYPES, RelativeError, SampledLoss
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.transfer.encoding import Scratch, decode_pieces, pieces_in, thread_scratch
from nvflare_rdma.transfer.files.layout import Layout, plan
from nvflare_rdma.transfer.files.partial_file import PartialFile
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, OpenFile, PartDigests, codec_for_files
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.sinks import Arrivals

#: Large chunks are asked for if so many of them fit into the budget.
_ROOMY = 4


@dataclass(frozen=True, slots=True)
class OfTensor:
    """Says of which tensor a part has values: its name, "" if of none; which of them is the first, and what is known of
    what the tensor loses, None if it is not encoded."""

    name: str = ""
    first: int = 0
    loss: SampledLoss | None = None


class PartSource(Source):
    """Reads one part of a file, which begins at `start` there. `digests` has those of what was sent."""

    ready = False
    unrepresentable: str = ""

    def __init__(self, file: OpenFile, start: int, item: Item, of: OfTensor) -> None:
        self._of = of
        self.nbytes = item.sent_nbytes
        self._file = file
        self._start = start
        self._item = item
        self.digests = PartDigests(self.nbytes, item.cut.unit if item.cut is not None else BLOCK_BYTES)

    def digest(self) -> bytes:
        """The digest of the part, which is read for it if it was not read yet.

        Raises:
            SourceError: it can't be read, or has changed. UnrepresentableError: it can't be encoded.
        """
        cut = self._item.cut
        step = min(self.nbytes, cut.unit if cut is not None else BLOCK_BYTES)
        block = memoryview(bytearray(step))
        # Not the thread's scratch memory: many threads answer requests, and each would keep it.
        room = memoryview(bytearray(0 if cut is None else cut.values * NUMPY_DTYPES[self._item.dtype].itemsize))
        while (digest := self.digests.whole()) is None:
            for offset in range(0, self.nbytes, step):
                self._fill(offset, block[: self.nbytes - offset], lambda nbytes: room)
        return digest

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        slot = take(length)
        self._fill(offset, slot, thread_scratch)
        return slot

    def _fill(self, offset: int, out: memoryview, scratch: Scratch) -> None:
        cut = self._item.cut
        if cut is None:
            self._file.read_into(out, self._start + offset)
        else:
            for piece in pieces_in(cut, self._item.dtype, offset, out):
                values = piece.room(scratch)
                self._file.read_into(values, self._start + piece.start)
                try:
                    piece.encode(values)
                except UnrepresentableError as error:
                    self.unrepresentable = str(error)
                    if self._of.loss is not None:  # what was noted of the pieces before is not sent so
                        self._of.loss.leave_out(self._of.first, self._item.shape[0])
                    raise
                if (loss := self._of.loss) is not None:
                    loss.note(self._of.first + piece.first, np.frombuffer(values, piece.dtype))
        if not self.digests.add(offset, out):
            raise self._file.failure("changed while it was sent: it reads differently the second time")


class FilePart:
    """A part for all its receivers."""

    def __init__(self, file: OpenFile, start: int, item: Item, of: OfTensor) -> None:
        self.tensor = of.name
        self._loss = of.loss
        self.item = item
        self.exact_item = Item(item.name, item.torch, item.dtype, item.shape)
        self._exact = PartSource(file, start, self.exact_item, of)
        self._encoded = PartSource(file, start, item, of) if item.cut is not None else self._exact

    @property
    def unrepresentable(self) -> str:
        """Why it has to travel exact; "" as long as nothing that was read says so."""
        return self._encoded.unrepresentable

    @property
    def error(self) -> RelativeError | None:
        """The relative error of the tensor whose values it has, as far as it was encoded; None if that is unknown."""
        return self._loss.error if self._loss is not None else None

    def source(self, exact: bool) -> PartSource:
        """The source of the part, exact or encoded, with the digests of what it has sent."""
        return self._exact if exact else self._encoded

    def current(self) -> PartSource:
        """The source that is sent, as far as is known now."""
        return self.source(bool(self.unrepresentable))


def parts_of(file: OpenFile) -> dict[str, FilePart]:
    """The parts of a file, by the names of their items."""
    planned = plan(file.identity, file.tensors)
    layout = Layout(file.identity, [item for item, _ in planned])
    counts = {tensor.name: math.prod(tensor.shape) for tensor in file.tensors}
    losses: dict[str, SampledLoss] = {}
    firsts: Counter[str] = Counter()
    parts = {}
    for n, (item, name) in enumerate(planned):
        if name and name not in losses:
            losses[name] = SampledLoss(codec_for_files(file.identity.quantization_type), counts[name])
        of = OfTensor(name, firsts[name], losses[name]) if name else OfTensor()
        firsts[name] += item.shape[0]
        parts[item.name] = FilePart(file, layout.start(n), item, of)
    return parts


class PartSink(Sink):
    """Writes a part to disk as it comes.

    Args:
        whole: called with the part's number, and the digests of what came and of what is kept.
        budget: bytes that chunks may take, of this part and all else that comes.
    """

    def __init__(
        self,
        file: PartialFile,
        item: Item,
        arrivals: Arrivals,
        whole: Callable[[int, bytes, bytes], None],
        budget: int,
    ) -> None:
        cut = item.cut
        self.nbytes = item.sent_nbytes
        # Small chunks cost time, and save memory that matters only where there is little.
        unit = MAX_UNIT_BYTES if budget >= _ROOMY * MAX_UNIT_BYTES else BLOCK_BYTES
        self.unit = cut.unit if cut is not None else unit
        self._file = file
        self._item = item
        self._number = int(item.name)
        self._kept = PartDigests(item.nbytes)
        self._came = PartDigests(self.nbytes, cut.unit) if cut is not None else self._kept
        self._arrivals = arrivals
        self._whole = whole

    def put(self, offset: int, chunk: memoryview) -> None:
        """See `Sink.put`."""
        self._came.add(offset, chunk)
        cut = self._item.cut
        if cut is None:
            self._file.write(self._number, offset, chunk)
            return
        for start, values in decode_pieces(cut, self._item.dtype, offset, chunk):
            self._kept.add(start, values)
            self._file.write(self._number, start, values)

    def done(self) -> None:
        """See `Sink.done`."""
        came, kept = self._came.whole(), self._kept.whole()
        if came is None or kept is None:
            self._arrivals.lose(self._number, f"part {self._number} came in pieces that can't be verified")
            return
        self._whole(self._number, came, kept)
        self._arrivals.came(self._number, self.nbytes)

    def failed(self, reason: str) -> None:
        """See `Sink.failed`."""
        self._arrivals.lose(self._number, reason)
