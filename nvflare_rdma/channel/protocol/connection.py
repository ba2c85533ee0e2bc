"""The receiver-driven chunk protocol, without I/O.

Bytes of the control stream and the time come in as arguments; bytes to send and events come out. Whoever runs
it (see `link.py`) owns sockets, memory and threads, and calls one method at a time.

    offer -> grant -> write -> done: the receiver grants what it has memory for, chunk by chunk and no more at once
    than its controller says, so that it alone sets the pace.

Rails may break and come back. A grant is bound to a rail, so that both sides know what a broken one costs; when
none is left, all grants are void, the active side asks for new rails, and the receiver grants what it misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare_rdma.channel.controllers import Controller
from nvflare_rdma.channel.protocol import events, wire
from nvflare_rdma.channel.protocol.events import Event
from nvflare_rdma.channel.protocol.incoming import Incoming
from nvflare_rdma.channel.protocol.limits import MAX_CHUNK_BYTES, MAX_INLINE_BYTES, ChannelLimits
from nvflare_rdma.channel.protocol.outgoing import Outgoing
from nvflare_rdma.channel.protocol.state import PHASE, RAILS, Input, Phase, RailState, Role, illegal
from nvflare_rdma.errors import LocalProtocolError, ProtocolError, TransferError
from nvflare_rdma.fabric import MAX_RAILS, RemoteSlice

#: Seconds before new rails are asked for: at once, then longer and longer, until rails have lasted a while.
_BACKOFF = (0.0, 0.1, 0.3, 1.0, 3.0)
_LASTED = 30.0
_MAX_ATTEMPTS = 64

# What is still worth handling when the connection ends; the rest would start something.
_FINAL_EVENTS = (
    events.InlineReceived,
    events.MessageReceived,
    events.MessageSent,
    events.SendFailed,
    events.ReceiveFailed,
)


class Connection:
    """The protocol state of one connection. Sealing adds `overhead` bytes to a chunk, if it is sealed."""

    def __init__(
        self,
        role: Role,
        limits: ChannelLimits,
        hello: wire.Hello,
        controller: Controller,
        now: float,
        overhead: int = 0,
    ) -> None:
        self.role = role
        self.state = Phase.GREETING
        self.rail_state = RailState.CHOOSING
        self.peer: wire.Hello | None = None
        self._limits = limits
        self._hello = hello
        self._seal_overhead = overhead
        self._born = now
        self._fabric = ""
        self._overhead = 0
        self._rails: set[int] = set()
        self._opened_rails: set[int] = set()
        self._most_wanted, self._most_rails = 0, MAX_RAILS
        self._max_chunk = 0
        self._up_at = now
        self._attempts = 0
        self._retry_at: float | None = None
        self._lost_at: float | None = None
        self._lost_reason = ""
        self.heard_at = now
        """When something has come from the peer on the control stream."""
        self._asked = self._owes_answer = False
        self._parser = wire.Parser(limits.inline_bytes, wire.MAX_DATA_BYTES + overhead)
        self._events: list[Event] = []
        self._output: list[bytes] = []
        self._outgoing = Outgoing(limits, hello.max_staged_bytes, self._emit, self._happened)
        self._incoming = Incoming(limits, controller, self._emit, self._happened)
        if role is Role.ACTIVE:
            self._emit(hello)

    # -- what goes out -------------------------------------------------------------------------------------

    def data_to_send(self) -> list[bytes]:
        """Control messages to send, in order. Each call takes what has gathered since the last."""
        if self._owes_answer:
            # One for all that came: what a peer asks for so cheaply, and may not read, is not to gather here.
            self._owes_answer = False
            self._emit(wire.Pong())
        output, self._output = self._output, []
        return output

    def next_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        happened, self._events = self._events, []
        return happened

    def _emit(self, message: wire.Message) -> None:
        self._output.append(wire.encode(message))

    def _happened(self, event: Event) -> None:
        self._events.append(event)

    # -- the connection ------------------------------------------------------------------------------------

    def _move(self, happening: Input) -> None:
        new = PHASE.get((self.state, happening))
        if new is None:
            raise illegal("connection", self.state, happening)
        self.state = new

    def close(self, reason: str = "") -> None:
        """Say goodbye and fail everything in flight. Idempotent."""
        if self.state is Phase.CLOSED:
            return
        self._emit(wire.Bye(reason))
        self._end(reason or "the connection was closed")

    def _end(self, reason: str) -> None:
        self._move(Input.CLOSE)
        self._events = [event for event in self._events if isinstance(event, _FINAL_EVENTS)]
        self._outgoing.end(reason)
        self._incoming.end(reason)
        self._rails.clear()
        self._owes_answer = False

    def receive(self, data: bytes | memoryview, now: float) -> None:
        """Take bytes of the control stream.

        Raises:
            ProtocolError: the peer broke the protocol; nothing but `close` may follow.
        """
        self.heard_at = now
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
            case wire.Open() | wire.Rails() | wire.RailDown() | wire.RailUp() | wire.MoreRails() | wire.Reopen():
                if self.state is Phase.GREETING:
                    raise ProtocolError(f"{type(message).__name__} came before HELLO")
                self._rail_message(message, now)
            case wire.Bye():
                self._end(message.reason or "the peer closed the connection")
                self._events.append(events.PeerLeft(message.reason))
            case wire.Inline():
                self._move(Input.TRAFFIC)
                self._events.append(events.InlineReceived(message.payload))
            case wire.Ping():
                self._move(Input.TRAFFIC)
                self._owes_answer = True
            case wire.Pong():
                self._move(Input.TRAFFIC)
                if not self._asked:
                    raise ProtocolError("the peer answers what it was not asked")
                self._asked = False
            case _:
                self._move(Input.TRAFFIC)
                self._transfer_message(message, now)

    def _transfer_message(self, message: wire.Message, now: float) -> None:
        match message:
            case wire.Offer():
                self._incoming.offered(message, now)
            case wire.Grant():
                if self.rail_state is RailState.UP:
                    self._outgoing.granted(message, self._opened_rails, self._overhead, self._max_chunk, now)
                else:  # the peer gave it before it knew that the rails are replaced
                    self._outgoing.granted_in_vain(message)
            case wire.Data():
                self._events.append(events.DataArrived(message.notification, message.digest, message.payload))
            case wire.Done():
                self._outgoing.done(message.transfer)
            case wire.Refuse():
                self._outgoing.refused(message)
            case wire.Withdraw():
                self._incoming.withdrawn(message)

    def check(self, now: float) -> None:
        """Do what is due by now. Call when `timeout` says so, and once a second.

        Raises:
            TransferError: a deadline of the connection or of a transfer has passed.
        """
        if self.state not in (Phase.OPEN, Phase.CLOSED) and now - self._born > self._limits.handshake_timeout:
            raise TransferError(f"the peer did not finish the handshake in {self._limits.handshake_timeout:g} s")
        timeout = self._limits.stall_timeout
        if self._lost_at is not None and now - self._lost_at > timeout:
            raise TransferError(f"no rail came up again in {timeout:g} s: {self._lost_reason}")
        self._outgoing.check(now)
        self._incoming.check(now)
        if self._retry_at is not None and now >= self._retry_at and self.state is Phase.OPEN:
            self._retry_at = None
            self._move_rails(Input.RETRY)
            self._emit(wire.Reopen(self._lost_reason))

    def timeout(self, now: float) -> float | None:
        """Seconds until `check` has something to do before the next second is over; None if it has not."""
        return None if self._retry_at is None else max(self._retry_at - now, 0.0)

    def ask(self) -> None:
        """Ask the peer for a sign of life: whatever it sends moves `heard_at`. Does nothing while it owes an answer."""
        if not self._asked:
            self._move(Input.SUBMIT)
            self._asked = True
            self._emit(wire.Ping())

    # -- rails ---------------------------------------------------------------------------------------------

    def _move_rails(self, happening: Input) -> None:
        new = RAILS.get((self.role, self.rail_state, happening))
        if new is None:
            raise illegal("rails", self.rail_state, happening)
        self.rail_state = new

    def choose(
        self, fabric: str, offer: Mapping[str, Any], sealed: bool, checked: bool, most_rails: int = MAX_RAILS
    ) -> None:
        """Answer `ChooseFabric`, on the passive side. `fabric` is "" to use the control stream for everything;
        `most_rails` is how many the peer may open of what is offered."""
        self._move_rails(Input.CHOSEN)
        self._most_rails = most_rails
        if self.state is Phase.OPENING and not self._fabric:
            self._emit(self._hello)
        self._agree(fabric or "control", sealed)
        self._emit(wire.Open(fabric, offer, sealed, checked))

    def set_controller(self, controller: Controller) -> None:
        """Set what decides how much is granted over the rails that come. Called before `choose` or `dialled`."""
        self._incoming.set_controller(controller)

    def _agree(self, fabric: str, sealed: bool) -> None:
        self._fabric = fabric
        self._overhead = self._seal_overhead if sealed else 0

    def dialled(self, rails: int, now: float, reason: str = "", answer: Mapping[str, Any] | None = None) -> None:
        """Answer `OpenRails`, on the active side. `answer` is the endpoint's."""
        self._emit(wire.Rails(rails, reason, answer or {}))
        up = rails > 0 or self._fabric == "control"
        self._move_rails(Input.DIALLED if up else Input.DIALLED_NONE)
        if up:
            self._up(rails, reason, {}, now)

    def _rail_message(self, message: wire.Message, now: float) -> None:
        match message:
            case wire.Open():
                self._move_rails(Input.OPEN)
                self._agree(message.fabric or "control", message.sealed)
                self._events.append(events.OpenRails(message.fabric, message.offer, message.sealed, message.checked))
            case wire.Rails():
                most = 0 if self._fabric == "control" else self._most_rails
                if message.count > most:
                    raise ProtocolError(
                        f"the peer says that it opened {message.count} rails, at most {most} are allowed"
                    )
                up = message.count > 0 or self._fabric == "control"
                self._move_rails(Input.RAILS if up else Input.NO_RAILS)
                if up:
                    self._up(message.count, message.reason, message.answer, now)
                else:
                    assert self.peer is not None
                    reason = message.reason or "no rail could be opened"
                    self._events.append(events.ChooseFabric(self.peer, reason, opened=False))
            case wire.RailDown():
                # Not before this side's fabric says that nothing can land over it any more is it down here.
                if self.rail_state is RailState.UP and message.rail in self._rails:
                    self._events.append(events.DropRail(message.rail))
            case wire.RailUp():
                self._move_rails(Input.RAIL_UP)
                if message.rail >= self._most_rails or message.rail in self._opened_rails or self._fabric == "control":
                    raise ProtocolError(f"the peer says that it opened rail {message.rail}, which can't be")
                if self.rail_state is RailState.UP:
                    self._add_rail(message.rail, now)
                else:
                    self._opened_rails.add(message.rail)  # it is said once
                    self._emit(wire.RailDown(message.rail, ""))
            case wire.MoreRails():
                self._move_rails(Input.MORE_RAILS)
                if not 0 < message.count <= MAX_RAILS:
                    raise ProtocolError(f"the peer wants {message.count} rails, at most {MAX_RAILS} are allowed")
                if self._has_rails and message.count > self._most_wanted:  # else it was said before
                    self._most_wanted = message.count
                    self._events.append(events.GrowRails(message.count))
            case wire.Reopen():
                self._count_attempt(now)
                if self.rail_state is RailState.UP:
                    self._lose_rails(message.reason, now)
                self._move_rails(Input.REOPEN)
                assert self.peer is not None
                self._events.append(events.ChooseFabric(self.peer, message.reason or "its rails broke"))

    def _up(self, rails: int, reason: str, answer: Mapping[str, Any], now: float) -> None:
        assert self.peer is not None
        if self.state is Phase.OPENING:
            self._move(Input.READY)
        on_control = self._fabric == "control"
        self._up_at, self._lost_at = now, None
        self._rails = set(range(1 if on_control else rails))
        self._opened_rails, self._most_wanted = set(self._rails), 0
        self._events.append(events.Opened(rails, reason, answer))
        self._max_chunk = wire.MAX_DATA_BYTES if on_control else MAX_CHUNK_BYTES
        peer = self.peer
        self._incoming.open(self._rails, self._overhead, self._max_chunk, peer.max_staged_bytes, peer.max_writes, now)

    @property
    def _has_rails(self) -> bool:
        """Whether rails are up that others could join."""
        return self.rail_state is RailState.UP and self._fabric != "control"

    def want_rails(self, count: int) -> None:
        """Have the active side open rails until there are `count`, if it may: this one, or the peer. Does nothing while
        none are up, or for none."""
        if not count or self.state is not Phase.OPEN or not self._has_rails:
            return
        if self.role is Role.ACTIVE:
            self._events.append(events.GrowRails(count))
        else:
            self._emit(wire.MoreRails(count))

    def rail_up(self, rail: int, now: float) -> None:
        """Answer `GrowRails`, on the active side: one more rail is open on both. Does nothing if the others are gone
        meanwhile."""
        if self.state is not Phase.OPEN or not self._has_rails:
            return
        self._move_rails(Input.RAIL_UP_HERE)
        self._emit(wire.RailUp(rail))
        self._add_rail(rail, now)

    def _add_rail(self, rail: int, now: float) -> None:
        self._rails.add(rail)
        self._opened_rails.add(rail)
        self._events.append(events.RailAdded(rail))
        self._incoming.rail_up(rail, now)

    def rail_down(self, rail: int, reason: str, now: float) -> None:
        """The fabric says that a rail broke, and everything that landed over it was reported."""
        if self.rail_state is not RailState.UP or rail not in self._rails:
            return
        self._rails.discard(rail)
        self._emit(wire.RailDown(rail, reason))
        self._incoming.rail_down(rail, now)
        if not self._rails:
            self._lose_rails(reason, now)
            self._move_rails(Input.ALL_DOWN)
            if self.role is Role.ACTIVE:
                attempts = self._count_attempt(now)
                self._retry_at = now + _BACKOFF[min(attempts, len(_BACKOFF)) - 1]

    def _count_attempt(self, now: float) -> int:
        self._attempts = 1 if now - self._up_at > _LASTED else self._attempts + 1
        if self._attempts > _MAX_ATTEMPTS:
            raise TransferError(f"rails broke {_MAX_ATTEMPTS} times, none lasted {_LASTED:g} s")
        return self._attempts

    def _lose_rails(self, reason: str, now: float) -> None:
        self._lost_at, self._lost_reason = now, reason
        self._rails.clear()
        self._incoming.void(now)
        self._outgoing.void()
        self._events.append(events.RailsLost(reason))

    # -- sending -------------------------------------------------------------------------------------------

    def fits_inline(self, length: int) -> bool:
        """Whether a message goes inline; a longer one must be submitted. The receiver sets the limit, up to this
        side's."""
        return self.peer is not None and length <= min(self.peer.inline_bytes, MAX_INLINE_BYTES)

    def send_inline(self, payload: bytes | bytearray | memoryview) -> None:
        """Send a message that `fits_inline` on the control stream."""
        self._move(Input.SUBMIT)
        if not self.fits_inline(len(payload)):
            raise LocalProtocolError(f"{len(payload)} bytes are too many to send inline")
        self._emit(wire.Inline(bytes(payload)))

    def submit(self, length: int, now: float, label: int = 0, staged: bool = False) -> int:
        """Offer a message of `length` bytes, and return the transfer's number. `MessageSent` or `SendFailed` ends it.
        `staged` says that its chunks are made in memory of this side.

        Raises:
            TransferError: the peer takes no message of that length.
        """
        self._move(Input.SUBMIT)
        assert self.peer is not None
        return self._outgoing.submit(length, self.peer.max_message_bytes, now, label, staged)

    def withdraw(self, transfer: int, reason: str) -> None:
        """Give up a message that is being sent. Does nothing if it has ended, or is confirmed, already."""
        if self.state is Phase.OPEN:
            self._outgoing.withdraw(transfer, reason)

    def written(self, notification: int, now: float) -> None:
        """The fabric reports that the write of `notification` has ended."""
        self._outgoing.written(notification, now)

    def send_data(self, notification: int, digest: int, payload: bytes | memoryview) -> None:
        """Write a chunk on the control stream instead of a rail."""
        if self.state is Phase.OPEN:
            self._emit(wire.Data(notification, digest, bytes(payload)))

    # -- receiving -----------------------------------------------------------------------------------------

    def accept(self, transfer: int, now: float, unit: int = 1, room: int = 0, most: int = 0) -> None:
        """Start to grant a message that there is memory for. Chunks begin at multiples of `unit` (see `Sink`) and are
        no longer than `most` bytes; no more than `room` bytes are granted and have not landed (0 is any number, for
        both). Does nothing if the transfer has failed meanwhile."""
        self._incoming.accept(transfer, now, unit, room, most)

    def refuse(self, transfer: int, reason: str) -> None:
        """Refuse a message, or the rest of it. Does nothing if it has ended already."""
        if self.state is Phase.OPEN:
            self._incoming.refuse(transfer, reason)

    def exposed(self, chunk: events.ExposeChunk, remote: RemoteSlice) -> None:
        """Answer `ExposeChunk`: the chunk is granted to the sender."""
        self._incoming.exposed(chunk, remote)

    def landed(self, notification: int, length: int, now: float) -> None:
        """The fabric reports that `length` bytes (sealing included) are in the slice of `notification`, and they
        have passed their check.

        Raises:
            ProtocolError: nothing is exposed there, or the peer wrote fewer bytes than it was to.
        """
        self.heard_at = now
        self._incoming.landed(notification, length, now)

    def damaged(self, notification: int, now: float) -> None:
        """What landed under `notification` is not what was sent: ask for that chunk again.

        Raises:
            ProtocolError: nothing is exposed there. TransferError: too many chunks in a row were damaged.
        """
        self._incoming.damaged(notification, now)

    def progress(self) -> dict[int, tuple[int, int]]:
        """The messages that are being received: transfer -> (bytes landed, bytes in all)."""
        return self._incoming.progress()
