"""The receiving half of a connection: which chunks are granted, where they are, and which are still missing.

What has landed is never asked for again; what was granted over a rail that broke, or arrived damaged, is granted
anew. That set is all there is to resuming a transfer.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nvflare_rdma.channel.controllers import Controller
from nvflare_rdma.channel.protocol import events, wire
from nvflare_rdma.channel.protocol.limits import ChannelLimits, check_unit, whole_units
from nvflare_rdma.channel.protocol.loads import RailLoads
from nvflare_rdma.channel.protocol.state import RECEIVE, Input, Receive, illegal
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.fabric import RemoteSlice


@dataclass(slots=True)
class _IncomingTransfer:
    length: int
    staged: bool
    progress_at: float
    state: Receive = Receive.OFFERED
    #: When the first chunk was granted: until then it is not the peer that it waits for.
    began_at: float = float("inf")
    planned: int = 0
    landed: int = 0
    open_chunks: int = 0
    unit: int = 1
    most: int = 0
    """Bytes of a chunk; 0 is no limit."""
    room: int = 0
    granted: int = 0
    """Bytes that may be, and are, granted and have not landed; a room of 0 is no limit."""
    #: (offset, length) of chunks that were planned and have to be granted again
    again: deque[tuple[int, int]] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class _OpenGrant:
    transfer: int
    offset: int
    length: int
    rail: int
    granted_at: float


class Incoming:
    """All messages that a connection receives. `emit` takes control messages and `happened` events, both in order."""

    def __init__(
        self,
        limits: ChannelLimits,
        controller: Controller,
        emit: Callable[[wire.Message], None],
        happened: Callable[[events.Event], None],
    ) -> None:
        self.granted_chunks = 0
        self.lost_chunks = 0
        self.most_granted = 0  # bytes that were granted and had not landed
        self._limits = limits
        self._controller = controller
        self._emit = emit
        self._happened = happened
        self._transfers: dict[int, _IncomingTransfer] = {}
        self._grantable: deque[int] = deque()  # transfers with something left to grant, in the order of acceptance
        #: Notification -> what is exposed under it. Those of a failed transfer stay until the sender answers.
        self._exposures: dict[int, _OpenGrant] = {}
        #: Transfer that has failed, and whose grants the sender has not answered all -> since when, as `check` saw it.
        self._unanswered: dict[int, float] = {}
        self._in_flight = 0
        self._loads = RailLoads()
        self._overhead = 0
        self._max_chunk = 0
        self._max_staged = 0
        self._max_open = 0
        self._last_offered = 0
        self._last_notification = 0
        self._damaged_in_a_row = 0

    # -- rails ---------------------------------------------------------------------------------------------

    def set_controller(self, controller: Controller) -> None:
        """Take another controller, for another fabric. Nothing is granted at this time."""
        self._controller = controller

    def open(
        self, rails: Iterable[int], overhead: int, max_chunk: int, max_staged: int, max_open: int, now: float
    ) -> None:
        """Grant over rails that are up. Sealing adds `overhead` bytes to a chunk, `max_chunk` bytes are the longest
        that they carry, `max_staged` the longest that the peer makes in memory of its own, and it works on `max_open`
        grants at once."""
        self._loads.open(rails)
        self._controller.set_rails(len(self._loads))
        self._overhead, self._max_chunk, self._max_open = overhead, max_chunk, max_open
        self._max_staged = max_staged
        self.plan(now)

    def rail_up(self, rail: int, now: float) -> None:
        """Grant over one more rail."""
        self._loads.add(rail)
        self._controller.set_rails(len(self._loads))
        self.plan(now)

    def rail_down(self, rail: int, now: float) -> None:
        """Grant the unfinished chunks of a rail again: nothing lands over it any more."""
        self._loads.remove(rail)
        self._controller.set_rails(len(self._loads))
        for notification, exposure in list(self._exposures.items()):
            if exposure.rail == rail:
                self._happened(events.RevokeChunk(notification, answered=False))
                self._lose(notification, now)
        self.plan(now)

    def void(self, now: float) -> None:
        """Take all chunks back that have not landed: all rails are gone."""
        rails = list(self._loads)
        self._loads.open(())  # so that nothing is granted over the next while one is taken away
        for rail in rails:
            self.rail_down(rail, now)

    # -- what the peer and the runner say ------------------------------------------------------------------

    def offered(self, offer: wire.Offer, now: float) -> None:
        """The peer offers a message. Raises ProtocolError if it may not."""
        limits = self._limits
        if offer.transfer <= self._last_offered:
            raise ProtocolError(f"transfer {offer.transfer} is offered after {self._last_offered}")
        inline = 0 if offer.label else limits.inline_bytes
        if not inline < offer.length <= limits.max_message_bytes:
            raise ProtocolError(
                f"a message of {offer.length} bytes is offered; {inline} go inline, "
                f"{limits.max_message_bytes} are the most"
            )
        if len(self._transfers) >= limits.max_incoming:
            raise ProtocolError(f"more than {limits.max_incoming} messages are offered at once")
        self._last_offered = offer.transfer
        self._transfers[offer.transfer] = _IncomingTransfer(offer.length, offer.staged, now)
        self._happened(events.MessageOffered(offer.transfer, offer.length, offer.label))

    def accept(self, transfer: int, now: float, unit: int, room: int, most: int) -> None:
        """See `Connection.accept`."""
        check_unit(unit)
        incoming = self._transfers.get(transfer)
        if incoming is None:
            return
        self._advance(transfer, incoming, Input.ACCEPTED)
        incoming.progress_at, incoming.unit, incoming.room, incoming.most = now, unit, room, most
        self._grantable.append(transfer)
        self.plan(now)

    def refuse(self, transfer: int, reason: str) -> None:
        """See `Connection.refuse`."""
        if (incoming := self._transfers.get(transfer)) is not None:
            self._emit(wire.Refuse(transfer, reason))
            self._advance(transfer, incoming, Input.REFUSED_HERE, reason)

    def withdrawn(self, message: wire.Withdraw) -> None:
        """The peer gives a message up. Raises ProtocolError if it was never offered."""
        if not 0 < message.transfer <= self._last_offered:
            raise ProtocolError(f"transfer {message.transfer} is withdrawn, which was never offered")
        if (incoming := self._transfers.get(message.transfer)) is not None:
            self._advance(message.transfer, incoming, Input.WITHDRAW, message.reason)

    def exposed(self, chunk: events.ExposeChunk, remote: RemoteSlice) -> None:
        """See `Connection.exposed`."""
        self._emit(wire.Grant(chunk.transfer, chunk.offset, chunk.length, remote, chunk.notification, chunk.rail))

    def landed(self, notification: int, length: int, now: float) -> None:
        """See `Connection.landed`."""
        exposure = self._close(notification)
        incoming = self._transfers.get(exposure.transfer)
        # An empty write answers the grant of a message that the sender gave up: its WITHDRAW is on the way.
        if incoming is not None and length:
            if length != exposure.length + self._overhead:
                raise ProtocolError(
                    f"the peer wrote {length} bytes where {exposure.length + self._overhead} were granted"
                )
            self._loads.landed(exposure.rail, exposure.length, now)
            self._controller.landed(exposure.length, exposure.granted_at, now, exposure.rail)
            self._damaged_in_a_row = 0
            incoming.landed += exposure.length
            incoming.progress_at = now
            if incoming.landed == incoming.length:
                self._advance(exposure.transfer, incoming, Input.ALL_LANDED)
        else:
            self._controller.forgotten(exposure.length, exposure.granted_at, now, exposure.rail)
        self.plan(now)

    def damaged(self, notification: int, now: float) -> None:
        """See `Connection.damaged`."""
        exposure = self._exposures.get(notification)
        if exposure is not None and exposure.transfer in self._transfers:  # what is not wanted any more is no damage
            self._damaged_in_a_row += 1
        if self._damaged_in_a_row > self._limits.max_damaged:
            raise TransferError(f"{self._damaged_in_a_row} chunks in a row arrived damaged")
        self._lose(notification, now)
        self.plan(now)

    # -- granting ------------------------------------------------------------------------------------------

    def plan(self, now: float) -> None:
        """Grant as many chunks as the controller and the peer allow, oldest message first."""
        controller = self._controller
        while self._loads and (chunk := self._next()) is not None:
            transfer, offset, length = chunk
            incoming = self._transfers[transfer]
            full = self._in_flight and self._in_flight + length > controller.window_bytes
            if full or len(self._exposures) >= self._max_open:
                return
            if incoming.again:
                incoming.again.popleft()
            else:
                incoming.began_at = min(incoming.began_at, now)
                incoming.planned += length
            rail = self._loads.soonest(length, now)
            notification = self._new_notification()
            self._exposures[notification] = _OpenGrant(transfer, offset, length, rail, now)
            incoming.open_chunks += 1
            incoming.granted += length
            self._in_flight += length
            self.most_granted = max(self.most_granted, self._in_flight)
            self._loads.granted(rail, length, now)
            self.granted_chunks += 1
            controller.granted(length, now, rail)
            self._happened(events.ExposeChunk(transfer, offset, length, notification, rail))
        if self._loads:
            controller.idle(now)

    def _next(self) -> tuple[int, int, int] | None:
        """The next chunk of the oldest message that has one, and room for it: transfer, offset and length."""
        place = 0
        while place < len(self._grantable):
            transfer = self._grantable[place]
            incoming = self._transfers.get(transfer)
            if incoming is None or not (chunk := self._next_chunk(incoming)):
                del self._grantable[place]
            elif incoming.room and incoming.granted and incoming.granted + chunk[1] > incoming.room:
                place += 1
            else:
                return transfer, *chunk
        return None

    def _next_chunk(self, incoming: _IncomingTransfer) -> tuple[int, int] | None:
        staged = self._max_staged if incoming.staged or self._overhead else 0
        limits = (self._max_chunk, incoming.room, incoming.most, staged)
        most = whole_units(min(limit for limit in limits if limit), incoming.unit)
        if incoming.again:
            offset, length = incoming.again[0]
            if length > most:  # the rails that are open now carry less at once
                incoming.again[0] = (offset, most)
                incoming.again.insert(1, (offset + most, length - most))
            return incoming.again[0]
        left = incoming.length - incoming.planned
        length = min(whole_units(self._controller.chunk_bytes, incoming.unit), most)
        # The end of a message is not worth a chunk of its own: a frame of 1 MiB, for one, has some header with it.
        if left <= min(2 * length, most, self._controller.window_bytes):
            length = left
        return (incoming.planned, min(length, left)) if left else None

    def _new_notification(self) -> int:
        # 32 bits is what RDMA's immediate value holds; numbers still in use are passed over after a wrap.
        while True:
            self._last_notification = (self._last_notification + 1) & 0xFFFFFFFF
            if self._last_notification not in self._exposures:
                return self._last_notification

    def _close(self, notification: int) -> _OpenGrant:
        exposure = self._exposures.pop(notification, None)
        if exposure is None:
            raise ProtocolError(f"the peer wrote to slice {notification}, which is not exposed")
        self._in_flight -= exposure.length
        self._loads.ended(exposure.rail, exposure.length)
        if (incoming := self._transfers.get(exposure.transfer)) is not None:
            incoming.open_chunks -= 1
            incoming.granted -= exposure.length
        return exposure

    def _lose(self, notification: int, now: float) -> None:
        exposure = self._close(notification)
        self.lost_chunks += 1
        self._controller.lost(exposure.length, now, exposure.rail)
        if (incoming := self._transfers.get(exposure.transfer)) is not None:
            incoming.again.append((exposure.offset, exposure.length))
            if exposure.transfer not in self._grantable:
                self._grantable.appendleft(exposure.transfer)  # it holds memory already

    # -- ends ----------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Raise TransferError if a message that is being received is too slow, or one that has failed keeps its memory
        because the peer does not answer what was granted of it."""
        limits = self._limits
        failed = {grant.transfer for grant in self._exposures.values()} - self._transfers.keys()
        self._unanswered = {transfer: self._unanswered.get(transfer, now) for transfer in failed}
        for number, since in self._unanswered.items():
            if now - since > limits.stall_timeout:
                raise TransferError(
                    f"transfer {number} ended {limits.stall_timeout:g} s ago, and the peer has not answered all that "
                    "was granted of it"
                )
        for number, incoming in self._transfers.items():
            # One that waits for its turn, or for memory, is not stalled by the peer.
            waits = incoming.open_chunks or (incoming.planned == incoming.length and not incoming.again)
            if waits and now - incoming.progress_at > limits.stall_timeout:
                raise TransferError(
                    f"receiving transfer {number} made no progress for {limits.stall_timeout:g} s: "
                    f"{incoming.landed} of {incoming.length} bytes came"
                )
            due = (now - incoming.began_at - limits.stall_timeout) * limits.min_bytes_per_second
            if incoming.landed < min(due, incoming.length):
                raise TransferError(
                    f"receiving transfer {number} is too slow: {incoming.landed} of {incoming.length} bytes came, "
                    f"at less than {limits.min_bytes_per_second} bytes/s"
                )

    def progress(self) -> dict[int, tuple[int, int]]:
        """Transfer -> (bytes landed, bytes in all)."""
        return {number: (incoming.landed, incoming.length) for number, incoming in self._transfers.items()}

    def end(self, reason: str) -> None:
        """The connection has ended: fail all messages."""
        for transfer in self._transfers:
            self._happened(events.ReceiveFailed(transfer, reason))
        self._transfers.clear()
        self._exposures.clear()
        self._grantable.clear()
        self._loads.open(())

    def _advance(self, transfer: int, incoming: _IncomingTransfer, happening: Input, reason: str = "") -> None:
        new = RECEIVE.get((incoming.state, happening))
        if new is None:
            raise illegal(f"receiving transfer {transfer}", incoming.state, happening)
        incoming.state = new
        if new is Receive.DONE:
            del self._transfers[transfer]
            self._emit(wire.Done(transfer))
            self._happened(events.MessageReceived(transfer))
        elif new is Receive.FAILED:
            del self._transfers[transfer]
            with contextlib.suppress(ValueError):
                self._grantable.remove(transfer)
            for notification, exposure in self._exposures.items():
                if exposure.transfer == transfer:
                    self._happened(events.RevokeChunk(notification, answered=True))
            self._happened(events.ReceiveFailed(transfer, reason))
