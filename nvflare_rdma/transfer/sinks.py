"""Where received items go: each tensor into memory of its own, or into a file."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeAlias

from nvflare_rdma.channel import Sink
from nvflare_rdma.codecs import is_storable, is_tensor, make_header, note_decoded
from nvflare_rdma.transfer.arrays import from_bytes
from nvflare_rdma.transfer.disk import write_at
from nvflare_rdma.transfer.encoding import decode_pieces
from nvflare_rdma.transfer.manifest import Item

Land: TypeAlias = "Callable[[Item], Place]"


class Place(ABC):
    """Where one tensor is stored. If `memory` is set, its bytes are received straight into it; otherwise they are
    passed to `write`."""

    memory: memoryview | None = None
    encoded = False
    """Whether the bytes of an encoded tensor are stored as they come, and `memory` is for those."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Store bytes of the tensor. Several threads call this at once, and perhaps with the same bytes twice.

        Raises:
            OSError: they can't be stored.
        """

    @abstractmethod
    def finish(self) -> Any:
        """Give what the receiver gets, when every byte is stored.

        Raises:
            ProtocolError: no tensor can be made of them. OSError: they can't be stored.
        """


class InMemory(Place):
    """Gives the tensor. `memory` is as large as the tensor, and used by nobody else."""

    def __init__(self, item: Item, memory: memoryview) -> None:
        self.memory: memoryview = memory
        self._item = item

    def write(self, offset: int, data: memoryview) -> None:
        """See `Place.write`."""
        self.memory[offset : offset + len(data)] = data

    def finish(self) -> Any:
        """See `Place.finish`."""
        return from_bytes(self._item, self.memory)


class EncodedInMemory(InMemory):
    """Keeps an encoded tensor as it comes, and gives what `make` makes of it. What has come is whole: its size follows
    from the tensor's, and all bytes of that size decode to something."""

    encoded = True

    def __init__(self, item: Item, memory: memoryview, make: Callable[[Item, memoryview], Any]) -> None:
        super().__init__(item, memory)
        self._make = make

    def finish(self) -> Any:
        """See `Place.finish`."""
        return self._make(self._item, self.memory)


def in_memory(allocate: Callable[[int], memoryview]) -> Land:
    """Store tensors in memory that `allocate` gives."""
    return lambda item: InMemory(item, allocate(item.nbytes))


class OnDisk(Place):
    """Gives the path of a safetensors file that has only this tensor, and the tensor's name in it.

    Raises:
        OSError: it can't be written; a full disk is seen before anything is, where the file system can tell.
    """

    def __init__(self, item: Item, path: str) -> None:
        self.path = path
        self._name = item.name
        header = make_header(item.name, item.dtype, item.shape, item.nbytes)
        self._start = len(header)
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._abandon = weakref.finalize(self, _abandon, os.getpid(), self._fd, path)
        os.pwrite(self._fd, header, 0)
        self._nbytes = item.nbytes
        self._allocating = threading.Lock()
        self._allocated = not item.nbytes

    @staticmethod
    def takes(item: Item) -> bool:
        """Whether a safetensors file can have the tensor."""
        return item.torch and is_storable(item.name, item.dtype)

    def write(self, offset: int, data: memoryview) -> None:
        """See `Place.write`."""
        with self._allocating:  # when something comes, and not because a peer has announced it
            if not self._allocated:
                os.posix_fallocate(self._fd, self._start, self._nbytes)
                self._allocated = True
        write_at(self._fd, data, self._start + offset)

    def finish(self) -> Any:
        """See `Place.finish`."""
        if self._abandon.detach():
            os.close(self._fd)
        return self.path, self._name


def _abandon(process: int, fd: int, path: str) -> None:
    if process != os.getpid():
        return  # a forked process ends, and the file is its parent's
    os.close(fd)
    with contextlib.suppress(OSError):
        os.unlink(path)


class Arrivals:
    """Keeps what is still to come in one attempt of a `Pull`, and what has come."""

    def __init__(self, numbers: set[int]) -> None:
        self.changed = threading.Condition()
        self.whole: set[int] = set()
        self.nbytes = 0
        self.open = numbers
        self.failure = ""
        """Why no more items will come."""
        self.lost = ""
        """Why one of them did not come."""

    def fail(self, reason: str) -> None:
        """Note that no more items will come. The first reason counts."""
        with self.changed:
            self.failure = self.failure or reason
            self.changed.notify_all()

    def came(self, number: int, nbytes: int) -> None:
        """Note that an item is whole, of which `nbytes` were sent."""
        with self.changed:
            self.open.discard(number)
            self.whole.add(number)
            self.nbytes += nbytes
            self._tell_if_over()

    def lose(self, number: int, reason: str) -> None:
        """Note that an item will not come in this attempt."""
        with self.changed:
            self.open.discard(number)
            self.lost = self.lost or reason
            self._tell_if_over()

    def _tell_if_over(self) -> None:
        """Wake who waits, once: waking it for each item takes this interpreter's time from those who receive."""
        if not self.open:
            self.changed.notify_all()


class TensorSink(Sink):
    """Receives one tensor into `place`, from `start` bytes of its message on: those before have landed already. `whole`
    is called with its name and the place when all of it is there."""

    def __init__(
        self,
        number: int,
        item: Item,
        place: Place,
        arrivals: Arrivals,
        whole: Callable[[str, Place], object],
        start: int = 0,
    ) -> None:
        self._number = number
        self._arrivals = arrivals
        self._whole = whole
        self._start = start
        self._landed = Beginning(start)
        self.item = item
        self.place = place
        self.nbytes = item.sent_nbytes - start
        self.unit = item.unit

    @property
    def held(self) -> int:
        """How many bytes of the message have landed before the first that has not, in whole units."""
        return self._landed.nbytes - self._landed.nbytes % self.unit

    @property
    def buffer(self) -> memoryview | None:
        """See `Sink.buffer`."""
        memory = self.place.memory if self.item.cut is None or self.place.encoded else None
        return memory if memory is None else memory[self._start :]

    def put(self, offset: int, chunk: memoryview) -> None:
        """See `Sink.put`."""
        store_chunk(self.item, self.place, self._start + offset, chunk)
        self.landed(offset, len(chunk))

    def landed(self, offset: int, length: int) -> None:
        """See `Sink.landed`."""
        self._landed.add(self._start + offset, length)

    def done(self) -> None:
        """See `Sink.done`."""
        self._whole(self.item.name, self.place)
        self._arrivals.came(self._number, self.nbytes)

    def failed(self, reason: str) -> None:
        """See `Sink.failed`."""
        self._arrivals.lose(self._number, reason)


class BundleSink(Sink):
    """Receives a bundle, the members into `places`. `whole` is called with the place of each, by its name."""

    held = 0
    """See `TensorSink.held`: a bundle comes whole, or not at all."""

    def __init__(
        self,
        number: int,
        item: Item,
        places: Sequence[Place],
        arrivals: Arrivals,
        whole: Callable[[str, Place], object],
    ) -> None:
        self._number = number
        self._arrivals = arrivals
        self._whole = whole
        self._places = places
        self.item = item
        self.nbytes, self.unit = item.nbytes, item.unit

    def put(self, offset: int, chunk: memoryview) -> None:
        """See `Sink.put`."""
        end = 0
        for member, place in zip(self.item.members, self._places, strict=True):
            start, end = end, end + member.sent_nbytes
            store_chunk(member, place, 0, chunk[start:end])

    def done(self) -> None:
        """See `Sink.done`."""
        for member, place in zip(self.item.members, self._places, strict=True):
            self._whole(member.name, place)
        self._arrivals.came(self._number, self.nbytes)

    def failed(self, reason: str) -> None:
        """See `Sink.failed`."""
        self._arrivals.lose(self._number, reason)


class Beginning:
    """How much of a message is there without a gap, from its beginning; any number of threads may add to it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._lock = threading.Lock()
        #: What is there beyond a gap, by where it begins.
        self._beyond: dict[int, int] = {}

    def add(self, offset: int, length: int) -> None:
        """Note that so many bytes are there."""
        with self._lock:
            self._beyond[offset] = max(length, self._beyond.get(offset, 0))
            # Chunks begin where others end, or again where one that was lost began.
            while (found := next((at for at in self._beyond if at <= self.nbytes), None)) is not None:
                self.nbytes = max(self.nbytes, found + self._beyond.pop(found))


def store_chunk(item: Item, place: Place, offset: int, chunk: memoryview) -> None:
    """Put bytes of an item's message where its tensor is stored, decoded if they are encoded and it is not.

    Raises:
        CodecError: damaged bytes, as far as the codec can see that. OSError: the place can't be written.
    """
    cut = item.cut
    if cut is None or place.encoded:
        place.write(offset, chunk)
        return
    for start, values in decode_pieces(cut, item.dtype, offset, chunk, place.memory):
        if place.memory is None:
            place.write(start, values)


def give(item: Item, place: Place) -> Any:
    """What the receiver gets of an item: what its place gives, noted as decoded if it came encoded.

    Raises:
        ProtocolError, OSError: see `Place.finish`.
    """
    given = place.finish()
    if item.cut is not None and is_tensor(given):
        note_decoded(given)
    return given


class Destination(ABC):
    """Where a `Pull` puts the items of one message. One thread calls its methods, in the order in which they are here;
    `accept`, `sink` and `check` more than once."""

    bundles = False
    """Whether it takes bundles: small tensors that come together."""
    durable = False
    """Whether what has come is kept here even if the peer can't be told so, or the transfer fails."""

    @property
    def begun(self) -> bool:
        """Whether some items may be here already, from another transfer."""
        return False

    @abstractmethod
    def accept(self, items: list[Item], described: Mapping[str, Any]) -> None:
        """Take the peer's description: its items, and all that it has told. Raises ProtocolError if it is not what is
        expected."""

    def begin(self) -> Set[int]:
        """Get ready to receive, and give the numbers of items that need not be sent."""
        return frozenset()

    def held(self, number: int) -> int:
        """How many bytes of an item's message need not be sent again, of those that came in an earlier attempt: whole
        units from its beginning. Nothing is written there any more by that attempt."""
        return 0

    @abstractmethod
    def sink(self, number: int, arrivals: Arrivals, start: int) -> Sink:
        """The sink of an item in one attempt, which tells `arrivals` how it went. It gets the item's message from
        `start` on: that is 0, or no more than `held`."""

    def check(self, attempt_is_over: bool) -> None:
        """Look at what has come: from time to time in an attempt, and when it is over. Raises RdmaError if there is no
        use in going on."""
        return

    @abstractmethod
    def finish(self) -> Any:
        """Give what the receiver gets, when every item is here. Raises RdmaError or OSError."""

    def close(self) -> None:
        """Let go of everything, whether all items came or not."""
        return


class TensorDestination(Destination):
    """Gives what the places of the tensors give, by FLARE's item ids. `land` makes each tensor's place."""

    bundles = True

    def __init__(self, land: Land) -> None:
        self._land = land
        self._items: list[Item] = []
        #: Of tensors that came apart, by their names.
        self._places: dict[str, Place] = {}
        #: The last one of each item.
        self._sinks: dict[int, TensorSink | BundleSink] = {}

    def accept(self, items: list[Item], described: Mapping[str, Any]) -> None:
        """See `Destination.accept`."""
        self._items = items

    def held(self, number: int) -> int:
        """See `Destination.held`."""
        sink = self._sinks.get(number)
        # It may be sent otherwise than before.
        return sink.held if sink is not None and sink.item == self._items[number] else 0

    def sink(self, number: int, arrivals: Arrivals, start: int) -> Sink:
        """See `Destination.sink`."""
        item = self._items[number]
        # What is late from an earlier attempt may come as well: the first place that is whole counts.
        if item.members:
            places = [self._land(member) for member in item.members]
            sink: TensorSink | BundleSink = BundleSink(number, item, places, arrivals, self._places.setdefault)
        else:
            before = self._sinks.get(number)
            place = before.place if start and isinstance(before, TensorSink) else self._land(item)
            sink = TensorSink(number, item, place, arrivals, self._places.setdefault, start)
        self._sinks[number] = sink
        return sink

    def finish(self) -> dict[str, Any]:
        """See `Destination.finish`."""
        return {tensor.name: self._finish(tensor) for item in self._items for tensor in item.tensors}

    def close(self) -> None:
        """See `Destination.close`."""
        self._sinks.clear()
        self._places.clear()

    def _finish(self, item: Item) -> Any:
        if item.content is None:
            return give(item, self._places[item.name])
        place = self._land(item)
        store_chunk(item, place, 0, memoryview(item.content))
        return give(item, place)
