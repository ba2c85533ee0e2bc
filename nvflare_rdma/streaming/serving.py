"""The sending half of a direct transfer: what the holder of tensors answers to those who come for them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nvflare_rdma.channel.bodies import Source, Take, whole_units
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.outbox import Sending
from nvflare_rdma.codecs.marks import codec_of
from nvflare_rdma.codecs.tensors import is_torch
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, RdmaError, TransferError
from nvflare_rdma.metrics.transfers import Meter, Meters
from nvflare_rdma.streaming import manifest
from nvflare_rdma.streaming.arrays import to_bytes
from nvflare_rdma.streaming.channels import DataChannels
from nvflare_rdma.streaming.encoded import EncodedSource, Encoding, HotChunks, cut_of
from nvflare_rdma.streaming.manifest import INLINE_BYTES, INLINE_TOTAL, Item
from nvflare_rdma.streaming.metering import raw_bytes

log = logging.getLogger(__name__)

#: Tensors, and bytes, that are offered and not over: enough that their receiver always has the next one to grant.
_AHEAD, _AHEAD_BYTES = 64, 64 << 20
_SEND_TIMEOUT = 3600.0
_ENDED = "the sender has ended the transfer"

#: The process's.
hot = HotChunks()


class TensorSource(Source):
    """A tensor's bytes. One that lies on a GPU, or is not contiguous, is copied when its turn comes."""

    def __init__(self, tensor: Any, nbytes: int) -> None:
        self.nbytes = nbytes
        self._tensor = tensor
        self._lock = threading.Lock()
        self._bytes: memoryview | None = None
        self.ready = tensor.is_contiguous() and tensor.is_cpu if is_torch(tensor) else tensor.flags.c_contiguous

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        with self._lock:
            if self._bytes is None:
                self._bytes = to_bytes(self._tensor)
        return self._bytes[offset : offset + length]


class Service:
    """For one message's tensors and all its receivers.

    Args:
        tensors: FLARE's item id -> tensor. Not changed.
        channels: this process's; None when there are none (any more).
        moved: told (receiver, bytes, tensors) of what has arrived there.
        meters: count what goes to each receiver; those of "done" are ended here, others by `ended` or `close`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        channels: Callable[[], DataChannels | None],
        moved: Callable[[str, int, int], None] = lambda receiver, nbytes, count: None,
        meters: Meters | None = None,
    ) -> None:
        self.meters = meters or Meters("")
        self._size = len(tensors), raw_bytes(tensors)
        self._tensors: dict[str, Any] | None = dict(tensors)
        self._channels = channels
        self._moved = moved
        self._lock = threading.Lock()
        #: Receiver -> what it was told.
        self._items: dict[str, list[Item]] = {}
        #: Marked tensors that the codec can't carry.
        self._exact: set[str] = set()
        self._sendings: dict[str, _Sender] = {}
        self._relayed: dict[str, Relayed] = {}
        self._served: set[str] = set()

    def answer(self, request: Any, receiver: str) -> dict[str, Any]:
        """What to say to a `pulling` receiver's request; ``refused`` has the reason if it can't be served directly."""
        what = request.get("do") if isinstance(request, Mapping) else None
        try:
            match what:
                case "describe":
                    return self._describe(request, receiver)
                case "send":
                    return self._send(request, receiver)
                case "report":
                    with self._lock:
                        sender = self._sendings.get(receiver)
                    return {"failed": sender.failure if sender else "nothing is being sent"}
                case "relay":
                    return self._relay(receiver)
                case "done":
                    with self._lock:
                        self._served.add(receiver)
                        sender = self._sendings.pop(receiver, None)
                    self._count(receiver, sender)
                    self.ended(receiver)
                    return {}
                case "give up":
                    with self._lock:
                        self._served.discard(receiver)
                        sender = self._sendings.pop(receiver, None)
                    if sender is not None:
                        sender.stop("the receiver has given up")
                    self._count(receiver, sender, "the receiver has given up")
                    return {}
                case _:
                    raise ProtocolError(f"unknown request {what!r}")
        except Exception as error:  # noqa: BLE001 - whatever it is, FLARE's own path is left
            expected = isinstance(error, RdmaError | MemoryError)
            log.log(logging.INFO if expected else logging.ERROR, "%s can't be served directly: %s", receiver, error)
            refusal = str(error) or type(error).__name__
            self._count(receiver, None, refusal)
            return {"refused": refusal}

    def relayed(self, receiver: str) -> Relayed | None:
        """What ``receiver`` wants piece by piece on FLARE's own path."""
        with self._lock:
            return self._relayed.get(receiver)

    def say_what_is_not_encoded(self, receiver: str) -> None:
        """``receiver`` takes everything on FLARE's own path, and has nothing that could decode."""
        plain = sum(codec_of(tensor) is not None for tensor in (self._tensors or {}).values())
        if plain:
            log.warning("%d tensors go to %s as they are, not encoded: it has no RdmaTransfer", plain, receiver)

    def has_served(self, receiver: str) -> bool:
        """Whether ``receiver`` has said that it has everything."""
        with self._lock:
            return receiver in self._served

    def ended(self, receiver: str, failure: str = "") -> None:
        """``receiver`` has everything, whichever way; or it will not have it, and why."""
        items, nbytes = self._size if not failure else (0, 0)
        self.meters.end(receiver, items, nbytes, failure)

    def close(self) -> None:
        """Stop sending and let go of the tensors."""
        with self._lock:
            senders, self._sendings, self._tensors = self._sendings, {}, None
            self._relayed.clear()
        for receiver, sender in senders.items():
            sender.stop(_ENDED)
            self._count(receiver, sender)
        self.meters.close(_ENDED)

    def _count(self, receiver: str, sender: _Sender | None, given_up: str = "") -> None:
        """``sender`` is not needed any more; ``given_up``: why there is no direct way."""
        meter = self.meters.find(receiver)
        if meter is None:
            return
        if sender is not None:
            sender.count(meter)
        if given_up:
            meter.fall_back(given_up)

    def _open(self) -> tuple[DataChannels, Mapping[str, Any]]:
        channels = self._channels()
        if channels is None:
            raise TransferError("the sender has no data channels any more")
        return channels, self._open_tensors()

    def _open_tensors(self) -> Mapping[str, Any]:
        if (tensors := self._tensors) is None:
            raise TransferError(_ENDED)
        return tensors

    def _describe(self, request: Mapping[str, Any], receiver: str) -> dict[str, Any]:
        meter = self.meters.begin(receiver)
        channels, tensors = self._open()
        with self._lock:
            self._served.discard(receiver)  # it begins anew, whatever it has said before
            exact = set(self._exact)
        items = self._items[receiver] = _with_content(self._describe_all(tensors, exact), tensors)
        if meter.budget is None:
            meter.budget = channels.budget.watch()
            meter.wire_bytes += sum(len(item.content or b"") for item in items)
        invitation, closed, channel = None, "", channels.find(receiver) is not None
        # One side may not have noticed yet that the channel is gone.
        if not channel or request.get("channel") is not True:
            try:
                invitation = channels.invite(receiver)
            except FabricUnavailable as error:
                closed = str(error)
        return {"manifest": manifest.pack(items), "invitation": invitation, "closed": closed, "channel": channel}

    def _relay(self, receiver: str) -> dict[str, Any]:
        """What comes piece by piece can't begin anew: see first what can be encoded."""
        tensors = self._open_tensors()
        for item in self._describe_all(tensors, set(self._exact)):
            if item.cut is not None and (reason := Encoding(tensors[item.name], item.cut, hot).try_all()):
                self._send_exact(item.name, reason)
        items = _with_content(self._describe_all(tensors, set(self._exact)), tensors)
        with self._lock:
            self._relayed[receiver] = Relayed(items, tensors)
        if (meter := self.meters.find(receiver)) is not None:
            meter.wire_bytes += sum(len(item.content or b"") for item in items)
        return {"manifest": manifest.pack(items)}

    def _describe_all(self, tensors: Mapping[str, Any], exact: set[str]) -> list[Item]:
        items = manifest.describe(tensors)
        cuts = {name: cut_of(tensor, codec_of(tensor)) for name, tensor in tensors.items() if name not in exact}
        return [replace(item, cut=cuts.get(item.name)) for item in items]

    def _send_exact(self, name: str, reason: str) -> None:
        """A marked tensor turned out to be one that its codec can't carry."""
        with self._lock:
            if name not in self._exact:
                log.warning("tensor %s is sent exact: %s", name, reason)
            self._exact.add(name)

    def _send(self, request: Mapping[str, Any], receiver: str) -> dict[str, Any]:
        channels, tensors = self._open()
        first, wanted, invitation = request.get("first"), request.get("items"), request.get("invitation")
        if type(first) is not int or not 0 < first < 1 << 63 or not isinstance(wanted, list | tuple):
            raise ProtocolError("malformed request to send")
        with self._lock:
            items = self._items.get(receiver, [])
        if any(type(i) is not int or not 0 <= i < len(items) or items[i].content is not None for i in wanted):
            raise ProtocolError("request to send what is not in the manifest")
        if len(set(wanted)) != len(wanted):
            raise ProtocolError("request to send the same twice")
        if invitation is not None:
            link = _dial(channels, receiver, invitation)
        elif (found := channels.await_open(receiver)) is not None:
            link = found
        else:
            raise TransferError(f"there is no data channel to {receiver}")
        parts = [_Part(first + n, items[i], tensors[items[i].name]) for n, i in enumerate(wanted)]
        sender = _Sender(link, parts, lambda nbytes: self._moved(receiver, nbytes, 1), self._send_exact)
        with self._lock:
            if self._tensors is None:
                raise TransferError(_ENDED)
            previous, self._sendings[receiver] = self._sendings.get(receiver), sender
        if previous is not None:
            previous.stop("the receiver has asked again")
            self._count(receiver, previous)
        sender.start()
        return {"sending": len(parts)}


def _dial(channels: DataChannels, receiver: str, invitation: Any) -> Link:
    """Only where the receiver can't dial: nobody is to have this side connect to addresses of his choice."""
    if channels.has_door_for(receiver):
        raise ProtocolError("an invitation to a side that has a door")
    try:
        return channels.dial(receiver, invitation)
    except FabricError as error:
        log.warning("%s", error)  # what was tried and how it went is nobody else's business
        raise FabricUnavailable("the sender can't reach the receiver's data port; its log says why") from error


class Relayed:
    """The tensors that are not in the manifest, as bytes, for one receiver that asks for them piece by piece."""

    def __init__(self, items: list[Item], tensors: Mapping[str, Any]) -> None:
        self._items = items
        self._tensors = tensors
        self._lock = threading.Lock()
        self._open: tuple[int, Source] | None = None

    def piece(self, number: int, offset: int, most: int) -> tuple[int, int, bytes] | None:
        """What follows ``offset`` bytes of an item: its number, the offset and at most ``most`` bytes (but one unit at
        least); None after the last.

        Raises:
            ProtocolError: there is no such item. CodecError: no piece begins there.
        """
        if not 0 <= number <= len(self._items) or offset < 0:
            raise ProtocolError(f"a request for tensor {number} of {len(self._items)}")
        while number < len(self._items):
            item = self._items[number]
            if item.content is None and offset < item.sent_nbytes:
                length = whole_units(most, item.cut.unit if item.cut is not None else 1)
                with self._lock:
                    if self._open is None or self._open[0] != number:
                        self._open = number, _source(item, self._tensors[item.name])
                    source = self._open[1]
                data = source.read(offset, min(length, item.sent_nbytes - offset), lambda n: memoryview(bytearray(n)))
                return number, offset, bytes(data)
            number, offset = number + 1, 0
        return None


@dataclass(frozen=True)
class _Part:
    label: int
    item: Item
    tensor: Any


class _Sender(threading.Thread):
    """Offers tensors one after the other. ``moved``: told the bytes of each that has arrived; ``exact``: told the name
    of one that can't be encoded, and why."""

    def __init__(
        self, link: Link, parts: list[_Part], moved: Callable[[int], None], exact: Callable[[str, str], None]
    ) -> None:
        super().__init__(name="rdma-offers", daemon=True)
        self._link = link
        self._parts = parts
        self._moved = moved
        self._exact = exact
        self._lock = threading.Lock()
        self._failure = ""
        self._open: deque[tuple[Sending, _Part, Source]] = deque()
        self._offered: list[Sending] = []

    @property
    def failure(self) -> str:
        """Why not everything will be sent; "" while nothing went wrong."""
        with self._lock:
            return self._failure

    def run(self) -> None:
        try:
            for part in self._parts:
                while len(self._open) >= _AHEAD or (len(self._open) > 1 and self._ahead() >= _AHEAD_BYTES):
                    self._wait_for_one()
                if self.failure:
                    break
                self._offer(part)
            while self._open:
                self._wait_for_one()
        except Exception as error:  # noqa: BLE001 - the receiver is told, whatever it is
            self.stop(str(error) or type(error).__name__)
        finally:
            self._parts = []
            self._open.clear()

    def _ahead(self) -> int:
        with self._lock:
            return sum(source.nbytes for _, _, source in self._open)

    def _offer(self, part: _Part) -> None:
        source = _source(part.item, part.tensor)
        sending = self._link.offer(source, part.label)
        with self._lock:
            self._open.append((sending, part, source))
            self._offered.append(sending)
            failure = self._failure
        if failure:  # `stop` did not see it
            self._link.withdraw(sending, failure)

    def _wait_for_one(self) -> None:
        sending, part, source = self._open[0]
        try:
            sending.wait(_SEND_TIMEOUT)
        except TransferError:
            if not (isinstance(source, EncodedSource) and source.encoding.unrepresentable):
                raise
            # The receiver misses this one, and asks again.
            self._exact(part.item.name, source.encoding.unrepresentable)
        else:
            self._moved(source.nbytes)
        with self._lock:
            self._open.popleft()

    def count(self, meter: Meter) -> None:
        """Add what the receiver was sent so far."""
        with self._lock:
            meter.wire_bytes += sum(sending.reached for sending in self._offered)
            meter.resent_chunks += sum(sending.resent_chunks for sending in self._offered)
        meter.fabric = self._link.fabric

    def stop(self, reason: str) -> None:
        """Withdraw what is not over. The first reason counts."""
        with self._lock:
            self._failure = reason = self._failure or reason
            open_now = list(self._open)
        for sending, _, _ in open_now:
            self._link.withdraw(sending, reason)


def _source(item: Item, tensor: Any) -> Source:
    return TensorSource(tensor, item.nbytes) if item.cut is None else EncodedSource(Encoding.of(tensor, item.cut, hot))


def _with_content(items: list[Item], tensors: Mapping[str, Any]) -> list[Item]:
    """The items, the small ones with their content."""
    found, room = [], INLINE_TOTAL
    for item in items:
        if item.nbytes == 0 or item.nbytes <= min(INLINE_BYTES, room):
            content = bytes(to_bytes(tensors[item.name])) if item.nbytes else b""
            item = replace(item, content=content, cut=None)
            room -= item.nbytes
        found.append(item)
    return found
