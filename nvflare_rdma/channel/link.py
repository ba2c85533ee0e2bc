"""Runs a `Connection` on a control stream and the rails of a fabric.

With `control_writer.py`, `rails.py` and `door.py` this is all that has threads:

    sender's thread  Link.send         -> connection -> control stream
    reader thread    Link.run          control stream -> connection -> events; the deadlines
    writer thread                      what the control stream did not take at once
    rail threads     RailSet.write     seal or checksum a granted chunk, then Endpoint.write
    fabric threads   landed, written   verify what landed, then -> connection

The connection is called under one lock, and so is every method whose name ends in `_locked`. Whatever calls out of the
link (delivery, budget, endpoints that close) happens after it is released: a budget that one link frees may start a
transfer of another.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from nvflare_rdma.channel import sealing
from nvflare_rdma.channel.bodies import BufferSource, Later, Sink, Source
from nvflare_rdma.channel.context import LinkContext
from nvflare_rdma.channel.control import NO_GOODBYE, ControlStream, explain_loss
from nvflare_rdma.channel.control_rail import ControlRail
from nvflare_rdma.channel.control_writer import ControlWriter
from nvflare_rdma.channel.deferred import DeferredCalls, Delivery
from nvflare_rdma.channel.guests import GuestLog
from nvflare_rdma.channel.inbox import Inbox
from nvflare_rdma.channel.liveness import Liveness
from nvflare_rdma.channel.opening import Opening, RailOpener
from nvflare_rdma.channel.outbox import Outbox, Sending
from nvflare_rdma.channel.protocol import Connection, Phase, Role, events, wire
from nvflare_rdma.channel.rails import RailSet
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, RdmaError, TransferError
from nvflare_rdma.fabric import Fabric
from nvflare_rdma.logs import get_logger

_LINGER, _TICK, _GOODBYE_SECONDS = 5.0, 1.0, 0.5


class Link:
    """One connection to a peer, over which both sides send messages.

    `deliver` gets each message that comes without a label: bytes if it came inline, else a view of a slot that is used
    again when the last slice of the view is gone. `place` finds the sink of a message with a label; it is called under
    the link's lock, so it may not call the link. Instead it may give `Later`, and call the function that it was given
    when it is to be asked again. All links to one site share what it may use (`ControlStream.site`).
    """

    def __init__(
        self,
        stream: ControlStream,
        role: Role,
        fabrics: Mapping[str, Fabric],
        context: LinkContext,
        deliver: Callable[[Delivery], None],
        name: str,
        place: Callable[[int, Callable[[], None]], Sink | Later | None] = lambda label, again: None,
    ) -> None:
        self.name = name
        # For people: the fabric, whether there is TLS, and the door's port; and why there is no better fabric.
        self.fabric = self.way = self.passed_over = ""
        self.log = GuestLog(get_logger(__name__), role is Role.PASSIVE)
        self._stream = stream
        site = stream.site or name
        self._context, self._place = context, place
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._deferred = DeferredCalls(self._lock, deliver, self._guarded, lambda: self._closing)
        self._key = sealing.new_key() if stream.secure else b""
        self._opener = RailOpener(self, name, site, context, fabrics, self._key, self._send_on_control)
        controller = self._opener.controller("")
        overhead, now = sealing.TAG_BYTES if self._key else 0, time.monotonic()
        self._core = Connection(role, context.limits, self._opener.hello(), controller, now, overhead)
        self._inbox = Inbox(context, controller, stream.secure, site, self._deferred.append)
        memory = context.sending.share(site)
        self._outbox = Outbox(self._lock, self._room, context.window_bytes, memory, self._withdraw, name)
        self._rails: RailSet | None = None
        self._writer = ControlWriter(stream, self._room, lambda: self._closing, name)
        self._to_dial: events.OpenRails | None = None
        self._failure: str | None = None
        self._checked_at, self._closing = now, False
        self._liveness = Liveness(self._core, self._room, lambda: self.usable)
        self._ended, self._process = threading.Event(), os.getpid()

    # -- life ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Agree with the peer on a fabric and open its rails. Blocks for the handshake timeout at most.

        Raises:
            RdmaError: the peer speaks another protocol, or no common fabric was allowed. OSError: it is gone.
        """
        self._writer.start()
        try:
            with self._lock:
                self._pump_locked()
            while self._core.state is not Phase.OPEN:
                self._step()  # what it defers waits for `run`: who receives may not be ready yet
                if self._core.state is Phase.CLOSED:
                    raise FabricError(f"{self.name}: {self._failure or 'the peer closed the connection'}")
                if self._to_dial is not None:
                    offered, self._to_dial = self._to_dial, None
                    self._dial(offered)
        except Exception as error:
            self._shut_down(str(error))
            self._deferred.run()  # another thread may have shut it down, and closes no rails that were dialled since
            raise

    def run(self) -> None:
        """Receive until the connection ends; then everything is freed. Call this once, after `open`, if the peer may
        come in: before, nothing is logged of a guest."""
        self.log.let_in()
        reason = ""
        try:
            self._deferred.run()
            while self._core.state is Phase.OPEN:
                self._step()
                self._deferred.run()
        except ProtocolError as error:
            reason = str(error)
            self.log.error("%s: disconnected, the peer broke the protocol: %s", self.name, error)
        except (RdmaError, OSError) as error:
            reason = explain_loss(error, self._writer.failure)
            if not self._closing:
                self.log.warning("%s: connection lost: %s", self.name, reason)
        except Exception as error:
            reason = f"internal error: {error}"
            self.log.exception("%s: disconnected by an error of this side", self.name)
        finally:
            self._shut_down(reason)
            self._ended.wait(2 * _LINGER)  # another thread may have begun it

    def _step(self) -> None:
        """Take what the control stream has, or wait for it a little; and look at the deadlines now and then."""
        due = self._core.timeout(time.monotonic())
        data = self._stream.receive(_TICK if due is None else min(due, _TICK))
        now = time.monotonic()
        with self._lock:
            if data == b"":
                raise FabricError(NO_GOODBYE)
            if data:
                self._core.receive(data, now)
                self._liveness.heard_locked()
            if due is not None or now - self._checked_at >= _TICK:
                self._checked_at = now
                self._check_locked(now)
            self._pump_locked()

    def _check_locked(self, now: float) -> None:
        self._core.check(now)
        self._deferred.append(lambda: self._context.budget.expire(now))
        if self._rails is not None and self._core.state is Phase.OPEN:
            self._deferred.append(self._rails.endpoint.check)
            self._core.want_rails(self._rails.wanted())
        self._writer.check_locked(now, stall := self._context.limits.stall_timeout)
        for rails, rail in self._outbox.slow_rails(now, stall / 2):
            self._deferred.append(functools.partial(rails.endpoint.drop, rail))

    def close(self, linger: float = _LINGER) -> None:
        """Let what was sent arrive (for at most `linger` seconds), then disconnect. Callable from any thread. In a
        forked process it does nothing: the link is its parent's."""
        if self._process != os.getpid():
            return  # nor is the lock taken, which nobody may be here to release
        with self._lock:
            if not self._closing and self._core.state is Phase.OPEN:
                self._outbox.drain(linger)
        self._shut_down("")

    def _shut_down(self, reason: str) -> None:
        """End the connection and free everything that this side holds for it. Only the first call does anything."""
        if self._process != os.getpid():
            return
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._failure = self._failure or reason or "the connection was closed"
        try:
            with self._lock:
                try:
                    self._core.close(reason)
                    self._pump_locked()
                finally:
                    # By what is held, not by what was said about it: nothing may stay behind.
                    self._outbox.clear(self._failure)
                    rails = self._take_rails_locked()
        finally:
            self._writer.stop(2.0)
            self._stream.close()
            if rails is not None:
                rails.close()
            with self._lock:
                self._inbox.clear()  # now that nothing lands any more
            self._deferred.run()
            self._ended.set()

    def failed(self, error: Exception) -> None:
        """End the link: something broke in a thread that is not the reader's, or the peer broke a fabric's rules."""
        if not self._closing:
            self.log.error("%s: disconnected: %s", self.name, error, exc_info=not isinstance(error, RdmaError))
        self._shut_down(str(error))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """For what other threads call: an error ends this link, and not the thread, which may serve others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - reported and translated by `failed`
            self.failed(error)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The same, under the lock. The peer is told what follows from it, and what is deferred is done."""
        with self._guarded():
            with self._lock:
                yield
                self._pump_locked()
            self._deferred.run()

    # -- signs of life -------------------------------------------------------------------------------------

    def ask(self, silence: float) -> None:
        """Ask for a sign of life if nothing has come from the peer for `silence` seconds. `is_alive` waits for it."""
        with self._turn():
            self._liveness.ask_locked(silence)

    def is_alive(self, deadline: float) -> bool:
        """Whether the link works, as far as this can be told: something has come since the peer was asked, if it was.
        If nothing comes until `deadline` (as `time.monotonic` has it), the link is given up."""
        with self._lock:
            if (silence := self._liveness.wait_locked(deadline)) is None:
                return self.usable
            # Others may wait for the same: it is not usable from now on, and that is said once.
            self._failure = reason = f"nothing has come from the peer for {silence:.0f} s, and it does not answer"
        self.log.warning("%s: the link is given up: %s", self.name, reason)
        self._shut_down(reason)
        return False

    # -- sending -------------------------------------------------------------------------------------------

    def send(
        self, message: bytes | bytearray | memoryview, timeout: float, lost: Callable[[str], None] | None = None
    ) -> Sending:
        """Send a message. Blocks while more than the window waits for the peer. The message must not be changed before
        the result's `wait` returns. `lost` is called with the reason if the peer refuses it later.

        Raises:
            SendTimeoutError: the peer took nothing for `timeout` seconds.
            TransferError: the connection is closed, or the message is too large for the peer.
        """
        view = memoryview(message).cast("B") if len(message) else memoryview(b"")
        deadline = time.monotonic() + timeout
        with self._lock:
            inline = self._core.fits_inline(len(view))
            while True:
                self._require_open_locked()
                used = self._writer.inline_bytes if inline else self._outbox.waiting
                if self._outbox.wait_for_room(len(view), used, deadline - time.monotonic()):
                    break
            if inline:
                self._core.send_inline(view)
                self._pump_locked(inline_bytes=len(view))
                return Sending(self._lock, 0, over=True)
            transfer = self._core.submit(len(view), time.monotonic())
            sending = self._outbox.add(transfer, BufferSource(view), lost=lost)
            self._count_offered_locked(len(view))
            self._pump_locked()
            return sending

    def _require_open_locked(self) -> None:
        if self._failure is not None or self._closing:
            raise TransferError(f"{self.name}: {self._failure or 'the connection is closed'}")

    def offer(self, source: Source, label: int) -> Sending:
        """Send what the peer knows by `label` (64 bits, not 0). Does not block: what is offered needs no memory here.

        Raises:
            TransferError: the connection is closed, or the message is too large for the peer.
        """
        with self._lock:
            self._require_open_locked()
            transfer = self._core.submit(source.nbytes, time.monotonic(), label, not source.ready)
            sending = self._outbox.add(transfer, source, windowed=False)
            self._count_offered_locked(source.nbytes)
            self._pump_locked()
        self._deferred.run()
        return sending

    def withdraw(self, sending: Sending, reason: str) -> None:
        """Give up a message that is being sent: its `wait` fails with `reason`, unless the peer has it already."""
        self._withdraw(sending.transfer, reason)

    def _withdraw(self, transfer: int, reason: str) -> None:
        with self._turn():
            self._core.withdraw(transfer, reason)

    def written(self, rails: RailSet, notification: int) -> None:
        """See `RailOwner.written`."""
        with self._guarded(), self._lock:
            self._outbox.read_ended(rails, notification)
            if rails is self._rails:
                self._core.written(notification, time.monotonic())
                self._pump_locked()

    def closed(self, rails: RailSet) -> None:
        """See `RailOwner.closed`."""
        with self._lock:
            self._outbox.rails_closed(rails)

    def _send_on_control(self, notification: int, digest: int, payload: memoryview) -> None:
        with self._room:
            self._writer.wait_for_turn_locked()
            self._core.send_data(notification, digest, payload)
            self._outbox.read_ended(self._rails, notification)
            self._core.written(notification, time.monotonic())
            self._pump_locked()

    # -- receiving -----------------------------------------------------------------------------------------

    @property
    def failure(self) -> str:
        """Why the link has ended, or is about to; "" as long as it works."""
        return self._failure or ""

    @property
    def usable(self) -> bool:
        """Whether a link that was opened still works, and is not about to end."""
        return self._failure is None and not self._closing

    @property
    def rails(self) -> int:
        """How many rails were opened last; 0 for the control stream."""
        return 0 if (rails := self._rails) is None else rails.endpoint.rails

    @property
    def idle(self) -> bool:
        """Whether nothing is being sent or received."""
        with self._lock:
            return self._outbox.is_empty and not self._core.progress()

    def incoming(self) -> dict[int, tuple[int, int]]:
        """The messages that are being received: transfer -> (bytes landed, bytes in all)."""
        with self._lock:
            return self._core.progress()

    def refuse(self, transfer: int, reason: str) -> None:
        """Don't take a message, or not the rest of it. Does nothing if it has ended already."""
        with self._turn():
            self._core.refuse(transfer, reason)

    def landed(self, rails: RailSet, notification: int, length: int, digest: int) -> None:
        """See `RailOwner.landed`."""
        with self._guarded():
            with self._lock:
                landing = self._inbox.landed(notification) if rails is self._rails else None
            if landing is None:
                return  # the rails are not these any more, or the link is ending
            intact, closed = True, False
            try:
                try:
                    intact = self._inbox.verify(landing, length, digest)
                except (RdmaError, OSError, MemoryError) as error:
                    self.refuse(landing.chunk.transfer, f"what came can't be used: {error}")
                    length = 0
                with self._lock:
                    self._inbox.closed(landing, landed=intact and length > 0)
                    closed = True
                    if rails is self._rails and self._core.state is Phase.OPEN:
                        now = time.monotonic()
                        if intact:
                            self._core.landed(notification, length, now)
                        else:
                            text = "%s: a chunk of %d bytes arrived damaged; asking for it again"
                            self.log.warning(text, self.name, length)
                            self._core.damaged(notification, now)
                        self._pump_locked()
            finally:
                if not closed:  # an error of this side: the link ends, and what it holds has to be given back
                    with self._lock:
                        self._inbox.closed(landing)
            self._deferred.run()

    def _data_arrived_locked(self, event: events.DataArrived) -> None:
        rails = self._rails
        if rails is None or not isinstance(rails.endpoint, ControlRail):
            raise ProtocolError("the peer sent a chunk on the control stream, which is not what was agreed")
        rails.endpoint.fill(event.notification, event.payload)
        self._deferred.append(lambda: self.landed(rails, event.notification, len(event.payload), event.digest))

    def _offered_locked(self, transfer: int, length: int, label: int) -> None:
        if not label and self._context.labels_only:
            raise ProtocolError("a message without a label is offered over a link that takes none")
        sink = self._place(label, functools.partial(self._offered_again, transfer, length, label)) if label else None
        if isinstance(sink, Later):
            return
        if label and (sink is None or sink.nbytes != length):
            reason = f"{f'{sink.nbytes} bytes' if sink else 'nothing'} expected as {label}, {length} bytes are offered"
            self._deferred.append(lambda: self.refuse(transfer, reason))
            if sink is not None:
                self._deferred.append(functools.partial(sink.failed, reason))
            return

        def granted() -> None:
            with self._turn():
                self._start_locked(transfer, length)

        def revoked(reason: str) -> None:
            error = TransferError(f"its memory is needed: {reason}")  # another link says so; to end this one takes long
            threading.Thread(target=self.failed, args=(error,), name="rdma-end", daemon=True).start()

        refused = functools.partial(self._no_memory, transfer, length)
        self._inbox.reserve(transfer, length, sink, granted, refused, revoked)

    def _offered_again(self, transfer: int, length: int, label: int) -> None:
        with self._turn():
            if transfer in self._core.progress():  # else it was withdrawn, or all has ended
                self._offered_locked(transfer, length, label)

    def _start_locked(self, transfer: int, length: int) -> None:
        try:
            way = self._inbox.start(transfer, length, self._rails.endpoint if self._rails else None)
        except MemoryError as error:
            reason = str(error)
            self._deferred.append(lambda: self._no_memory(transfer, length, reason))
        else:
            if way is not None:
                self._core.accept(transfer, time.monotonic(), *way)

    def _no_memory(self, transfer: int, length: int, reason: str) -> None:
        self.log.seldom(logging.ERROR, "%s: no memory for a message of %d bytes: %s", self.name, length, reason)
        self.refuse(transfer, f"the receiver has no memory for {length} bytes: {reason}")

    def _expose_locked(self, chunk: events.ExposeChunk) -> None:
        assert self._rails is not None
        try:
            remote = self._inbox.expose(chunk, self._rails.endpoint)
        except MemoryError as error:
            raise TransferError(f"no memory for a chunk of {chunk.length} bytes: {error}") from error
        self._core.exposed(chunk, remote)

    # -- the connection's events ---------------------------------------------------------------------------

    def _pump_locked(self, inline_bytes: int = 0) -> None:
        """Carry out what the connection asks for and send what it has to say."""
        while happened := self._core.next_events():
            for event in happened:
                self._handle_locked(event)
        if output := self._core.data_to_send():
            self._writer.send_locked(output, inline_bytes)

    def _handle_locked(self, event: events.Event) -> None:
        match event:
            case events.WriteChunk():
                self._outbox.granted(event.transfer, event.offset, event.length)
                if (rails := self._rails) is not None:
                    make = self._outbox.make_chunk(rails, event)
                    if rails.endpoint.write_is_nonblocking and not self._outbox.is_work(event.transfer):
                        self._deferred.append(functools.partial(rails.write, event, make))
                    else:
                        rails.post(event, make)
            case events.ExposeChunk():
                self._expose_locked(event)
            case events.RevokeChunk():
                self._inbox.revoke(event)
            case events.InlineReceived(payload):
                self._deferred.bring(payload)
            case events.DataArrived():
                self._data_arrived_locked(event)
            case events.MessageOffered(transfer, length, label):
                self._count_offered_locked(length)
                self._offered_locked(transfer, length, label)
            case events.MessageReceived(transfer):
                if (buffer := self._inbox.finish(transfer)) is not None:
                    self._deferred.bring(buffer)
            case events.ReceiveFailed(transfer, reason):
                self.log.debug("%s: message %d was not received: %s", self.name, transfer, reason)
                self._inbox.finish(transfer, reason)
            case events.MessageSent(transfer):
                self._outbox.finish(transfer, "")
            case events.SendFailed(transfer, reason):
                told = self._outbox.is_offered(transfer) or self._core.state is not Phase.OPEN
                level = logging.DEBUG if told else logging.ERROR  # who offers many tells of them once
                self.log.log(level, "%s: message %d was not delivered: %s", self.name, transfer, reason)
                lost = self._outbox.finish(transfer, reason)
                if lost is not None and self._core.state is Phase.OPEN:
                    self._deferred.append(functools.partial(lost, reason))
            case events.PeerLeft(reason):
                self._failure = reason or "the peer closed the connection"
                self._room.notify_all()
                if reason:
                    self.log.error("%s: the peer disconnected: %s", self.name, reason)
            case _:
                self._handle_rails_locked(event)

    # -- rails ---------------------------------------------------------------------------------------------

    def _handle_rails_locked(self, event: events.Event) -> None:
        match event:
            case events.ChooseFabric():
                self._discard_rails_locked()  # those of an attempt that failed
                opening = self._opener.choose(event)
                self._adopt_locked(opening, event.peer)
                most = opening.rails.endpoint.most_rails
                self._core.choose(opening.name, opening.offer, opening.sealed, opening.checked, most)
            case events.OpenRails():
                # Dialling blocks: not under the lock nor, once messages flow, in the reader's way.
                if self._core.state is Phase.OPEN:
                    thread = threading.Thread(target=self._redial, args=(event,), name="rdma-dial", daemon=True)
                    self._deferred.append(thread.start)
                else:
                    self._to_dial = event
            case events.Opened() if self._rails is not None:
                self._opener.start(self._rails, event)
                self._report_broken_locked(self._rails, self._rails.broken)
            case events.RailAdded(rail) if self._rails is not None:
                self._rails.join(rail)
                self._report_broken_locked(self._rails, [rail])
            case events.GrowRails(count) if self._rails is not None:
                self.log.info("%s: the path is long, or loses packets: it gets up to %d rails", self.name, count)
                self._deferred.append(functools.partial(self._rails.endpoint.grow, count))
            case events.RailsLost(reason):
                self.log.warning("%s: no rail is left over %s (%s); opening new ones", self.name, self.fabric, reason)
                self._inbox.rails_lost()
                self._discard_rails_locked()
            case events.DropRail(rail) if self._rails is not None:
                self._deferred.append(functools.partial(self._rails.endpoint.drop, rail))

    def _count_offered_locked(self, nbytes: int) -> None:
        if self._rails is not None and self._rails.is_now_worth_more(nbytes):
            self._core.want_rails(self._rails.wanted())

    def rail_up(self, rails: RailSet, rail: int) -> None:
        """See `RailOwner.rail_up`."""
        with self._turn():
            if rails is self._rails:  # else it is closed with the others
                self._core.rail_up(rail, time.monotonic())

    def _discard_rails_locked(self) -> None:
        if (rails := self._take_rails_locked()) is not None:
            self._deferred.append(rails.close)

    def _take_rails_locked(self) -> RailSet | None:
        rails, self._rails = self._rails, None
        if rails is not None:
            rails.void = True
        return rails

    def rail_down(self, rails: RailSet, rail: int, error: Exception, goodbye: float = _GOODBYE_SECONDS) -> None:
        """See `RailOwner.rail_down`. The thread that reads the control stream can't wait for a goodbye."""
        with self._guarded():
            # A peer that leaves closes its rails right after its goodbye: give the goodbye time to be read.
            with self._room:
                if self._room.wait_for(lambda: self._failure is not None or self._closing, timeout=goodbye):
                    return
                rails.broken[rail] = error
                if rails is self._rails:
                    self.log.warning("%s: %s", self.name, error)
                    if isinstance(error, FabricUnavailable):
                        self._opener.rule_out(self.fabric, str(error))
                    self._core.rail_down(rail, str(error), time.monotonic())
                    self._pump_locked()
            self._deferred.run()

    def _redial(self, offered: events.OpenRails) -> None:
        with self._guarded():
            self._dial(offered)
        self._deferred.run()

    def _dial(self, offered: events.OpenRails) -> None:
        assert self._core.peer is not None
        opening = self._opener.dial(self._core.peer, offered)
        with self._lock:
            if self._closing:
                if opening.usable:
                    self._deferred.append(opening.rails.close)
            else:
                if opening.usable:
                    self._adopt_locked(opening, self._core.peer)
                self._core.dialled(opening.count, time.monotonic(), opening.reason, opening.answer)
                self._pump_locked()

    def _adopt_locked(self, opening: Opening, peer: wire.Hello) -> None:
        self._rails, self.fabric, self.passed_over = opening.rails, opening.rails.fabric, self._opener.passed_over
        self.way = f"{self.fabric}, {self._stream.way(self._core.role is Role.ACTIVE)}"
        self._core.set_controller(opening.controller)
        self._inbox.set_controller(opening.controller, opening.same_host)
        self._outbox.set_protection(self._stream.sealer(self._key) if opening.sealed else None, opening.checked)
        self._inbox.set_protection(self._stream.sealer(peer.seal_key) if opening.sealed else None, opening.checked)

    def _report_broken_locked(self, rails: RailSet, new: Iterable[int]) -> None:
        for rail in [rail for rail in new if rail in rails.broken]:  # before the connection knew of it
            self._deferred.append(functools.partial(self.rail_down, rails, rail, rails.broken[rail], 0.0))
