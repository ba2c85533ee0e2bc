"""What a sender does for one receiver: items become messages of a link, or pieces of FLARE's messages."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from nvflare_rdma.channel import Link, Sending, Source, Take, whole_units
from nvflare_rdma.errors import FabricUnavailable, ProtocolError, TransferError, UnrepresentableError
from nvflare_rdma.transfer.content import Content
from nvflare_rdma.transfer.expected import MAX_AHEAD
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.records import Meter

#: How many items, and bytes, may be offered and not over: enough for the receiver to have always the next one to grant.
_AHEAD, _AHEAD_BYTES = MAX_AHEAD, 64 << 20
#: Who waits for the first of them may sleep on for so long when that is over, so that it is not woken for each.
_DOZE_SECONDS = 0.05
_SEND_TIMEOUT = 3600.0


class Relayed:
    """Gives the items that are not in the manifest as bytes to one receiver, which asks for them piece by piece."""

    def __init__(self, items: list[Item], content: Content) -> None:
        self._items = list(items)
        self._content = content
        self._lock = threading.Lock()
        self._open: tuple[int, Source] | None = None

    @property
    def items(self) -> list[Item]:
        """The items as they were given so far; what its codec could not carry is not encoded."""
        with self._lock:
            return list(self._items)

    def piece(self, number: int, offset: int, exact: bool, most: int) -> tuple[int, int, bool, bytes] | None:
        """Give the bytes that follow `offset` bytes of an item: at most `most` of them, but one unit at least.

        Returns the item's number, the offset, whether the item is not encoded (any more: it then begins anew), and the
        bytes; None after the last item.

        Raises:
            ProtocolError: there is no such item. CodecError: no piece begins there.
        """
        if not 0 <= number <= len(self._items) or offset < 0:
            raise ProtocolError(f"a request for tensor {number} of {len(self._items)}")
        with self._lock:
            while number < len(self._items):
                item = self._items[number]
                if item.cut is None and item.content is None and not exact and offset:
                    offset = 0  # what has come of it was encoded
                if item.content is None and offset < item.sent_nbytes:
                    try:
                        return number, offset, item.cut is None, self._read(number, offset, most)
                    except UnrepresentableError as error:
                        self._content.send_exact(item, str(error))
                        self._items[number], self._open, offset = replace(item, cut=None), None, 0
                        continue
                number, offset, exact = number + 1, 0, False
        return None

    def _read(self, number: int, offset: int, most: int) -> bytes:
        item = self._items[number]
        if self._open is None or self._open[0] != number:
            self._open = number, self._content.source(item)
        length = whole_units(most, item.unit)
        left = item.sent_nbytes - offset
        return bytes(self._open[1].read(offset, min(length, left), lambda nbytes: memoryview(bytearray(nbytes))))


@dataclass(frozen=True, slots=True)
class OfferedItem:
    """An item of a manifest, the label that its receiver expects it under, and how much of its message is there
    already."""

    label: int
    item: Item
    start: int = 0


class Rest(Source):
    """What follows the first `start` bytes of a message."""

    def __init__(self, source: Source, start: int) -> None:
        self._source = source
        self._start = start
        self.nbytes = source.nbytes - start
        self.ready = source.ready

    @property
    def unrepresentable(self) -> str:
        """See `Source.unrepresentable`."""
        return self._source.unrepresentable

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        return self._source.read(self._start + offset, length, take)


class OfferThread(threading.Thread):
    """Offers items of `content` to one receiver, one after the other. `open_link` finds the link to it, or opens one,
    which may take as long as it takes to dial. `moved` is called with the bytes and the tensors of each item that has
    arrived, and `broke` in the end, in this thread, if the link has ended in the middle of it."""

    def __init__(
        self,
        open_link: Callable[[], Link],
        content: Content,
        wanted: list[OfferedItem],
        moved: Callable[[int, int], None],
        broke: Callable[[OfferThread], None] = lambda sender: None,
    ) -> None:
        super().__init__(name="rdma-offers", daemon=True)
        self._open_link = open_link
        self._link: Link | None = None
        self._content = content
        self.first = wanted[0].label if wanted else 0
        """The label of the first item."""
        self.total = len(wanted)
        self.starts = [each.start for each in wanted]
        self._wanted = wanted
        self._moved = moved
        self._broke = broke
        self._lock = threading.RLock()  # what an offer sets off may stop it
        self._failure = ""
        self._open: deque[tuple[Sending, Item, Source]] = deque()
        self._offered: list[Sending] = []
        self._missing = self.total
        self.unreachable = False
        """Whether it failed because there is no way to the receiver."""

    @property
    def is_opening(self) -> bool:
        """Whether the link is not there yet."""
        return self._link is None and self.is_alive()

    @property
    def failure(self) -> str:
        """Why not everything will be sent; "" while nothing went wrong."""
        with self._lock:
            return self._failure

    def run(self) -> None:
        """Offer everything, and wait until it has arrived. What fails is in `failure`, for the receiver to ask."""
        try:
            self._link = self._open_link()
            for wanted in self._wanted:
                while len(self._open) >= _AHEAD or (len(self._open) > 1 and self._ahead() >= _AHEAD_BYTES):
                    self._wait_for_some(len(self._open) // 2)
                if self.failure:
                    break
                self._offer(wanted)
            while self._open:
                self._wait_for_some(len(self._open))
        except Exception as error:  # noqa: BLE001 - the receiver is told, whatever it is
            self.unreachable = isinstance(error, FabricUnavailable)
            self.stop(str(error) or type(error).__name__)
        finally:
            self._wanted = []
            self.tell_exact()
            self._open.clear()
        if self.failure and self._link is not None and not self._link.usable:
            self._broke(self)

    def _ahead(self) -> int:
        with self._lock:
            return sum(source.nbytes for _, _, source in self._open)

    def _offer(self, wanted: OfferedItem) -> None:
        source, link = self._content.source(wanted.item), self._link
        assert link is not None
        if wanted.start:
            source = Rest(source, wanted.start)
        with self._lock:  # the receiver may have it, and have said so, before this goes on
            sending = link.offer(source, wanted.label)
            self._open.append((sending, wanted.item, source))
            self._offered.append(sending)
            failure = self._failure
        if failure:  # `stop` did not see it
            link.withdraw(sending, failure)

    def has_arrived(self, timeout: float) -> bool:
        """Whether everything has arrived, if that is known within `timeout` seconds."""
        if self.ident is None:
            return False
        self.join(timeout)
        return not self._missing

    def _wait_for_some(self, count: int) -> None:
        """Wait until the first offer is over, and `count` of them where they go fast."""
        with contextlib.suppress(TransferError):  # each is looked at in its turn
            self._open[count - 1][0].wait(_DOZE_SECONDS)
        self._wait_for_one()
        while self._open and self._open[0][0].ended:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        sending, item, source = self._open[0]
        try:
            sending.wait(_SEND_TIMEOUT)
        except TransferError:
            if not source.unrepresentable:
                raise
            # The receiver misses this one, and asks again.
            self._content.send_exact(item, source.unrepresentable)
        else:
            self._missing -= 1
            self._moved(source.nbytes, len(item.tensors))
        with self._lock:
            self._open.popleft()

    def tell_exact(self) -> None:
        """Tell the content which items can't be encoded, also those that this thread has not waited for yet."""
        with self._lock:
            open_now = list(self._open)
        for _, item, source in open_now:
            if source.unrepresentable:
                self._content.send_exact(item, source.unrepresentable)

    def count(self, meter: Meter) -> None:
        """Add what the receiver was sent so far to `meter`."""
        with self._lock:
            meter.wire_bytes += sum(sending.reached for sending in self._offered)
            meter.resent_chunks += sum(sending.resent_chunks for sending in self._offered)
        meter.fabric = self._link.fabric if self._link is not None else meter.fabric

    def stop(self, reason: str) -> None:
        """Withdraw the offers that are not over. The first reason counts."""
        with self._lock:
            self._failure = reason = self._failure or reason
            open_now = list(self._open)
        for sending, _, _ in open_now:
            assert self._link is not None
            self._link.withdraw(sending, reason)
