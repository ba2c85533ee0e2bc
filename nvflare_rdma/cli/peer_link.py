"""What the two ends of a live check say to each other: small JSON messages over a link of the channel, and messages of
random bytes that are as tensors are to a job's links.

    active side, --peer                            passive side, --listen

    about      what is there: versions, fabrics, ports    a JSON object
    ping       nothing                                    {}
    receive    labels, bytes: these will be offered       {}, and it lets them land
    send       labels, bytes: offer these                 {}, and it offers them

The passive side only answers, and by these bounds, whatever it is asked: it holds the memory of two messages besides
its budget, has a few messages on their way at once, and ends the link after `LINK_SECONDS`.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nvflare_rdma.channel import ControlStream, Delivery, Link, LinkContext, Role, Sending, Sink, Source, Take
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.fabric import Fabric

#: The largest message, and how many of them are on their way at once.
MOST_BYTES, MOST_AT_ONCE = 32 * 1024 * 1024, 2
#: How long one link may last, and how long either side waits for an answer.
LINK_SECONDS, ANSWER_SECONDS = 90.0, 10.0
_MOST_QUESTIONS = 1000
#: The answer's field if the passive side can't check now, and how long it waits for the question.
BUSY, _REFUSED_SECONDS = "busy", 5.0
#: A round of messages that took at least so long counts, and the median of so many of them. No more is begun after
#: `_BUDGET_SECONDS`; a round that takes longer than the last one is given up.
_FIRST_BYTES, _GROWTH, _ROUND_SECONDS, _ROUNDS = 256 * 1024, 4, 0.25, 3
_BUDGET_SECONDS, _MOST_SECONDS = 4.0, 15.0
_PINGS, _PING_SECONDS = 10, 3.0


@functools.cache
def _noise() -> memoryview:
    """What is sent: nothing on the way can make it smaller."""
    return memoryview(os.urandom(1024 * 1024) * (MOST_BYTES // (1024 * 1024)))


class _Noise(Source):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        """See `Source.read`."""
        return _noise()[offset : offset + length]


class _Waste(Sink):
    def __init__(self, memory: memoryview, over: Callable[[str], None]) -> None:
        self.nbytes = len(memory)
        self._memory = memory
        self._over = over

    @property
    def buffer(self) -> memoryview:
        """See `Sink.buffer`."""
        return self._memory

    def done(self) -> None:
        """See `Sink.done`."""
        self._over("")

    def failed(self, reason: str) -> None:
        """See `Sink.failed`."""
        self._over(reason or "it will not come")


@dataclass(frozen=True)
class Goodput:
    """The median of some rounds, in bytes a second, and how many bytes were moved for it in all."""

    bytes_per_second: float
    rounds: int
    moved_bytes: int


def context_for(context: LinkContext, order: tuple[str, ...]) -> LinkContext:
    """The context of a check's links, which take nothing but small messages and what they have asked for."""
    limits = replace(context.limits, max_message_bytes=MOST_BYTES)
    return replace(context, limits=limits, order=order, labels_only=True)


class Exchange:
    """One end of a check, on one link. With `about` this is the passive side, which answers."""

    def __init__(
        self,
        stream: ControlStream,
        fabrics: Mapping[str, Fabric],
        context: LinkContext,
        name: str,
        about: Callable[[Link], dict[str, Any]] | None = None,
    ) -> None:
        self.received_bytes = self.sent_bytes = 0
        self._about = about
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._labels = itertools.count(1)
        self._lock = threading.Lock()
        self._sinks: dict[int, _Waste] = {}
        self._landing = 0
        self._memory: memoryview | None = None
        self._landed: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._sending: list[Sending] = []
        self._questions = 0
        role = Role.ACTIVE if about is None else Role.PASSIVE
        self.link = Link(stream, role, fabrics, context, self._deliver, name, self._place)

    def refuse(self, why: str) -> None:
        """On the passive side: answer the first question with why there will be no check, and end the link."""
        self._about = lambda link: {BUSY: why}
        ending = threading.Timer(_REFUSED_SECONDS, self.link.close)
        ending.daemon = True
        ending.start()
        self.link.run()
        ending.cancel()

    # -- the active side -----------------------------------------------------------------------------------

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """The answer to one question.

        Raises:
            TransferError: the link has ended. TimeoutError: there is no answer in time.
        """
        self._post({"ask": what, **fields})
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                return self._answers.get(timeout=0.2)
            except queue.Empty:
                if not self.link.usable:
                    raise TransferError(f"the link has ended: {self.link.failure}") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no answer to {what!r} within {ANSWER_SECONDS:g} s") from None

    def round_trip(self) -> float:
        """Seconds from a small message to its answer: the median of a few."""
        took: list[float] = []
        ending = time.monotonic() + _PING_SECONDS
        while len(took) < _PINGS and (not took or time.monotonic() < ending):
            began = time.perf_counter()
            self.ask("ping")
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    def goodput(self, to_peer: bool) -> Goodput:
        """What the link carries to the peer, or from it.

        Raises:
            RdmaError, OSError: nothing has come through in time, or the link has ended.
        """
        move = self._send_round if to_peer else self._receive_round
        rates: list[float] = []
        size, moved, last = _FIRST_BYTES, 0, 0.0
        began = time.monotonic()
        while len(rates) < _ROUNDS and (not moved or time.monotonic() - began < _BUDGET_SECONDS):
            count = -(-size // MOST_BYTES)
            seconds = move(count, size // count)
            moved += size
            last = size / seconds
            if seconds >= _ROUND_SECONDS or size == MOST_BYTES * MOST_AT_ONCE:
                rates.append(last)
            else:
                size *= _GROWTH
                size = min(size, MOST_BYTES * MOST_AT_ONCE)
        return Goodput(statistics.median(rates or [last]), max(len(rates), 1), moved)

    def _send_round(self, count: int, nbytes: int) -> float:
        labels = [next(self._labels) for _ in range(count)]
        self.ask("receive", labels=labels, bytes=nbytes)
        began = time.perf_counter()
        sending = [self.link.offer(_Noise(nbytes), label) for label in labels]
        for each in sending:
            each.wait(max(_MOST_SECONDS - (time.perf_counter() - began), 0.0))
        return time.perf_counter() - began

    def _receive_round(self, count: int, nbytes: int) -> float:
        labels = [next(self._labels) for _ in range(count)]
        self._expect(labels, nbytes)
        began = time.perf_counter()
        self.ask("send", labels=labels, bytes=nbytes)
        for _ in labels:
            try:
                failure = self._landed.get(timeout=max(_MOST_SECONDS - (time.perf_counter() - began), 0.001))
            except queue.Empty:
                raise TimeoutError(f"{count * nbytes} bytes were not here within {_MOST_SECONDS:g} s") from None
            if failure:
                raise TransferError(failure)
        return time.perf_counter() - began

    # -- both sides ----------------------------------------------------------------------------------------

    def _post(self, message: dict[str, Any]) -> None:
        self.link.send(json.dumps(message).encode(), ANSWER_SECONDS)

    def _expect(self, labels: list[int], nbytes: int) -> None:
        with self._lock:
            self._landing += len(labels)
            if self._memory is None:
                self._memory = memoryview(bytearray(MOST_BYTES * MOST_AT_ONCE))
            for i, label in enumerate(labels):  # each has its own, as tensors have: chunks are compared where they land
                memory = self._memory[i * MOST_BYTES :][:nbytes]
                self._sinks[label] = _Waste(memory, functools.partial(self._over, nbytes))

    def _over(self, nbytes: int, failure: str) -> None:
        with self._lock:
            self._landing -= 1
            self.received_bytes += 0 if failure else nbytes
        if self._about is None:
            self._landed.put(failure)

    def _place(self, label: int, again: Callable[[], None]) -> Sink | None:
        with self._lock:
            return self._sinks.pop(label, None)

    def _deliver(self, message: Delivery) -> None:
        try:
            told = json.loads(bytes(message))
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise ProtocolError("it says what is no message of a check")
        if self._about is None:
            if self._answers.qsize():
                raise ProtocolError("it answers what it was not asked")
            self._answers.put(told)
            return
        self._questions += 1
        if self._questions > _MOST_QUESTIONS:
            raise ProtocolError(f"it asks more than {_MOST_QUESTIONS} times")
        self._post(self._answer(told, self._about))

    def _answer(self, told: dict[str, Any], about: Callable[[Link], dict[str, Any]]) -> dict[str, Any]:
        match told:
            case {"ask": "about"}:
                return about(self.link)
            case {"ask": "ping"}:
                return {}
            case {"ask": "receive" | "send" as what, "labels": list(labels), "bytes": int(nbytes)} if (
                0 < len(labels) <= MOST_AT_ONCE
                and all(type(label) is int and 0 < label < 1 << 63 for label in labels)
                and len(set(labels)) == len(labels)
                and 0 < nbytes <= MOST_BYTES
            ):
                # The peer may know that a round is over a moment before this side does.
                self._sending = [sending for sending in self._sending if not sending.ended]
                if max(self._landing, len(self._sending)) > MOST_AT_ONCE:
                    raise ProtocolError("it asks for messages before those that it has asked for are over")
                if what == "receive":
                    self._expect(labels, nbytes)
                else:
                    self._sending += [self.link.offer(_Noise(nbytes), label) for label in labels]
                    self.sent_bytes += len(labels) * nbytes
                return {}
        raise ProtocolError("it asks for what a check does not have")
