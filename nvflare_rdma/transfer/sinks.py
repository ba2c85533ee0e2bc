"""Takes the messages of a transfer's items, and brings what is in them to their places."""

from __future__ import annotations

import heapq
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from typing import Any

from nvflare_rdma.channel import Sink
from nvflare_rdma.transfer.manifest import Item, in_order
from nvflare_rdma.transfer.places import Land, Place, give, store_chunk


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


class ItemSink(Sink):
    """Receives one item's message, from `start` bytes of it on, into `places`, by the names of its tensors. `whole` is
    called with each name and place when all of it is there."""

    def __init__(
        self,
        number: int,
        item: Item,
        places: Mapping[str, Place],
        arrivals: Arrivals,
        whole: Callable[[str, Place], object],
        start: int = 0,
    ) -> None:
        self._number = number
        self._arrivals = arrivals
        self._whole = whole
        self._places = places
        self.item = item
        self.nbytes, self.unit = item.sent_nbytes - start, item.unit

    @property
    def held(self) -> int:
        """How many bytes of the message have landed before the first that has not, in whole units."""
        return 0

    def done(self) -> None:
        """See `Sink.done`."""
        for name, place in self._places.items():
            self._whole(name, place)
        self._arrivals.came(self._number, self.nbytes)

    def failed(self, reason: str) -> None:
        """See `Sink.failed`."""
        self._arrivals.lose(self._number, reason)


class TensorSink(ItemSink):
    """Receives one tensor into `place`. What comes before `start` has landed already."""

    def __init__(
        self,
        number: int,
        item: Item,
        place: Place,
        arrivals: Arrivals,
        whole: Callable[[str, Place], object],
        start: int = 0,
    ) -> None:
        super().__init__(number, item, {item.name: place}, arrivals, whole, start)
        self._start = start
        self._landed = Beginning(start)
        self.place = place

    @property
    def held(self) -> int:
        """See `ItemSink.held`."""
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


class BundleSink(ItemSink):
    """Receives a bundle, which comes whole, or not at all."""

    def put(self, offset: int, chunk: memoryview) -> None:
        """See `Sink.put`."""
        end = 0
        for member in self.item.members:
            start, end = end, end + member.sent_nbytes
            store_chunk(member, self._places[member.name], 0, chunk[start:end])


class Beginning:
    """How much of a message is there without a gap, from its beginning; any number of threads may add to it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._lock = threading.Lock()
        #: What is there beyond a gap, by where it begins; and those places, as a heap: as long as an early chunk is
        #: missing, to look at all of them for each that lands would take longer than the chunks themselves.
        self._beyond: dict[int, int] = {}
        self._places: list[int] = []

    def add(self, offset: int, length: int) -> None:
        """Note that so many bytes are there."""
        with self._lock:
            if offset not in self._beyond:
                heapq.heappush(self._places, offset)
            self._beyond[offset] = max(length, self._beyond.get(offset, 0))
            # Chunks begin where others end, or again where one that was lost began.
            while self._places and self._places[0] <= self.nbytes:
                found = heapq.heappop(self._places)
                self.nbytes = max(self.nbytes, found + self._beyond.pop(found))


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
        self._sinks: dict[int, ItemSink] = {}

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
            places = {member.name: self._land(member) for member in item.members}
            sink: ItemSink = BundleSink(number, item, places, arrivals, self._places.setdefault)
        else:
            before = self._sinks.get(number)
            place = before.place if start and isinstance(before, TensorSink) else self._land(item)
            sink = TensorSink(number, item, place, arrivals, self._places.setdefault, start)
        self._sinks[number] = sink
        return sink

    def finish(self) -> dict[str, Any]:
        """See `Destination.finish`."""
        return {tensor.name: self._finish(tensor) for tensor in in_order(self._items)}

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
