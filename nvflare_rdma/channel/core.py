"""The receiver-driven chunk protocol, without I/O.

Bytes of the control stream and the time come in as arguments; bytes to send and events come out. Whoever runs
it (see `link.py`) owns sockets, memory and threads, and calls one method at a time.

    offer -> grant -> write -> done: the receiver grants what it has memory for, chunk by chunk and at most
    `depth` at a time, so that it alone sets the pace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvflare_rdma.channel import events, wire
from nvflare_rdma.channel.events import Event
from nvflare_rdma.channel.state import PHASE, RECEIVE, SEND, Input, Phase, Receive, Role, Send, illegal
from nvflare_rdma.errors import LocalProtocolError, ProtocolError, TransferError
from nvflare_rdma.fabric.base import RemoteSlice

MAX_INLINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class ChannelLimits:
    """What this side allows. ``chunk_bytes`` and ``depth`` shape what it grants; times are in seconds.

    ``peer_depth`` and ``peer_chunk_bytes`` bound what a peer may ask of this side as a sender: grants open at once,
    and the smallest chunk that is not a message's last. A message that is being received must come at
    ``min_bytes_per_second`` on average, or its memory would be lost to others for as long as the peer likes.
    """

    max_message_bytes: int
    chunk_bytes: int = 1024 * 1024
    depth: int = 8
    inline_bytes: int = MAX_INLINE_BYTES
    max_incoming: int = 4096
    peer_depth: int = 64
    peer_chunk_bytes: int = 64 * 1024
    handshake_timeout: float = 30.0
    stall_timeout: float = 120.0
    min_bytes_per_second: int = 16 * 1024


# What is still worth handling when the connection ends; the rest would start something.
_FINAL_EVENTS = (
    events.InlineReceived,
    events.MessageReceived,
    events.MessageSent,
    events.SendFailed,
    events.ReceiveFailed,
)


@dataclass(slots=True)
class _Outgoing:
    length: int
    progress_at: float
    state: Send = Send.OFFERED
    granted: int = 0
    written: int = 0
    chunks: int = 0
    open_grants: int = 0


@dataclass(slots=True)
class _Incoming:
    length: int
    progress_at: float
    state: Receive = Receive.OFFERED
    deadline: float = float("inf")
    planned: int = 0
    landed: int = 0
    #: notification -> bytes expected there
    exposed: dict[int, int] = field(default_factory=dict)


class Channel:
    """One connection's protocol state. ``overhead``: bytes that sealing adds to each chunk (0 in clear mode)."""

    def __init__(self, role: Role, limits: ChannelLimits, hello: wire.Hello, now: float, overhead: int = 0) -> None:
        self.role = role
        self.state = Phase.GREETING
        self.peer: wire.Hello | None = None
        self._limits = limits
        self._hello = hello
        self._overhead = overhead
        self._born = now
        self._rails = 0
        self._parser = wire.Parser(limits.inline_bytes, limits.chunk_bytes + overhead)
        self._events: list[Event] = []
        self._output: list[bytes] = []
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}
        self._writes: dict[int, tuple[int, int]] = {}  # notification of the peer -> (transfer, length)
        self._exposures: dict[int, int] = {}  # own notification -> transfer
        self._next_transfer = 1
        self._last_offered = 0
        self._next_notification = 0
        if role is Role.ACTIVE:
            self._emit(hello)

    # -- what goes out -------------------------------------------------------------------------------------

    def data_to_send(self) -> list[bytes]:
        """Control messages to send, in order. Each call takes what has gathered since the last."""
        output, self._output = self._output, []
        return output

    def next_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        happened, self._events = self._events, []
        return happened

    def _emit(self, message: wire.Message) -> None:
        self._output.append(wire.encode(message))

    # -- the connection ------------------------------------------------------------------------------------

    def _move(self, happening: Input) -> None:
        new = PHASE.get((self.role, self.state, happening))
        if new is None:
            raise illegal("connection", self.state, happening)
        self.state = new

    def choose(self, fabric: str, offer: Mapping[str, Any]) -> None:
        """Passive: the answer to `ChooseFabric`; ``fabric`` is "" to use the control stream for everything."""
        self._move(Input.CHOSEN)
        self._emit(self._hello)
        self._emit(wire.Open(fabric, offer))

    def dialled(self, rails: int, reason: str = "") -> None:
        """Active: the answer to `OpenRails`."""
        self._move(Input.DIALLED)
        self._emit(wire.Rails(rails, reason))
        self._opened(rails, reason)

    def _opened(self, rails: int, reason: str) -> None:
        self._rails = rails
        self._events.append(events.Opened(rails, reason))

    def close(self, reason: str = "") -> None:
        """Say goodbye and fail everything in flight. Idempotent."""
        if self.state is Phase.CLOSED:
            return
        self._emit(wire.Bye(reason))
        self._end(reason or "the connection was closed")

    def _end(self, reason: str) -> None:
        self._move(Input.CLOSE)
        self._events = [event for event in self._events if isinstance(event, _FINAL_EVENTS)]
        self._events += [events.SendFailed(t, reason) for t in self._outgoing]
        self._events += [events.ReceiveFailed(t, reason) for t in self._incoming]
        self._outgoing.clear()
        self._incoming.clear()
        self._writes.clear()
        self._exposures.clear()

    def receive(self, data: bytes | memoryview, now: float) -> None:
        """Take bytes of the control stream.

        Raises:
            ProtocolError: the peer broke the protocol; nothing but `close` may follow.
        """
        for message in self._parser.feed(data):
            if self.state is Phase.CLOSED:
                return
            self._receive(message, now)

    def _receive(self, message: wire.Message, now: float) -> None:
        match message:
            case wire.Hello():
                self._move(Input.HELLO)
                self.peer = message
                if self.role is Role.PASSIVE:
                    self._events.append(events.ChooseFabric(message))
            case wire.Open():
                self._move(Input.OPEN)
                self._events.append(events.OpenRails(message.fabric, message.offer))
            case wire.Rails():
                self._move(Input.RAILS)
                self._opened(message.count, message.reason)
            case wire.Bye():
                self._end(message.reason or "the peer closed the connection")
                self._events.append(events.PeerLeft(message.reason))
            case wire.Inline():
                self._move(Input.TRAFFIC)
                self._events.append(events.InlineReceived(message.payload))
            case _:
                self._move(Input.TRAFFIC)
                self._transfer_message(message, now)

    def _transfer_message(self, message: wire.Message, now: float) -> None:
        match message:
            case wire.Offer():
                self._offered(message, now)
            case wire.Grant():
                self._granted(message, now)
            case wire.Data():
                self._events.append(events.DataArrived(message.notification, message.payload))
            case wire.Done():
                if (out := self._find_outgoing(message.transfer)) is not None:
                    if out.granted != out.length:
                        raise ProtocolError(f"transfer {message.transfer} is done with {out.granted} bytes granted")
                    self._advance_send(message.transfer, out, Input.DONE)
            case wire.Refuse():
                if (out := self._find_outgoing(message.transfer)) is not None:
                    self._advance_send(message.transfer, out, Input.REFUSE, message.reason)

    def check(self, now: float) -> None:
        """Raise `TransferError` if a deadline of the connection or of a transfer has passed. Call once a second."""
        limits = self._limits
        if self.state not in (Phase.OPEN, Phase.CLOSED) and now - self._born > limits.handshake_timeout:
            raise TransferError(f"the peer did not finish the handshake in {limits.handshake_timeout:g} s")
        # A message that was only offered waits for the receiver's memory: that is no stall of the link.
        active: list[tuple[str, int, _Outgoing | _Incoming]] = [
            *(("sending", n, out) for n, out in self._outgoing.items() if out.state is not Send.OFFERED),
            *(("receiving", n, inc) for n, inc in self._incoming.items() if inc.state is not Receive.OFFERED),
        ]
        for kind, number, transfer in active:
            if now - transfer.progress_at > limits.stall_timeout:
                raise TransferError(
                    f"{kind} transfer {number} ({transfer.length} bytes) made no progress for "
                    f"{limits.stall_timeout:g} s in state {transfer.state.name}"
                )
        for number, incoming in self._incoming.items():
            if now > incoming.deadline:
                raise TransferError(
                    f"receiving transfer {number} takes too long: {incoming.landed} of {incoming.length} bytes came, "
                    f"at less than {limits.min_bytes_per_second} bytes/s"
                )

    # -- sending -------------------------------------------------------------------------------------------

    def fits_inline(self, length: int) -> bool:
        """Whether a message goes inline; a longer one must be submitted. The receiver sets the limit, up to ours."""
        return self.peer is not None and length <= min(self.peer.inline_bytes, MAX_INLINE_BYTES)

    def send_inline(self, payload: bytes | bytearray | memoryview) -> None:
        """Send a message that `fits_inline` on the control stream."""
        self._move(Input.SUBMIT)
        if not self.fits_inline(len(payload)):
            raise LocalProtocolError(f"{len(payload)} bytes are too many to send inline")
        self._emit(wire.Inline(bytes(payload)))

    def submit(self, length: int, now: float) -> int:
        """Offer a message of ``length`` bytes; the transfer's number. `MessageSent` or `SendFailed` ends it.

        Raises:
            TransferError: the peer takes no message of that length.
        """
        self._move(Input.SUBMIT)
        assert self.peer is not None
        if length > self.peer.max_message_bytes:
            raise TransferError(f"a message of {length} bytes is larger than the peer's {self.peer.max_message_bytes}")
        number = self._next_transfer
        self._next_transfer += 1
        self._outgoing[number] = _Outgoing(length, now)
        self._emit(wire.Offer(number, length))
        return number

    def written(self, notification: int, now: float) -> None:
        """The fabric reports that the write of ``notification`` has left its source buffer."""
        entry = self._writes.pop(notification, None)
        if entry is None:
            return  # its transfer has failed meanwhile
        transfer, length = entry
        out = self._outgoing.get(transfer)
        if out is None:
            return
        out.written += length
        out.open_grants -= 1
        out.progress_at = now
        if out.written == out.length:
            self._advance_send(transfer, out, Input.ALL_WRITTEN)

    def send_data(self, notification: int, payload: bytes | memoryview) -> None:
        """Write a chunk on the control stream instead of a rail."""
        self._emit(wire.Data(notification, bytes(payload)))

    def _find_outgoing(self, transfer: int) -> _Outgoing | None:
        """The transfer, or None if it has ended here already (its end and the peer's message crossed)."""
        if not 0 < transfer < self._next_transfer:
            raise ProtocolError(f"the peer speaks of transfer {transfer}, which was never offered")
        return self._outgoing.get(transfer)

    def _granted(self, grant: wire.Grant, now: float) -> None:
        out = self._find_outgoing(grant.transfer)
        if out is None:
            return
        if grant.offset != out.granted or not 0 < grant.length <= out.length - out.granted:
            raise ProtocolError(
                f"grant of {grant.length} bytes at {grant.offset} of transfer {grant.transfer}, which is "
                f"{out.length} bytes of which {out.granted} are granted"
            )
        if grant.index != out.chunks:
            raise ProtocolError(f"chunk {grant.index} of transfer {grant.transfer} is granted, {out.chunks} is due")
        last = grant.length == out.length - out.granted
        if grant.length < self._limits.peer_chunk_bytes and not last:
            raise ProtocolError(f"a grant of {grant.length} bytes, {self._limits.peer_chunk_bytes} are the least")
        if out.open_grants >= self._limits.peer_depth:
            raise ProtocolError(f"more than {self._limits.peer_depth} grants are open in transfer {grant.transfer}")
        if grant.remote.length != grant.length + self._overhead:
            raise ProtocolError(f"a grant of {grant.length} bytes points to a slice of {grant.remote.length}")
        if grant.notification in self._writes:
            raise ProtocolError(f"notification {grant.notification} is granted twice")
        self._advance_send(grant.transfer, out, Input.GRANT)
        out.granted += grant.length
        out.chunks += 1
        out.open_grants += 1
        out.progress_at = now
        self._writes[grant.notification] = (grant.transfer, grant.length)
        self._events.append(
            events.WriteChunk(grant.transfer, grant.index, grant.offset, grant.length, grant.remote, grant.notification)
        )

    def _advance_send(self, transfer: int, out: _Outgoing, happening: Input, reason: str = "") -> None:
        new = SEND.get((out.state, happening))
        if new is None:
            raise illegal(f"sending transfer {transfer}", out.state, happening)
        out.state = new
        if new is Send.DONE:
            del self._outgoing[transfer]
            self._events.append(events.MessageSent(transfer))
        elif new is Send.FAILED:
            del self._outgoing[transfer]
            self._events.append(events.SendFailed(transfer, reason))

    # -- receiving -----------------------------------------------------------------------------------------

    def accept(self, transfer: int, now: float) -> None:
        """There is memory for the message: start to grant. Does nothing if the transfer has failed meanwhile."""
        if (incoming := self._incoming.get(transfer)) is not None:
            self._advance_receive(transfer, incoming, Input.ACCEPTED)
            incoming.progress_at = now
            limits = self._limits
            incoming.deadline = now + limits.stall_timeout + incoming.length / limits.min_bytes_per_second
            self._plan(transfer, incoming)

    def refuse(self, transfer: int, reason: str) -> None:
        """Don't take the message."""
        if (incoming := self._incoming.get(transfer)) is not None:
            self._emit(wire.Refuse(transfer, reason))
            self._advance_receive(transfer, incoming, Input.REFUSED, reason)

    def exposed(self, chunk: events.ExposeChunk, remote: RemoteSlice) -> None:
        """The answer to `ExposeChunk`: grant it to the sender."""
        if chunk.transfer in self._incoming:
            self._emit(wire.Grant(chunk.transfer, chunk.index, chunk.offset, chunk.length, remote, chunk.notification))

    def landed(self, notification: int, length: int, now: float) -> None:
        """The fabric reports that ``length`` bytes (sealing included) are in the slice of ``notification``.

        Raises:
            ProtocolError: nothing is exposed there, or the peer wrote fewer bytes than it was to.
        """
        transfer = self._exposures.pop(notification, None)
        if transfer is None:
            raise ProtocolError(f"the peer wrote to slice {notification}, which is not exposed")
        incoming = self._incoming[transfer]
        expected = incoming.exposed.pop(notification)
        if length != expected + self._overhead:
            raise ProtocolError(f"the peer wrote {length} bytes where {expected + self._overhead} were granted")
        incoming.landed += expected
        incoming.progress_at = now
        if incoming.landed == incoming.length:
            self._advance_receive(transfer, incoming, Input.ALL_LANDED)
        else:
            self._plan(transfer, incoming)

    def _offered(self, offer: wire.Offer, now: float) -> None:
        if offer.transfer <= self._last_offered:
            raise ProtocolError(f"transfer {offer.transfer} is offered after {self._last_offered}")
        limits = self._limits
        if not limits.inline_bytes < offer.length <= limits.max_message_bytes:
            raise ProtocolError(
                f"a message of {offer.length} bytes is offered; {limits.inline_bytes} go inline, "
                f"{limits.max_message_bytes} are the most"
            )
        if len(self._incoming) >= self._limits.max_incoming:
            raise ProtocolError(f"more than {self._limits.max_incoming} messages are offered at once")
        self._last_offered = offer.transfer
        self._incoming[offer.transfer] = _Incoming(offer.length, now)
        self._events.append(events.MessageOffered(offer.transfer, offer.length))

    def _plan(self, transfer: int, incoming: _Incoming) -> None:
        while incoming.planned < incoming.length and len(incoming.exposed) < self._limits.depth:
            offset = incoming.planned
            length = min(self._limits.chunk_bytes, incoming.length - offset)
            notification = self._new_notification()
            incoming.planned += length
            incoming.exposed[notification] = length
            self._exposures[notification] = transfer
            self._events.append(
                events.ExposeChunk(transfer, offset // self._limits.chunk_bytes, offset, length, notification)
            )

    def _new_notification(self) -> int:
        # 32 bits is what RDMA's immediate value holds; numbers still in use are passed over after a wrap.
        while True:
            self._next_notification = (self._next_notification + 1) & 0xFFFFFFFF
            if self._next_notification not in self._exposures:
                return self._next_notification

    def _advance_receive(self, transfer: int, incoming: _Incoming, happening: Input, reason: str = "") -> None:
        new = RECEIVE.get((incoming.state, happening))
        if new is None:
            raise illegal(f"receiving transfer {transfer}", incoming.state, happening)
        incoming.state = new
        if new is Receive.DONE:
            del self._incoming[transfer]
            self._emit(wire.Done(transfer))
            self._events.append(events.MessageReceived(transfer))
        elif new is Receive.FAILED:
            del self._incoming[transfer]
            self._events.append(events.ReceiveFailed(transfer, reason))
