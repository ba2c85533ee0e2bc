"""What the two ends of a live check say to each other: small JSON messages over a link of the channel, and messages of
random bytes that are as tensors are to a job's links.

    active side, --peer                            passive side, --listen

    about      what is there: versions, fabrics, ports    a JSON object
    ping       nothing                                    {}
    receive    labels, bytes: these will be offered       {}, and it lets them land
    send       labels, bytes: offer these                 {}, and it offers them

The passive side only answers, and by these bounds, whatever it is asked: it holds the memory of two messages besides
its budget, has a few messages on their way at once, and ends the link after `LINK_SECONDS`. It also ends it when a
message breaks off: where that was to land may still be written, so it can be used no more as long as there is the link.
"""

from __future__ import annotations

import functools
import itertools
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nvflare_rdma.channel import ControlStream, Delivery, Later, Link, LinkContext, Role, Sending, Sink
from nvflare_rdma.cli.peer_bodies import Landing, Room, item_of, source_of
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.fabric import Fabric
from nvflare_rdma.transfer import Item

#: The largest message, and how many of them are on their way at once.
MOST_BYTES, MOST_AT_ONCE = 32 * 1024 * 1024, 2
#: How long one link may last, and how long either side waits for an answer.
LINK_SECONDS, ANSWER_SECONDS = 90.0, 10.0
#: The answer's field if the passive side can't check now, and how long it waits for the question.
BUSY, _REFUSED_SECONDS = "busy", 5.0
#: A round of messages that took at least so long counts, and the median of so many of them. No more is begun after
#: `_BUDGET_SECONDS`; a round that takes longer than the last one is given up.
_FIRST_BYTES, _GROWTH, _ROUND_SECONDS, _ROUNDS = 256 * 1024, 4, 0.25, 3
_BUDGET_SECONDS, _MOST_SECONDS = 4.0, 15.0
_PINGS, _PING_SECONDS = 10, 3.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Bounds:
    """What a link may be asked for, in either direction.

    Attributes:
        message_bytes: the largest message.
        at_once: how many have memory to land in at a time.
        asked_at_once: how many one question may be about.
        questions: how many there may be.
    """

    message_bytes: int = MOST_BYTES
    at_once: int = MOST_AT_ONCE
    asked_at_once: int = MOST_AT_ONCE
    questions: int = 1000


@dataclass(frozen=True)
class Goodput:
    """The median of some rounds, in bytes a second, and how many bytes were moved for it in all."""

    bytes_per_second: float
    rounds: int
    moved_bytes: int


def context_for(
    context: LinkContext, order: tuple[str, ...], chunk_bytes: int | None = None, open_seconds: float = float("inf")
) -> LinkContext:
    """The context of a check's links, which take nothing but small messages and what they have asked for. Chunks are of
    so many bytes, or as the settings say. To open takes so long at most, or as a job's links have it."""
    seconds = min(context.limits.handshake_timeout, open_seconds)
    limits = replace(context.limits, max_message_bytes=MOST_BYTES, handshake_timeout=seconds)
    chunk = context.chunk_bytes if chunk_bytes is None else chunk_bytes
    return replace(context, limits=limits, order=order, labels_only=True, chunk_bytes=chunk)


class Exchange:
    """One end of a check, on one link. With `about` this is the passive side, which answers within `bounds`."""

    def __init__(
        self,
        stream: ControlStream,
        fabrics: Mapping[str, Fabric],
        context: LinkContext,
        name: str,
        about: Callable[[Link], dict[str, Any]] | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self.bounds = bounds or Bounds()
        self.received_bytes = self.sent_bytes = 0
        self._about = about
        self._refusal = ""
        # By number, as they come in the order of the questions: nobody waits any more for one that is late.
        self._answers: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self._asked = self._answered = 0
        self._labels = itertools.count(1)
        self._lock = threading.Lock()
        self._expected: dict[int, Item] = {}
        self._landing = 0
        #: Places of messages that have broken off, which may still be written until the link is over.
        self._lost, self._is_over = 0, False
        self.room = Room(self.bounds.message_bytes, self.bounds.at_once)
        """Where what comes lands."""
        self._landed: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._sending: list[Sending] = []
        self._questions = 0
        role = Role.ACTIVE if about is None else Role.PASSIVE
        self.link = Link(stream, role, fabrics, context, self._deliver, name, self._place)

    def refuse(self, why: str) -> None:
        """On the passive side: answer the first question with why there will be no check, and end the link. Whoever
        asks for anything else has no place for it, and is not waited for."""
        self._refusal = why
        ending = threading.Timer(_REFUSED_SECONDS, self.link.close)
        ending.daemon = True
        ending.start()
        self.receive()
        ending.cancel()

    def receive(self) -> None:
        """Receive until the link ends; then others may have memory for what has broken off."""
        try:
            self.link.run()
        finally:
            with self._lock:
                self._is_over, lost = True, self._lost
            self.room.replace(lost)

    # -- the active side -----------------------------------------------------------------------------------

    def ask(self, what: str, most_seconds: float = ANSWER_SECONDS, **fields: Any) -> dict[str, Any]:
        """The answer to one question, which is waited for so long.

        Raises:
            TransferError: the link has ended. TimeoutError: there is no answer in time.
        """
        deadline = time.monotonic() + most_seconds
        self._asked += 1
        number = self._asked
        try:
            self._post({"ask": what, **fields}, most_seconds)
        except BaseException:
            self._asked -= 1  # it has not gone
            raise
        while True:
            left = deadline - time.monotonic()
            try:
                answered, told = self._answers.get(timeout=min(max(left, 0.001), _LOOK_SECONDS))
            except queue.Empty:
                if not self.link.usable:
                    raise TransferError(f"the link has ended: {self.link.failure}") from None
                if left <= 0:
                    raise TimeoutError(f"no answer to {what!r} within {most_seconds:.3g} s") from None
                continue
            if answered == number:
                return told

    def round_trip(self, most_seconds: float = ANSWER_SECONDS) -> float:
        """Seconds from a small message to its answer: the median of a few, each of which is waited for so long."""
        took: list[float] = []
        ending = time.monotonic() + _PING_SECONDS
        while len(took) < _PINGS and (not took or time.monotonic() < ending):
            began = time.perf_counter()
            self.ask("ping", most_seconds)
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    def goodput(self, to_peer: bool) -> Goodput:
        """What the link carries to the peer, or from it.

        Raises:
            RdmaError, OSError: nothing has come through in time, or the link has ended.
        """
        rates: list[float] = []
        size, moved, last = _FIRST_BYTES, 0, 0.0
        began = time.monotonic()
        while len(rates) < _ROUNDS and (not moved or time.monotonic() - began < _BUDGET_SECONDS):
            seconds = self.move(to_peer, size)
            moved += size
            last = size / seconds
            if seconds >= _ROUND_SECONDS or size == MOST_BYTES * MOST_AT_ONCE:
                rates.append(last)
            else:
                size *= _GROWTH
                size = min(size, MOST_BYTES * MOST_AT_ONCE)
        return Goodput(statistics.median(rates or [last]), max(len(rates), 1), moved)

    def move(self, to_peer: bool, size: int, codec: str = "", most_seconds: float = _MOST_SECONDS) -> float:
        """Move about `size` bytes to the peer, or from it, in as few messages as that takes. Returns the seconds.

        Raises:
            RdmaError, OSError: they are not there in time, or the link has ended.
        """
        count = -(-size // self.bounds.message_bytes)
        nbytes = size // count // 4 * 4  # whole values
        labels = [next(self._labels) for _ in range(count)]
        asked: dict[str, Any] = {"labels": labels, "bytes": nbytes, **({"codec": codec} if codec else {})}
        answer_seconds = min(most_seconds, ANSWER_SECONDS)
        if to_peer:
            self.ask("receive", answer_seconds, **asked)
            began = time.perf_counter()
            for each in [self._offer(label, nbytes, codec) for label in labels]:
                each.wait(max(most_seconds - (time.perf_counter() - began), 0.0))
            return time.perf_counter() - began
        self._expect(labels, item_of(nbytes, codec))
        try:
            began = time.perf_counter()
            self.ask("send", answer_seconds, **asked)
            self._await_landing(set(labels), size, began, most_seconds)
            return time.perf_counter() - began
        except BaseException:
            self._forget(labels)
            raise

    def _await_landing(self, labels: set[int], size: int, began: float, most_seconds: float) -> None:
        """Wait for these; what a round before has left behind is none of them."""
        while labels:
            left = most_seconds - (time.perf_counter() - began)
            try:
                label, failure = self._landed.get(timeout=min(max(left, 0.001), _LOOK_SECONDS))
            except queue.Empty:
                if not self.link.usable:
                    raise TransferError(f"the link has ended: {self.link.failure}") from None
                if left <= 0:
                    raise TimeoutError(f"{size} bytes were not here within {most_seconds:g} s") from None
                continue
            if label not in labels:
                continue
            if failure:
                raise TransferError(failure)
            labels.discard(label)

    # -- both sides ----------------------------------------------------------------------------------------

    def _post(self, message: dict[str, Any], most_seconds: float = ANSWER_SECONDS) -> None:
        self.link.send(json.dumps(message).encode(), most_seconds)

    def _offer(self, label: int, nbytes: int, codec: str) -> Sending:
        return self.link.offer(source_of(nbytes, codec, self.bounds.message_bytes), label)

    def _expect(self, labels: list[int], item: Item) -> None:
        with self._lock:
            self._landing += len(labels)
            self._expected |= dict.fromkeys(labels, item)

    def _forget(self, labels: list[int]) -> None:
        """Let nothing land for these any more."""
        with self._lock:
            for label in labels:
                if self._expected.pop(label, None) is not None:
                    self._landing -= 1

    def _over(self, label: int, nbytes: int, failure: str) -> None:
        with self._lock:
            self._landing -= 1
            self.received_bytes += 0 if failure else nbytes
        if failure:
            self._broken_off(failure)
        if self._about is None:
            self._landed.put((label, failure))

    def _broken_off(self, reason: str) -> None:
        with self._lock:
            if not (is_late := self._is_over):
                self._lost += 1
        if is_late:
            self.room.replace(1)
        elif self._about is not None and self.link.usable:  # who asks gives up a link like this by himself
            self.link.failed(TransferError(f"a message of the check has broken off: {reason}"))

    def _place(self, label: int, again: Callable[[], None]) -> Sink | Later | None:
        with self._lock:
            if (item := self._expected.get(label)) is None:
                return None
            if (place := self.room.take(again)) is None:
                return Later()
            del self._expected[label]
        return Landing(item, place, self.room, functools.partial(self._over, label, item.nbytes))

    def _deliver(self, message: Delivery) -> None:
        try:
            told = json.loads(bytes(message))
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise ProtocolError("it says what is no message of a check")
        if self._about is None:
            self._answered += 1
            if self._answered > self._asked:
                raise ProtocolError("it answers what it was not asked")
            self._answers.put((self._answered, told))
            return
        self._questions += 1
        if self._questions > self.bounds.questions:
            raise ProtocolError(f"it asks more than {self.bounds.questions} times")
        if self._refusal and told.get("ask") != "about":
            raise ProtocolError("it asks for a check though it was told that there is none now")
        self._post({BUSY: self._refusal} if self._refusal else self.answer(told, self._about))

    def answer(self, told: dict[str, Any], about: Callable[[Link], dict[str, Any]]) -> dict[str, Any]:
        """On the passive side: the answer to a question. Raises ProtocolError: it is none that may be asked."""
        match told:
            case {"ask": "about"}:
                return about(self.link)
            case {"ask": "ping"}:
                return {}
            case {"ask": "receive" | "send" as what, "labels": list(labels), "bytes": int(nbytes)} if (
                0 < len(labels) <= self.bounds.asked_at_once
                and all(type(label) is int and 0 < label < 1 << 63 for label in labels)
                and len(set(labels)) == len(labels)
                and 0 < nbytes <= self.bounds.message_bytes
                and self.knows(codec := told.get("codec", ""))
                and not (codec and nbytes % 4)
            ):
                # The peer may know that a round is over a moment before this side does.
                self._sending = [sending for sending in self._sending if not sending.ended]
                if max(self._landing, len(self._sending)) > self.bounds.asked_at_once:
                    raise ProtocolError("it asks for messages before those that it has asked for are over")
                if what == "receive":
                    self._expect(labels, item_of(nbytes, codec))
                else:
                    self._sending += [self._offer(label, nbytes, codec) for label in labels]
                    self.sent_bytes += len(labels) * nbytes
                return {}
        raise ProtocolError("it asks for what a check does not have")

    def knows(self, codec: Any) -> bool:
        """Whether messages may be in this codec; "" is exact."""
        return bool(codec == "")
