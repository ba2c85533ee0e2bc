"""What a link sends: the messages that wait for the peer, and the window that bounds them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from nvflare_rdma.channel import sealing
from nvflare_rdma.channel.bodies import Source, Take
from nvflare_rdma.channel.protocol import events
from nvflare_rdma.channel.rails import MakeChunk, RailSet
from nvflare_rdma.errors import RdmaError, SendTimeoutError, TransferError
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Sending:
    """A message that was handed to `Link.send` or `Link.offer`."""

    lock: threading.Lock
    transfer: int
    """Its number; 0 for a message that went on the control stream at once."""
    waiting: int = 0
    """Bytes that the peer has not granted yet."""
    reads: int = 0
    """Writes that may still read the message; it is the caller's again when there is none."""
    offered: bool = False
    """Whether it came by `Link.offer`."""
    over: bool = False
    failure: str = ""
    reached: int = 0
    """Bytes that the peer has granted so far. What was granted again counts once."""
    resent_chunks: int = 0
    """Chunks that were granted again, because they were lost or damaged."""
    lost: Callable[[str], None] | None = None
    """Called, without the lock, with the reason if the peer refuses the message."""
    waiter: threading.Condition | None = None
    """What `wait` waits on, if somebody does: not the link's, so that chunks of other messages wake nobody up."""

    @property
    def ended(self) -> bool:
        """Whether the message has been sent, or failed, and no write reads it any more."""
        return self.over and not self.reads

    def wait(self, timeout: float) -> None:
        """Wait until the peer has the whole message.

        Raises:
            TransferError: the peer will not have it. SendTimeoutError: it has not within `timeout` seconds.
        """
        with self.lock:
            self.waiter = self.waiter or threading.Condition(self.lock)
            if not self.waiter.wait_for(lambda: self.ended, timeout):
                raise SendTimeoutError(f"transfer {self.transfer} was not over within {timeout:g} s")
        if self.failure:
            raise TransferError(f"transfer {self.transfer} failed: {self.failure}")


@dataclass(slots=True)
class _Read:
    """A write that may still read a message. It begins when its chunk is made, which may wait for memory."""

    sending: Sending
    rail: int
    began_at: float = float("inf")


class Outbox:
    """What a link sends. All methods are called under the link's `lock`, which is that of `room`. `withdraw` gives up a
    message that can't be read; it is called without the lock."""

    def __init__(
        self,
        lock: threading.Lock,
        room: threading.Condition,
        window: int,
        take: Take,
        withdraw: Callable[[int, str], None],
        name: str,
    ) -> None:
        self.waiting = 0
        """Bytes that the peer has not granted yet: what is granted is bounded by the peer's controller."""
        self._lock = lock
        self._room = room
        self._window = window
        self._take = take
        self._withdraw = withdraw
        self._name = name
        self._messages: dict[int, tuple[Source, Sending]] = {}
        self._reads: dict[tuple[RailSet | None, int], _Read] = {}
        self._sealer: sealing.Sealer | None = None
        self._checked = False

    def set_protection(self, sealer: sealing.Sealer | None, checked: bool) -> None:
        """Seal, or checksum, the chunks that are granted from now on."""
        self._sealer, self._checked = sealer, checked

    def is_work(self, transfer: int) -> bool:
        """Whether making a chunk of a message is work, and not just a look at memory."""
        entry = self._messages.get(transfer)
        return self._checked or self._sealer is not None or (entry is not None and not entry[0].ready)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is being sent."""
        return not self._messages

    def is_offered(self, transfer: int) -> bool:
        """Whether a message came by `Link.offer`."""
        entry = self._messages.get(transfer)
        return entry is not None and entry[1].offered

    def wait_for_room(self, length: int, used: int, timeout: float) -> bool:
        """Say whether `length` bytes fit into the window beside `used`. If not, wait once: the caller looks again.

        Raises:
            SendTimeoutError: there was no room within `timeout` seconds.
        """
        if used == 0 or used + length <= self._window:
            return True
        if timeout <= 0 or not self._room.wait(timeout):
            raise SendTimeoutError(
                f"{self._name}: the peer did not make room for {length} bytes in time: {used} bytes wait for it "
                "(streaming_send_timeout)"
            )
        return False

    def add(
        self, transfer: int, message: Source, windowed: bool = True, lost: Callable[[str], None] | None = None
    ) -> Sending:
        """Take a message over. If `windowed`, its bytes count as waiting until they are granted. For `lost` see
        `Sending`."""
        sending = Sending(self._lock, transfer, message.nbytes if windowed else 0, offered=not windowed, lost=lost)
        self._messages[transfer] = (message, sending)
        self.waiting += sending.waiting
        return sending

    def granted(self, transfer: int, offset: int, length: int) -> None:
        """Count a chunk that the peer has granted."""
        if (entry := self._messages.get(transfer)) is not None:
            sending = entry[1]
            sending.resent_chunks += offset < sending.reached
            sending.reached = max(sending.reached, offset + length)
            self._no_longer_waits(sending, min(length, sending.waiting))

    def _no_longer_waits(self, sending: Sending, nbytes: int) -> None:
        sending.waiting -= nbytes
        self.waiting -= nbytes
        if nbytes:
            self._room.notify_all()

    def finish(self, transfer: int, failure: str) -> Callable[[str], None] | None:
        """The peer has the message; or it failed, if `failure` says why. Returns the message's `lost`."""
        entry = self._messages.pop(transfer, None)
        sending = None
        if entry is not None:
            _, sending = entry
            sending.over, sending.failure = True, failure
            self._no_longer_waits(sending, sending.waiting)
            self._look(sending)
            if not self._messages:
                self._room.notify_all()
        return sending.lost if sending is not None else None

    @staticmethod
    def _look(sending: Sending) -> None:
        if sending.ended and sending.waiter is not None:
            sending.waiter.notify_all()

    def clear(self, failure: str) -> None:
        """Fail all messages, as the connection has ended."""
        for transfer in list(self._messages):
            self.finish(transfer, failure)
        self._room.notify_all()

    def drain(self, timeout: float) -> None:
        """Wait until nothing is in flight, or for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._messages and (remaining := deadline - time.monotonic()) > 0:
            self._room.wait(remaining)

    def read_ended(self, rails: RailSet | None, notification: int) -> None:
        """Count a write over `rails` as over: it does not read its source any more."""
        read = self._reads.pop((rails, notification), None)
        if read is not None:
            read.sending.reads -= 1
            self._look(read.sending)

    def slow_rails(self, now: float, limit: float) -> set[tuple[RailSet, int]]:
        """The rails on which a write has been under way for `limit` seconds: they are to be broken off. Each holds this
        side's memory for sending, and its message is given up when it stalls as a whole."""
        slow = ((rails, read.rail) for (rails, _), read in self._reads.items() if read.began_at <= now - limit)
        found = {(rails, rail) for rails, rail in slow if rails is not None and rails.fabric != "control"}
        for _, rail in found:
            log.warning("%s: a chunk takes more than %g s on rail %d, which is broken off", self._name, limit, rail)
        return found

    def rails_closed(self, rails: RailSet) -> None:
        """Count all writes over `rails` as over."""
        for key in [key for key in self._reads if key[0] is rails]:
            self.read_ended(*key)

    def make_chunk(self, rails: RailSet, chunk: events.WriteChunk) -> MakeChunk:
        """Return what makes the bytes of a chunk for `rails`, sealed or checked as chunks are now.

        It is called without the lock. It makes nothing if the message is given up, or the rails are void, before it
        begins: the grant is answered with an empty write. If it begins, `read_ended` or `rails_closed` has to follow.
        It knows the message by its number only: a chunk that waits for its rail keeps no tensor alive whose message is
        over.
        """
        return functools.partial(self._make, rails, chunk, self._sealer, self._checked)

    def _make(
        self, rails: RailSet, chunk: events.WriteChunk, sealer: sealing.Sealer | None, checked: bool
    ) -> tuple[memoryview, int]:
        with self._lock:
            entry = self._messages.get(chunk.transfer)
            if entry is None or rails.void:
                return _nothing()
            message, sending = entry
            sending.reads += 1
            read = self._reads[rails, chunk.notification] = _Read(sending, chunk.rail)
        try:
            made = self._prepare(chunk, message, sealer, checked)
            read.began_at = time.monotonic()
            return made
        except Exception as error:
            if not isinstance(error, RdmaError | OSError | MemoryError):
                log.exception("%s: message %d can't be read", self._name, chunk.transfer)
            # The grant is answered with nothing, as for every message that is withdrawn.
            self._withdraw(chunk.transfer, f"the sender can't read it: {error}")
            return _nothing()

    def _prepare(
        self, chunk: events.WriteChunk, message: Source, sealer: sealing.Sealer | None, checked: bool
    ) -> tuple[memoryview, int]:
        if sealer is None:
            source = message.read(chunk.offset, chunk.length, self._take)
            return source, sealing.checksum(source) if checked else 0
        length, both = chunk.length + sealing.TAG_BYTES, list[memoryview]()

        def take(nbytes: int) -> memoryview:
            """Room for the seal with it: who has one of two slots and waits for the other may wait for ever."""
            slot = self._take(nbytes + length)
            both.append(slot[nbytes:])
            return slot[:nbytes]

        source = message.read(chunk.offset, chunk.length, take)
        sealed = both[0] if both else self._take(length)
        sealer.seal_into(chunk.transfer, chunk.offset, chunk.notification, source, sealed)
        return sealed, 0


def _nothing() -> tuple[memoryview, int]:
    return memoryview(b""), 0
