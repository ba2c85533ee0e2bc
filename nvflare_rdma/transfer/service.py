"""The sending half of a transfer: answers the requests of those who come for a message's items."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from nvflare_rdma.channel import Link
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, RdmaError, TransferError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer import manifest
from nvflare_rdma.transfer.addresses import parse_invitation
from nvflare_rdma.transfer.content import Content
from nvflare_rdma.transfer.manifest import STARTS, Item
from nvflare_rdma.transfer.notices import Notices
from nvflare_rdma.transfer.peers import PeerLinks
from nvflare_rdma.transfer.records import Meter, Meters
from nvflare_rdma.transfer.sender import OfferedItem, OfferThread, Relayed

log = get_logger(__name__)

_ENDED = "the sender has ended the transfer"
#: How long the sender may take to hear that a message has arrived, once its receiver has it; and where too many threads
#: wait for that receiver's site already.
_NOTICE_SECONDS, _SHORT_NOTICE_SECONDS = 5.0, 0.1
_LOOK_SECONDS = 0.2
#: A receiver that is waited for: how often FLARE is told so, and its parent is asked whether it has ended.
_WAITING_EVERY, _ENDED_EVERY = 10.0, 30.0


class Service:
    """Serves the content of one message to all its receivers.

    Args:
        content: what is sent. The service lets go of it when it is closed.
        links: gives this cell's links, or None when there are none (any more).
        moved: called with (receiver, bytes, items) of what has arrived there.
        meters: count what goes to each receiver. They are ended by its "done", by `ended` or by `close`.
        notices: know what was said of the receivers of earlier messages.
        patience: seconds after which a receiver whose link broke, and that has not asked again, is taken for gone; it
            is more where transfers are more patient (`PeerLinks.patience`).
    """

    def __init__(
        self,
        content: Content,
        links: Callable[[], PeerLinks | None],
        moved: Callable[[str, int, int], None] = lambda receiver, nbytes, count: None,
        meters: Meters | None = None,
        notices: Notices | None = None,
        patience: float = 10.0,
    ) -> None:
        self._least_patience = patience
        self.meters = meters or Meters("")
        self._notices = notices or Notices()
        self._size = content.size
        self._content: Content | None = content
        self._links = links
        self._moved = moved
        self._lock = threading.Lock()
        #: Receiver -> the items that it was told of.
        self._items: dict[str, list[Item]] = {}
        self._offering: dict[str, OfferThread] = {}
        self._relayed: dict[str, Relayed] = {}
        self._served: set[str] = set()
        #: Receivers that were answered with everything there is.
        self._told: set[str] = set()
        #: Receivers to whom the thread in `_offering` sends what they want now.
        self._asked: set[str] = set()

    def answer(self, request: Any, receiver: str) -> dict[str, Any]:
        """Answer a request of a receiver's `Pull`. "refused" has the reason if it can't be served directly."""
        what = request.get("do") if isinstance(request, Mapping) else None
        try:
            if (content := self._content) is not None and (answer := content.answer(request, receiver)) is not None:
                return answer
            match what:
                case "describe":
                    return self._describe(request, receiver)
                case "send":
                    return self._send(request, receiver)
                case "report":
                    return self._report(receiver)
                case "relay":
                    return self._relay(receiver)
                case "done":
                    self._done(receiver)
                    return {}
                case "give up":
                    with self._lock:
                        self._forget(receiver)
                        self._relayed.pop(receiver, None)
                        sender = self._offering.pop(receiver, None)
                    if sender is not None:
                        sender.stop("the receiver has given up")
                    self._count(receiver, sender, "the receiver has given up")
                    return {}
                case _ if content is None:
                    return {"refused": _ENDED}
                case _:
                    raise ProtocolError(f"unknown request {what!r}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the fallback is left
            expected = isinstance(error, RdmaError | MemoryError)
            level = self._notices.level("refused", receiver, error, logging.INFO) if expected else logging.ERROR
            log.log(level, "%s can't be served directly and is refused, so it takes another way: %s", receiver, error)
            refusal = str(error) or type(error).__name__
            self._count(receiver, None, refusal)
            return {"refused": refusal}

    def relayed(self, receiver: str) -> Relayed | None:
        """What `receiver` wants piece by piece on the fallback; None if it has not asked for that."""
        with self._lock:
            return self._relayed.get(receiver)

    def say_what_is_not_encoded(self, receiver: str) -> None:
        """Log that `receiver` takes everything on the fallback, where nothing can decode."""
        if (content := self._content) is not None and (plain := content.count_marked()):
            log.log(
                self._notices.level("not encoded", receiver, ""),
                "%d tensors go to %s as they are, not encoded, as later ones will: it takes them on FLARE's own path",
                plain,
                receiver,
            )

    def has_served(self, receiver: str) -> bool:
        """Whether `receiver` has everything: it has said so, or took what it had asked for and has not given up. This
        waits for items that are on their way."""
        with self._lock:
            told = receiver in self._told
            sender = self._offering.get(receiver) if receiver in self._asked else None
            if sender is None and not told:
                return receiver in self._served
        if sender is None:
            return self._done(receiver)
        links = self._links()
        with links.waiting_places.place(receiver) if links is not None else contextlib.nullcontext(False) as free:
            arrived = sender.has_arrived(_NOTICE_SECONDS if free else _SHORT_NOTICE_SECONDS)
        return arrived and self._done(receiver, sender)

    def _done(self, receiver: str, seen: OfferThread | None = None) -> bool:
        """Note that `receiver` has everything. If `seen` is how that is known, it may have asked for more since: then
        nothing is noted."""
        with self._lock:
            if seen is not None and (receiver not in self._asked or self._offering.get(receiver) is not seen):
                return False
            self._forget(receiver)
            self._served.add(receiver)
            sender = self._offering.pop(receiver, None)
        self._count(receiver, sender)
        self.ended(receiver)
        return True

    def _forget(self, receiver: str) -> None:
        """Forget what is known of a receiver that begins, or ends. Called under the lock."""
        for those in (self._served, self._told, self._asked):
            those.discard(receiver)

    def ended(self, receiver: str, failure: str = "") -> None:
        """Record that `receiver` has everything, whichever way it came; or that it will not, and why."""
        items, nbytes = self._size if not failure else (0, 0)
        if not failure and (content := self._content) is not None and (meter := self.meters.find(receiver)) is not None:
            meter.receipt = content.receipt(self._sent_to(receiver, meter))
        self.meters.end(receiver, items, nbytes, failure)

    def _sent_to(self, receiver: str, meter: Meter) -> list[Item] | None:
        """The items as `receiver` has got them; None if it took them as FLARE sends them."""
        with self._lock:
            relayed, items = self._relayed.get(receiver), self._items.get(receiver)
        if relayed is not None:
            return relayed.items
        return None if meter.fell_back else items

    def close(self) -> None:
        """Stop sending, and let go of the content."""
        with self._lock:
            senders, self._offering, self._content = self._offering, {}, None
            self._relayed.clear()
        for receiver, sender in senders.items():
            sender.stop(_ENDED)
            self._count(receiver, sender)
        self.meters.close(_ENDED)

    def _broke(self, receiver: str, sender: OfferThread) -> None:
        """The link broke while `receiver` was being sent something. Record that the transfer failed, unless it asks
        again: a process that was killed never says so."""
        log.warning("sending to %s broke off, until it asks again: %s", receiver, sender.failure)
        links = self._links()
        patience = max(self._least_patience, links.patience if links is not None else 0.0)
        began = now = time.monotonic()
        asked_at = told_at = began
        while now - began < patience:
            if not self._is_awaited(receiver, sender):
                return
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            if now - told_at >= _WAITING_EVERY:  # so that FLARE keeps what is sent
                told_at = now
                self._moved(receiver, 0, 0)
            if now - asked_at >= _ENDED_EVERY and links is not None:
                if links.has_ended(receiver):
                    break
                asked_at = time.monotonic()
        with self._lock:
            if self._offering.get(receiver) is not sender:
                return
            del self._offering[receiver]
            self._asked.discard(receiver)
        self._count(receiver, sender)
        self.ended(receiver, f"{sender.failure}; it has not asked again for {time.monotonic() - began:.0f} s")

    @property
    def is_busy(self) -> bool:
        """Whether something is being sent, or a receiver is waited for whose link is gone."""
        with self._lock:
            return any(self._offering[each].is_alive() for each in self._asked if each in self._offering)

    def _is_awaited(self, receiver: str, sender: OfferThread) -> bool:
        """Whether `receiver` has not been heard of since `sender` broke off, and may still be."""
        links = self._links()
        with self._lock:
            waits = receiver in self._asked and self._offering.get(receiver) is sender
        return waits and links is not None and not links.closed

    def _count(self, receiver: str, sender: OfferThread | None, given_up: str = "") -> None:
        """Count what `sender` has sent, which is not needed any more. `given_up` says why there is no direct way."""
        meter = self.meters.find(receiver)
        if meter is None:
            return
        if sender is not None:
            sender.count(meter)
        if given_up:
            meter.fall_back(given_up)

    def _open(self) -> tuple[PeerLinks, Content]:
        links = self._links()
        if links is None:
            raise TransferError("the sender has no links any more")
        return links, self._open_content()

    def _open_content(self) -> Content:
        if (content := self._content) is None:
            raise TransferError(_ENDED)
        return content

    def _describe(self, request: Mapping[str, Any], receiver: str) -> dict[str, Any]:
        meter = self.meters.begin(receiver)
        links, content = self._open()
        first = request.get("first")
        with self._lock:
            sender, before = self._offering.get(receiver), self._items.get(receiver, [])
        items = before
        again = sender is not None and first is not None and sender.first == first
        if not again:  # else its answer was lost, and what it has begun goes on
            if sender is not None:  # it may hear later than the receiver what could not be encoded
                sender.tell_exact()
            with self._lock:
                self._forget(receiver)  # it begins anew, whatever it has said before
            items = self._items[receiver] = content.items(request.get("compact") is True)
        if meter.budget is None:
            meter.budget = links.budget.watch()
            meter.wire_bytes += sum(len(item.content or b"") for item in items)
        invitation, closed, channel = None, "", links.find(receiver) is not None
        # One side may not have noticed yet that the link is gone.
        if not channel or request.get("channel") is not True:
            try:
                invitation = links.invite(receiver)
            except FabricUnavailable as error:
                closed = str(error)
        way = {"invitation": invitation, "closed": closed, "channel": channel, "resumes": True}
        answer = {"manifest": manifest.pack(items), **way, **content.extra}
        if sender is not None and again:
            return answer | _is_sending(sender)
        if first is not None:
            # A receiver that has no link would wait for what is sent over the one that this side has still.
            joined = channel and request.get("channel") is True
            answer |= self._begin(request, receiver, items, joined, _starts(request, before, items))
        return answer

    def _begin(
        self, request: Mapping[str, Any], receiver: str, items: list[Item], joined: bool, starts: list[int]
    ) -> dict[str, Any]:
        """Send what is described to `receiver`, which has reserved labels, without waiting to be asked: if there is
        anything besides the description, and a link. Returns what to say of it."""
        wanted = request.get("items")
        if wanted is None and not (wanted := [n for n, item in enumerate(items) if item.content is None]):
            with self._lock:
                self._told.add(receiver)
            return {"sending": 0, "sees": True}
        if joined:
            with contextlib.suppress(TransferError):  # then it has to ask, and hears why not
                return self._send({"first": request["first"], "items": wanted, STARTS: starts}, receiver)
        return {}

    def _relay(self, receiver: str) -> dict[str, Any]:
        content = self._open_content()
        items = content.items()
        with self._lock:
            self._asked.discard(receiver)
            self._told.discard(receiver)
            self._relayed[receiver] = Relayed(items, content)
        if (meter := self.meters.find(receiver)) is not None:
            meter.wire_bytes += sum(len(item.content or b"") for item in items)
        return {"manifest": manifest.pack(items), **content.extra}

    def _report(self, receiver: str) -> dict[str, Any]:
        with self._lock:
            sender = self._offering.get(receiver)
        if sender is None:
            return {"failed": "nothing is being sent"}
        return {"failed": sender.failure, "unreachable": sender.unreachable}

    def _send(self, request: Mapping[str, Any], receiver: str) -> dict[str, Any]:
        links, content = self._open()
        first, wanted, invitation = request.get("first"), request.get("items"), request.get("invitation")
        if type(first) is not int or not 0 < first < 1 << 63 or not isinstance(wanted, list | tuple):
            raise ProtocolError("malformed request to send")
        with self._lock:
            items = self._items.get(receiver, [])
        if any(type(i) is not int or not 0 <= i < len(items) or items[i].content is not None for i in wanted):
            raise ProtocolError("request to send what is not in the manifest")
        if len(set(wanted)) != len(wanted):
            raise ProtocolError("request to send the same twice")
        starts = request.get(STARTS) or [0] * len(wanted)
        if not isinstance(starts, list | tuple) or len(starts) != len(wanted):
            raise ProtocolError("malformed request to send")
        if not all(_is_start(items[i], start) for i, start in zip(wanted, starts, strict=True)):
            raise ProtocolError("request to go on where no unit of an item begins")
        if invitation is None:
            if not links.is_coming(receiver):
                raise TransferError(f"there is no link to {receiver}")
        elif links.has_door_for(receiver):
            # Where the receiver can dial, this side connects to no addresses of its choice.
            raise ProtocolError("an invitation to a side that has a door")
        else:
            parse_invitation(invitation)
        offered = [
            OfferedItem(first + n, items[i], start) for n, (i, start) in enumerate(zip(wanted, starts, strict=True))
        ]
        sender = OfferThread(
            # Not here: this is a thread of FLARE's, which others need.
            functools.partial(_open_link, links, receiver, invitation, self._notices),
            content,
            offered,
            functools.partial(self._moved, receiver),
            functools.partial(self._broke, receiver),
        )
        with self._lock:
            if self._content is None:
                raise TransferError(_ENDED)
            if (before := self._offering.get(receiver)) is not None and before.is_opening:
                raise TransferError(f"a link to {receiver} is being opened already, for its last request")
            previous, self._offering[receiver] = self._offering.get(receiver), sender
            self._asked.add(receiver)
            sender.start()
        if previous is not None:
            previous.stop("the receiver has asked again")
            self._count(receiver, previous)
        return _is_sending(sender)


def _is_start(item: Item, start: Any) -> bool:
    return type(start) is int and 0 <= start < item.sent_nbytes and start % item.unit == 0


def _starts(request: Mapping[str, Any], before: list[Item], items: list[Item]) -> list[int]:
    """Where the items of a request begin that have landed in part: nowhere else than at 0 where one is sent otherwise
    than `before`."""
    wanted, starts = request.get("items"), request.get(STARTS)
    if not isinstance(wanted, list | tuple) or not isinstance(starts, list | tuple) or len(wanted) != len(starts):
        return []
    return [
        start if type(i) is int and 0 <= i < len(items) and items[i : i + 1] == before[i : i + 1] else 0
        for i, start in zip(wanted, starts, strict=True)
    ]


def _is_sending(sender: OfferThread) -> dict[str, Any]:
    return {"sending": sender.total, "sees": True} | ({STARTS: sender.starts} if any(sender.starts) else {})


def _open_link(links: PeerLinks, receiver: str, invitation: Any, notices: Notices) -> Link:
    """Find the link that a receiver has opened, or dial a receiver that can't dial this side."""
    if invitation is None:
        if (found := links.await_open(receiver)) is None:
            raise TransferError(f"there is no link to {receiver}")
        return found
    try:
        return links.dial(receiver, invitation)
    except FabricError as error:
        # What was tried and how it went is nobody else's business.
        log.log(notices.level("dial", receiver, error), "%s", error)
        raise FabricUnavailable("the sender can't reach the receiver's data port; its log says why") from error
