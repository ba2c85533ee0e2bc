"""The sending half of a connection: what is offered, what the peer has granted, and which writes are under way."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from nvflare_rdma.channel.protocol import events, wire
from nvflare_rdma.channel.protocol.limits import ChannelLimits
from nvflare_rdma.channel.protocol.state import SEND, Input, Send, illegal
from nvflare_rdma.errors import ProtocolError, TransferError

#: A peer may ask for a message this many times over, for chunks that were lost or damaged on the way.
MAX_REPEATS = 16


@dataclass(slots=True)
class _OutgoingTransfer:
    length: int
    staged: bool
    progress_at: float
    state: Send = Send.OFFERED
    granted: int = 0
    repeated: int = 0
    open_writes: int = 0


class Outgoing:
    """All messages that a connection sends. A chunk that is made in memory of this side has at most `max_staged` bytes.
    `emit` takes control messages and `happened` events, both in order."""

    def __init__(
        self,
        limits: ChannelLimits,
        max_staged: int,
        emit: Callable[[wire.Message], None],
        happened: Callable[[events.Event], None],
    ) -> None:
        self._limits = limits
        self._max_staged = max_staged
        self._emit = emit
        self._happened = happened
        self._transfers: dict[int, _OutgoingTransfer] = {}
        self._writes: dict[int, int] = {}  # notification of the peer -> transfer
        self._next = 1
        self._last_notification = -1

    def submit(self, length: int, limit: int, now: float, label: int, staged: bool) -> int:
        """See `Connection.submit`; the peer takes up to `limit` bytes."""
        if length > limit:
            raise TransferError(f"a message of {length} bytes is larger than the peer's {limit}")
        number = self._next
        self._next += 1
        self._transfers[number] = _OutgoingTransfer(length, staged, now)
        self._emit(wire.Offer(number, length, label, staged))
        return number

    def withdraw(self, transfer: int, reason: str) -> None:
        """See `Connection.withdraw`."""
        out = self._transfers.get(transfer)
        if out is not None and (out.state, Input.WITHDRAWN_HERE) in SEND:
            self._emit(wire.Withdraw(transfer, reason))
            self._advance(transfer, out, Input.WITHDRAWN_HERE, reason)

    def written(self, notification: int, now: float) -> None:
        """See `Connection.written`."""
        transfer = self._writes.pop(notification, None)
        out = self._transfers.get(transfer) if transfer is not None else None
        if transfer is None or out is None:
            return  # its rails, or its transfer, failed meanwhile
        out.open_writes -= 1
        out.progress_at = now
        self._finish(transfer, out)

    def void(self) -> None:
        """Forget all writes: all rails are gone, and the peer grants anew what it misses."""
        self._writes.clear()
        for transfer, out in list(self._transfers.items()):
            out.open_writes = 0
            self._finish(transfer, out)

    # -- what the peer says --------------------------------------------------------------------------------

    def granted(self, grant: wire.Grant, rails: Collection[int], overhead: int, max_chunk: int, now: float) -> None:
        """Write what the peer grants. `rails` are those that were opened, sealing adds `overhead` bytes to a chunk, and
        `max_chunk` bytes are the longest that the rails carry."""
        if grant.rail not in rails:
            raise ProtocolError(f"a grant names rail {grant.rail}, which is none of the {len(rails)} that were opened")
        if grant.length > max_chunk:
            raise ProtocolError(f"a grant of {grant.length} bytes, {max_chunk} are the most")
        if grant.remote.length != grant.length + overhead:
            raise ProtocolError(f"a grant of {grant.length} bytes points to a slice of {grant.remote.length}")
        if len(self._writes) >= self._limits.max_writes:
            raise ProtocolError(f"more than {self._limits.max_writes} grants are open")
        # Rising numbers (modulo 2^32, RFC 1982) can't come twice in a transfer: a seal's nonce is made of them.
        if not 0 < (grant.notification - self._last_notification) & 0xFFFFFFFF < 1 << 31:
            raise ProtocolError(f"notification {grant.notification} is granted after {self._last_notification}")
        self._last_notification = grant.notification
        out = self._find(grant.transfer)
        if out is not None:
            if (out.staged or overhead) and grant.length > self._max_staged:
                raise ProtocolError(
                    f"a grant of {grant.length} bytes for what is made here, {self._max_staged} are the most"
                )
            self._check_range(grant, out)
            if out.state is Send.OFFERED:
                out.progress_at = now  # from now on only what is written counts: a peer may grant for ever
            self._advance(grant.transfer, out, Input.GRANT)
            out.open_writes += 1
        # The grant of a transfer that has failed here is answered too, by an empty write.
        self._writes[grant.notification] = grant.transfer
        self._happened(
            events.WriteChunk(grant.transfer, grant.offset, grant.length, grant.remote, grant.notification, grant.rail)
        )

    def granted_in_vain(self, grant: wire.Grant) -> None:
        """A grant that is void already: it counts as given, so that the next ones are in order, and that is all."""
        if (out := self._find(grant.transfer)) is not None:
            self._check_range(grant, out)
            self._advance(grant.transfer, out, Input.GRANT)

    def _check_range(self, grant: wire.Grant, out: _OutgoingTransfer) -> None:
        end = grant.offset + grant.length
        again = grant.offset < out.granted
        if not grant.length or end > (out.granted if again else out.length) or grant.offset > out.granted:
            raise ProtocolError(
                f"grant of {grant.length} bytes at {grant.offset} of transfer {grant.transfer}, which is "
                f"{out.length} bytes of which {out.granted} are granted"
            )
        least = self._limits.peer_chunk_bytes
        if again:
            out.repeated += max(grant.length, least)
            if out.repeated > MAX_REPEATS * max(out.length, least):
                raise ProtocolError(f"transfer {grant.transfer} was asked for more than {MAX_REPEATS} times over")
            return
        if grant.length < least and end != out.length:
            raise ProtocolError(f"a grant of {grant.length} bytes, {least} are the least")
        out.granted = end

    def done(self, transfer: int) -> None:
        """The peer has all of a message. Raises ProtocolError if that can't be."""
        if (out := self._find(transfer)) is not None:
            if out.granted != out.length:
                raise ProtocolError(f"transfer {transfer} is done with {out.granted} bytes granted")
            self._advance(transfer, out, Input.DONE)
            self._finish(transfer, out)

    def refused(self, message: wire.Refuse) -> None:
        """The peer does not take a message. Raises ProtocolError if it was never offered."""
        if (out := self._find(message.transfer)) is not None:
            self._advance(message.transfer, out, Input.REFUSE, message.reason)

    def _find(self, transfer: int) -> _OutgoingTransfer | None:
        """The transfer, or None if it has ended here already (its end and the peer's message crossed)."""
        if not 0 < transfer < self._next:
            raise ProtocolError(f"the peer speaks of transfer {transfer}, which was never offered")
        return self._transfers.get(transfer)

    # -- ends ----------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Raise TransferError if the peer asks for nothing more of a message that it has begun to take."""
        for number, out in self._transfers.items():
            # A message that was only offered waits for the receiver's memory: that is no stall of the link.
            if out.state is not Send.OFFERED and now - out.progress_at > self._limits.stall_timeout:
                raise TransferError(
                    f"sending transfer {number} ({out.length} bytes) made no progress for "
                    f"{self._limits.stall_timeout:g} s in state {out.state.name}"
                )

    def end(self, reason: str) -> None:
        """The connection has ended: fail all messages."""
        for transfer in self._transfers:
            self._happened(events.SendFailed(transfer, reason))
        self._transfers.clear()
        self._writes.clear()

    def _finish(self, transfer: int, out: _OutgoingTransfer) -> None:
        if out.state is Send.CONFIRMED and not out.open_writes:
            self._advance(transfer, out, Input.WRITES_ENDED)

    def _advance(self, transfer: int, out: _OutgoingTransfer, happening: Input, reason: str = "") -> None:
        new = SEND.get((out.state, happening))
        if new is None:
            raise illegal(f"sending transfer {transfer}", out.state, happening)
        out.state = new
        if new is Send.DONE:
            del self._transfers[transfer]
            self._happened(events.MessageSent(transfer))
        elif new is Send.FAILED:
            del self._transfers[transfer]
            self._happened(events.SendFailed(transfer, reason))
