"""One rail of the verbs fabric: a queue pair, what is posted on it, and the thread that hears of completions.

A write is an RDMA WRITE WITH IMM whose 32 bits are the notification. Where that does not do (iWARP has none, a digest
goes with the write, the device needs several requests for it, there is nothing to write) a small message, the notice,
follows the writes in the same chain: the receiver is told of it only when what was written before it is in its memory
(IB specification vol. 1, 9.5).

    rail's sending thread       write      register the source, post; blocks while the queue is full
    this module's thread        _run       completions -> landed, written; after an error, the end of the rail
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError
from nvflare_rdma.fabric.base import RemoteSlice
from nvflare_rdma.fabric.verbs.messages import GREETING, MESSAGE_BYTES, MessageRing, Notice, read, writes_of
from nvflare_rdma.fabric.verbs.ports import Access, MemoryRegion, Port, make_event
from nvflare_rdma.fabric.verbs.queue_pair import Completion, QueuePair, Work, messages_wait, writes_carry_immediates
from nvflare_rdma.fabric.verbs.registration_cache import Lease
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

SEND_DEPTH = 128
#: More exposures than that on one rail wait for receives, and the device has the peer's writes wait for those.
RECEIVE_DEPTH = 512
#: Of a device that has none wait: more than a link grants (its limit of a peer's open grants), and the greeting.
RECEIVE_DEPTH_NO_WAITING = 1100
_DEVICE_CHECK = 1  # seconds


class VerbsRailOwner(Protocol):
    """The endpoint, as its rails see it."""

    def take(self, rail: int, notification: int) -> None:
        """The exposure `notification` was answered over `rail`: it is over. Raises ProtocolError: there is none."""

    def landed(self, notification: int, length: int, digest: int) -> None:
        """See `CompletionHandler.landed`."""

    def written(self, notification: int) -> None:
        """See `CompletionHandler.written`."""

    def lease(self, port: Port, source: memoryview, abandoned: Callable[[], bool]) -> Lease:
        """Registered memory that holds what `source` does. Raises FabricError."""

    def release(self, lease: Lease) -> None:
        """Nothing reads the memory that `lease` gave any more."""

    def abandon(self) -> None:
        """A rail is ending: have `lease` look whether its is the one."""

    def rail_over(self, rail: int, error: Exception) -> None:
        """The last of a rail: its queue pair is closed, nothing is read or written for it any more."""


@dataclass(slots=True)
class _Write:
    """`notification` is None for the greeting."""

    notification: int | None
    requests: int
    lease: Lease | None = None


class VerbsRail:
    """Its thread takes events of the port's device too, as those of all rails do: any of them may be the last."""

    def __init__(self, number: int, port: Port, owner: VerbsRailOwner) -> None:
        self.number = number
        self.port = port
        self._owner = owner
        self._sends = min(SEND_DEPTH, port.max_work)
        depth = RECEIVE_DEPTH if messages_wait(port.info) else RECEIVE_DEPTH_NO_WAITING
        receives = min(depth, port.max_work, port.max_completions - self._sends)
        self._state = threading.Condition()
        self._up = False
        self._silent = False  # until the peer has greeted
        self._reason: Exception | None = None
        self._room = self._sends  # send requests that can be posted
        self._last = 0
        self._writes: dict[int, _Write] = {}  # what was posted and is not completed, in order
        self._places = deque(range(receives))
        self._owed = 0  # receives that are to be posted
        self._max_message = 0
        self._thread: threading.Thread | None = None
        self._opened: list[QueuePair | MemoryRegion] = []
        self._wake = make_event(port.info.device)
        try:
            self.queue_pair = QueuePair(port, self._sends, receives, MESSAGE_BYTES)
            self._opened.append(self.queue_pair)
            self._notices = MessageRing(port, self._sends, Access.SOURCE)
            self._opened.append(self._notices.region)
            self._received = MessageRing(port, receives, Access.RECEIVE)
            self._opened.append(self._received.region)
            self.queue_pair.prepare()
            self.expect()  # the greeting
        except BaseException:
            self._free()
            raise
        self._inline = self.queue_pair.inline_bytes >= MESSAGE_BYTES

    def __str__(self) -> str:
        return f"verbs rail {self.number} ({self.port.info.device}, queue pair {self.queue_pair.number})"

    # -- life ----------------------------------------------------------------------------------------------

    def start(self, connect: Callable[[QueuePair], None], max_message: int, greet: bool, wait: bool = False) -> None:
        """Connect and begin to listen. `greet`: be the first to send; `wait`: write nothing before the peer has.
        Raises FabricError, and is closed then."""
        self._max_message = max_message
        self._silent = wait
        try:
            connect(self.queue_pair)
            with self._state:
                if self._reason is not None:
                    raise self._reason
                name = f"rdma-verbs-{self.number}-{self.queue_pair.number}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._up = True
                self._thread.start()
        except (FabricError, RuntimeError) as error:
            self._up, self._thread = False, None
            self._free()
            raise FabricError(f"{self} can't be opened: {error}") from error
        if greet:
            self._greet()

    def _greet(self) -> None:
        self._post(1, lambda place: [Work([self._notices.put(place, GREETING)], None)], _Write(None, 1))

    def stop(self, reason: Exception) -> None:
        """Have the thread end the rail; `VerbsRailOwner.rail_over` follows if it was started. Idempotent."""
        with self._state:
            self._stop(reason)

    def _stop(self, reason: Exception) -> None:
        self._reason = self._reason or reason
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def join(self, timeout: float) -> None:
        """Wait for the thread; a rail that was never started is freed here."""
        if self._thread is None:
            self._free()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _free(self) -> None:
        with self._state:  # to the end: who calls it too closes the port next
            opened, self._opened = self._opened, []
            for each in opened:  # the queue pair first: then nothing reads the rings
                each.close()
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    def _run(self) -> None:
        error: Exception
        try:
            poller = select.poll()
            for fd in (self.queue_pair.fd, self._wake, self.port.events_fd):
                poller.register(fd, select.POLLIN)
            while True:
                poller.poll(_DEVICE_CHECK * 1000)
                if self._reason is not None:
                    raise self._reason
                self._check_device()
                self.queue_pair.rearm()
                self._complete()
        except Exception as ended:  # noqa: BLE001 - whatever it is, it ends the rail and is reported
            error = ended
        self._end(error)

    def _check_device(self) -> None:
        events = self.port.events()
        if events:
            log.info("%s: %s", self.port.info.device, ", ".join(events))
        if fatal := [event for event in events if self.port.is_fatal(event)]:
            raise FabricUnavailable(f"{self} broke: the device reports {', '.join(fatal)}")
        if self.port.gone:
            raise FabricUnavailable(f"{self} broke: the device was removed")

    def _complete(self) -> None:
        while found := self.queue_pair.completions():
            for completion in found:
                if completion.error:
                    raise self._broken(completion)
                if completion.received:
                    self._take(completion)
                elif completion.number:
                    self._sent(completion.number)

    def _broken(self, completion: Completion) -> FabricError:
        write = self._writes.get(completion.number)
        greeting = not completion.received and write is not None and write.notification is None
        if greeting and messages_wait(self.port.info):  # over iWARP the peer was reached before anything was sent
            return FabricUnavailable(f"{self}: the peer can't be reached: {completion.error}")
        return FabricError(f"{self} broke: {completion.error}")

    def _end(self, error: Exception) -> None:
        """The thread's last act."""
        with self._state:
            self._up = False
            self._state.notify_all()
        try:
            self._owner.abandon()
            self.queue_pair.fail()
            if not isinstance(error, ProtocolError):
                with contextlib.suppress(FabricError, ProtocolError):
                    self._complete()  # what came before the error counts
            # First: who exposes meanwhile posts a receive, and pyverbs crashes with a queue pair that is closed.
            self._free()
            for write in self._writes.values():
                self._over(write)
            self._writes.clear()
        except Exception:
            log.exception("%s did not end in order", self)  # but it ends
        self._owner.rail_over(self.number, error)

    # -- receiving -----------------------------------------------------------------------------------------

    def expect(self) -> None:
        """One more message, or notice, of the peer will come. Raises FabricError."""
        with self._state:
            self._owed += 1
            self._post_receives()

    def _post_receives(self) -> None:
        while self._owed and self._places and self._opened:
            place = self._places.popleft()
            self.queue_pair.post_receive(place, self._received.segment(place))
            self._owed -= 1

    def _take(self, completion: Completion) -> None:
        notification, length, digest = completion.immediate, completion.length, 0
        if notification is None:
            try:
                notice = read(self._received.get(completion.number, completion.length))
            except ValueError as error:
                raise ProtocolError(f"the peer's message over {self} can't be: {error}") from error
            if notice is not None:
                notification, length, digest = notice.notification, notice.length, notice.digest
        with self._state:
            self._places.append(completion.number)
            if notification is None:
                self._silent = False
                self._state.notify_all()
                # The end of an iWARP connection is noticed by what it flushes: one more receive than is granted.
                self._owed += 1
            self._post_receives()
        if notification is not None:
            self._owner.take(self.number, notification)
            self._owner.landed(notification, length, digest)

    # -- sending -------------------------------------------------------------------------------------------

    def write(self, source: memoryview, remote: RemoteSlice, notification: int, digest: int) -> None:
        """See `Endpoint.write`."""
        write = _Write(notification, 1)
        try:
            if self._up and len(source):
                write.lease = self._owner.lease(self.port, source, lambda: not self._up)
            segments = write.lease.segments if write.lease is not None else []
            writes = writes_of(segments, remote, self._max_message, self.queue_pair.max_segments)
            if len(writes) == 1 and not digest and writes_carry_immediates(self.port.info):
                with_immediate = [Work(writes[0].segments, writes[0].remote, notification)]
                posted = self._post(1, lambda place: with_immediate, write)
            else:
                notice = Notice(notification, len(source), digest).pack()
                write.requests = len(writes) + 1
                posted = self._post(
                    write.requests,
                    lambda place: [*writes, Work([self._notices.put(place, notice)], None, inline=self._inline)],
                    write,
                )
        except FabricError as error:
            self.stop(error)
            posted = False
        if not posted:
            self._over(write)

    def _post(self, requests: int, works: Callable[[int], list[Work]], write: _Write) -> bool:
        """Post `works`, given a place for the notice, when there is room. False if the rail is down."""
        if requests > self._sends:
            raise FabricError(f"{self}: a write needs {requests} requests, the device takes {self._sends}")
        with self._state:
            self._state.wait_for(lambda: not self._up or (self._room >= requests and not self._silent))
            if not self._up:
                return False
            self._last += 1
            self._room -= requests
            self._writes[self._last] = write
            try:
                self.queue_pair.post(works(self._last % self._sends), self._last)
            except FabricError as error:
                self._stop(error)  # a part of the chain may be under way: it ends with the queue pair
            return True

    def _sent(self, number: int) -> None:
        with self._state:
            write = self._writes.pop(number)
            self._room += write.requests
            self._state.notify_all()
        self._over(write)

    def _over(self, write: _Write) -> None:
        if write.lease is not None:
            self._owner.release(write.lease)
            write.lease = None
        if write.notification is not None:
            self._owner.written(write.notification)
