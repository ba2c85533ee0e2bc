"""Runs a `Channel` on a control stream and the rails of a fabric: the one place with threads.

    FLARE's thread   Link.send       -> core -> writer queue
    reader thread    Link.run        control stream -> core -> events; once a second the deadlines
    writer thread                    writer queue -> control stream
    fabric threads   landed, written -> core

The core is called under one lock. Whatever calls out of the link (delivery, budget) happens after it is
released: a budget that one link frees may start a transfer of another.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nvflare_rdma.channel import events, sealing, wire
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.control_rail import ControlRail
from nvflare_rdma.channel.core import Channel, ChannelLimits
from nvflare_rdma.channel.state import Phase, Role
from nvflare_rdma.errors import (
    FabricError,
    FabricUnavailable,
    ProtocolError,
    RdmaError,
    SendTimeoutError,
    TransferError,
)
from nvflare_rdma.fabric.base import Endpoint, Fabric, Region
from nvflare_rdma.fabric.memory import MemoryBudget, SlotPool
from nvflare_rdma.fabric.selection import choose

log = logging.getLogger(__name__)

Delivery: TypeAlias = bytes | memoryview
_LINGER = 5.0
_TICK = 1.0


@dataclass(frozen=True)
class LinkContext:
    """What all links of a process share, and what they may do."""

    limits: ChannelLimits
    budget: MemoryBudget
    pool: SlotPool
    order: Sequence[str]
    unavailable: Mapping[str, str]
    """Fabric name -> reason why this process can't use it, "" if it can."""
    window_bytes: int = 32 * 1024 * 1024
    """Outgoing bytes that may wait for the peer before `Link.send` blocks; one message may always."""


@dataclass(slots=True)
class _Arriving:
    buffer: memoryview
    region: Region | None
    """Registered whole in clear mode; sealed chunks are exposed in slots of their own."""
    cost: int
    """Bytes of the budget."""


@dataclass(slots=True)
class _SealedChunk:
    chunk: events.ExposeChunk
    slot: memoryview
    region: Region


class Link:
    """One connection to a peer. ``deliver`` gets each message: bytes if it came inline, else a view of a slot
    that is re-used when the last slice of the view is gone."""

    def __init__(
        self,
        stream: ControlStream,
        role: Role,
        fabrics: Mapping[str, Fabric],
        context: LinkContext,
        deliver: Callable[[Delivery], None],
        name: str,
    ) -> None:
        self.name = name
        self.fabric = ""
        self._stream = stream
        self._fabrics = fabrics
        self._context = context
        self._deliver = deliver
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._own = {n: context.unavailable.get(n, "not part of this process") for n in context.order}
        key = sealing.new_key() if stream.secure else b""
        self._sealer = sealing.Sealer(key) if key else None
        self._opener: sealing.Sealer | None = None
        hello = wire.Hello(self._own, context.limits.max_message_bytes, context.limits.inline_bytes, key)
        overhead = sealing.TAG_BYTES if key else 0
        self._core = Channel(role, context.limits, hello, time.monotonic(), overhead)
        self._endpoint: Endpoint | None = None
        self._control_rail = ControlRail(self._send_on_control)
        #: control messages, and how many of their bytes are inline messages; None ends the writer
        self._output: queue.SimpleQueue[tuple[list[bytes], int] | None] = queue.SimpleQueue()
        self._queued = 0  # bytes of inline messages in _output
        self._unsent = 0  # batches in _output
        self._write_progress = time.monotonic()
        self._outgoing: dict[int, memoryview] = {}
        self._in_flight = 0
        self._arriving: dict[int, _Arriving] = {}
        self._sealed: dict[int, _SealedChunk] = {}
        self._reserving: dict[int, Callable[[], None]] = {}
        self._to_dial: events.OpenRails | None = None
        self._after: list[Callable[[], None]] = []
        self._checked_at = time.monotonic()
        self._failure: str | None = None
        self._closing = False
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_loop, name=f"rdma-control-{name}", daemon=True)

    # -- life ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Handshake: agree on a fabric and open its rails. Blocks at most the handshake timeout.

        Raises:
            RdmaError: the peer speaks another protocol, or no common fabric was allowed. OSError: it is gone.
        """
        self._writer.start()
        try:
            with self._lock:
                self._pump()
            while self._core.state is not Phase.OPEN:
                self._step()
                if self._core.state is Phase.CLOSED:
                    raise FabricError(f"{self.name}: {self._failure or 'the peer closed the connection'}")
                if self._to_dial is not None:
                    self._dial(self._to_dial)
        except Exception as error:
            self._shut_down(str(error))
            raise

    def run(self) -> None:
        """Receive until the connection ends. Call once, after `open`. When it returns, everything is freed."""
        reason = ""
        try:
            self._run_after()
            while self._core.state is Phase.OPEN:
                self._step()
                self._run_after()
        except ProtocolError as error:
            reason = str(error)
            log.error("%s: disconnected, the peer broke the protocol: %s", self.name, error)
        except (RdmaError, OSError) as error:
            reason = str(error)
            if not self._closing:
                log.warning("%s: connection lost: %s", self.name, error)
        except Exception as error:
            reason = f"internal error: {error}"
            log.exception("%s: disconnected by an error of this side", self.name)
        finally:
            self._shut_down(reason)
            # Another thread may have begun it.
            self._ended.wait(2 * _LINGER)

    def _step(self) -> None:
        """Take what the control stream has, or wait for it a little; and look at the deadlines now and then."""
        data = self._stream.receive(_TICK)
        now = time.monotonic()
        with self._lock:
            if data == b"":
                self._failure = self._failure or "the peer closed the connection"
                self._core.close(self._failure)
            elif data:
                self._core.receive(data, now)
            self._pump()
            if now - self._checked_at >= _TICK:
                self._checked_at = now
                self._check(now)

    def _check(self, now: float) -> None:
        self._core.check(now)
        stall = self._context.limits.stall_timeout
        if self._unsent and now - self._write_progress > stall:
            raise TransferError(f"the peer has read nothing of the control stream for {stall:g} s")

    def close(self, linger: float = _LINGER) -> None:
        """Let what was sent arrive (for at most ``linger`` seconds), then disconnect. Callable from any thread."""
        deadline = time.monotonic() + linger
        with self._lock:
            while self._in_flight and not self._closing and self._core.state is Phase.OPEN:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._room.wait(remaining):
                    break
        self._shut_down("")

    def _shut_down(self, reason: str) -> None:
        """End the connection and free everything that this side holds for it. Only the first call does anything."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._failure = self._failure or reason or "the connection was closed"
        try:
            with self._lock:
                waiting = self._free(reason)
            self._run_after()
            for granted in waiting:
                # One that is granted at this moment gives its bytes back itself: nobody waits for them any more.
                self._context.budget.cancel(granted)
        finally:
            self._output.put(None)
            if self._writer is not threading.current_thread() and self._writer.is_alive():
                self._writer.join(timeout=2.0)
            self._stream.close()
            if self._endpoint is not None:
                self._endpoint.close()
            self._ended.set()

    def _free(self, reason: str) -> list[Callable[[], None]]:
        """Say goodbye and let go of all memory; the reservations that still wait for some. Holds the lock."""
        try:
            self._core.close(reason)
            self._pump()
        finally:
            # By what is held, not by what was said about it: nothing may stay behind whatever happened before.
            waiting = list(self._reserving.values())
            self._reserving.clear()
            for transfer in list(self._arriving):
                self._finish(transfer, deliver=False)
            self._sealed.clear()
            self._outgoing.clear()
            self._in_flight = 0
            self._room.notify_all()
        return waiting

    def failed(self, error: Exception) -> None:
        """A fabric reports that it can't go on, or something broke in one of its threads."""
        if isinstance(error, FabricError):
            # A peer that leaves closes its rails right after its goodbye: give the goodbye time to be read.
            with self._room:
                self._room.wait_for(lambda: self._failure is not None or self._closing, timeout=1.0)
                if self._failure is not None:
                    return
        if not self._closing:
            log.error("%s: disconnected: %s", self.name, error, exc_info=not isinstance(error, RdmaError))
        self._shut_down(str(error))

    # -- sending -------------------------------------------------------------------------------------------

    def send(self, message: bytes | bytearray | memoryview, timeout: float) -> None:
        """Send a message. Blocks while more than the window waits for the peer; keeps ``message`` until it is
        delivered, so it must not be changed afterwards.

        Raises:
            SendTimeoutError: the peer took nothing for ``timeout`` seconds.
            TransferError: the connection is closed, or the message is too large for the peer.
        """
        view = memoryview(message).cast("B") if len(message) else memoryview(b"")
        deadline = time.monotonic() + timeout
        with self._lock:
            inline = self._core.fits_inline(len(view))
            self._wait_for_room(len(view), inline, deadline, timeout)
            if inline:
                self._core.send_inline(view)
                self._pump(inline_bytes=len(view))
            else:
                transfer = self._core.submit(len(view), time.monotonic())
                self._outgoing[transfer] = view
                self._in_flight += len(view)
                self._pump()

    def _wait_for_room(self, length: int, inline: bool, deadline: float, timeout: float) -> None:
        window = self._context.window_bytes
        while True:
            if self._failure is not None or self._closing:
                raise TransferError(f"{self.name}: {self._failure or 'the connection is closed'}")
            used = self._queued if inline else self._in_flight
            if used == 0 or used + length <= window:
                return
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self._room.wait(remaining):
                raise SendTimeoutError(
                    f"{self.name}: the peer took none of {used} bytes within {timeout:g} s (streaming_send_timeout)"
                )

    def _send_on_control(self, notification: int, payload: memoryview) -> None:
        self._core.send_data(notification, payload)
        self._core.written(notification, time.monotonic())

    def written(self, notification: int) -> None:
        with self._guarded(), self._lock:
            self._core.written(notification, time.monotonic())
            self._pump()

    # -- receiving -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """For what other threads call: an error ends this link, and not the thread, which may serve others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - reported and translated by `failed`
            self.failed(error)

    def landed(self, notification: int, length: int) -> None:
        with self._guarded():
            with self._lock:
                sealed = self._sealed.pop(notification, None)
                arriving = self._arriving.get(sealed.chunk.transfer) if sealed is not None else None
            if sealed is not None and arriving is not None and self._opener is not None:
                chunk = sealed.chunk
                target = arriving.buffer[chunk.offset : chunk.offset + chunk.length]
                if length == len(sealed.slot):  # else the core says what is wrong
                    self._opener.open_into(chunk.transfer, chunk.index, sealed.slot, target)
                sealed.region.close()
            with self._lock:
                if self._core.state is Phase.OPEN:
                    self._core.landed(notification, length, time.monotonic())
                    self._pump()
            self._run_after()

    def _cost(self, length: int) -> int:
        """What receiving a message holds: its buffer, and in secure mode the slots that sealed chunks land in."""
        pool, limits = self._context.pool, self._context.limits
        if self._opener is None:
            return pool.cost(length)
        chunks = min(limits.depth, -(-length // limits.chunk_bytes))
        return pool.cost(length) + chunks * pool.cost(min(length, limits.chunk_bytes) + sealing.TAG_BYTES)

    def _reserve(self, transfer: int, length: int) -> None:
        cost = self._cost(length)

        def granted() -> None:
            started = False
            with self._guarded(), self._lock:
                if self._reserving.pop(transfer, None) is not None and self._core.state is Phase.OPEN:
                    try:
                        self._start(transfer, length, cost)
                    except MemoryError as error:
                        log.error("%s: no memory for a message of %d bytes: %s", self.name, length, error)
                        self._core.refuse(transfer, f"the receiver has no memory for {length} bytes")
                    finally:
                        started = transfer in self._arriving  # then `_finish` gives the bytes back
                    self._pump()
            if not started:
                self._context.budget.release(cost)
            self._run_after()

        with self._lock:
            if self._core.state is not Phase.OPEN:
                return
            self._reserving[transfer] = granted
        self._context.budget.request(cost, granted)

    def _start(self, transfer: int, length: int, cost: int) -> None:
        buffer = self._context.pool.take(length)
        region = None if self._opener is not None else self._writable().register(buffer)
        self._arriving[transfer] = _Arriving(buffer, region, cost)
        self._core.accept(transfer, time.monotonic())

    def _writable(self) -> Endpoint:
        return self._endpoint if self._endpoint is not None else self._control_rail

    def _expose(self, chunk: events.ExposeChunk) -> None:
        arriving = self._arriving[chunk.transfer]
        if arriving.region is not None:
            remote = arriving.region.expose(chunk.notification, chunk.offset, chunk.length)
        else:
            slot = self._context.pool.take(chunk.length + sealing.TAG_BYTES)
            region = self._writable().register(slot)
            remote = region.expose(chunk.notification, 0, len(slot))
            self._sealed[chunk.notification] = _SealedChunk(chunk, slot, region)
        self._core.exposed(chunk, remote)

    # -- the core's events ---------------------------------------------------------------------------------

    def _pump(self, inline_bytes: int = 0) -> None:
        """Carry out what the core asks for and queue what it has to say. Holds the lock."""
        while happened := self._core.next_events():
            for event in happened:
                self._handle(event)
        if output := self._core.data_to_send():
            if not self._unsent:
                self._write_progress = time.monotonic()
            self._queued += inline_bytes
            self._unsent += 1
            self._output.put((output, inline_bytes))

    def _run_after(self) -> None:
        while True:
            with self._lock:
                todo, self._after = self._after, []
            if not todo:
                return
            for call in todo:
                with self._guarded():
                    call()

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.WriteChunk():
                self._write(event)
            case events.ExposeChunk():
                self._expose(event)
            case events.InlineReceived(payload):
                self._after.append(lambda: self._deliver(payload))
            case events.DataArrived(notification, payload):
                self._control_rail.fill(notification, payload)
                size = len(payload)
                self._after.append(lambda: self.landed(notification, size))
            case events.MessageOffered(transfer, length):
                self._after.append(lambda: self._reserve(transfer, length))
            case events.MessageReceived(transfer):
                self._finish(transfer, deliver=True)
            case events.ReceiveFailed(transfer):
                self._finish(transfer, deliver=False)
            case events.MessageSent(transfer) | events.SendFailed(transfer):
                if (view := self._outgoing.pop(transfer, None)) is not None:
                    self._in_flight -= len(view)
                    self._room.notify_all()
                if isinstance(event, events.SendFailed):
                    level = logging.ERROR if self._core.state is Phase.OPEN else logging.DEBUG
                    log.log(level, "%s: message %d was not delivered: %s", self.name, transfer, event.reason)
            case events.ChooseFabric(peer):
                self._choose(peer)
            case events.OpenRails():
                self._to_dial = event  # by `open`, which may block: not here, under the lock
            case events.Opened(rails, reason):
                self._opened(rails, reason)
            case events.PeerLeft(reason):
                self._failure = reason or "the peer closed the connection"
                self._room.notify_all()
                if reason:
                    log.error("%s: the peer disconnected: %s", self.name, reason)

    def _write(self, chunk: events.WriteChunk) -> None:
        source = self._outgoing[chunk.transfer][chunk.offset : chunk.offset + chunk.length]
        if self._sealer is not None:
            slot = self._context.pool.take(chunk.length + sealing.TAG_BYTES)
            self._sealer.seal_into(chunk.transfer, chunk.index, source, slot)
            source = slot
        self._writable().write(source, chunk.remote, chunk.notification)

    def _finish(self, transfer: int, deliver: bool) -> None:
        arriving = self._arriving.pop(transfer, None)
        if arriving is None:
            return
        if arriving.region is not None:
            arriving.region.close()
        cost = arriving.cost
        self._after.append(lambda: self._context.budget.release(cost))
        if deliver:
            buffer = arriving.buffer
            self._after.append(lambda: self._deliver(buffer))

    # -- choosing a fabric ---------------------------------------------------------------------------------

    def _choose(self, peer: wire.Hello) -> None:
        self._check_security(peer)
        name, passed_over = choose(self._context.order, self._own, peer.fabrics)
        if not name:
            raise FabricUnavailable(
                f"no fabric that both sides allow (rdma_fabrics={','.join(self._context.order)}): {passed_over}"
            )
        log.info("%s: fabric %s%s", self.name, name, f" ({passed_over})" if passed_over else "")
        self.fabric = name
        self._endpoint, offer = self._fabrics[name].offer(self)
        self._core.choose(name, offer)

    def _dial(self, offered: events.OpenRails) -> None:
        peer, name = self._core.peer, offered.fabric
        assert peer is not None
        self._to_dial = None
        self._check_security(peer)
        if self._own.get(name, "unknown"):
            raise ProtocolError(f"the peer chose the fabric {name!r}, which this side did not offer")
        self.fabric = name
        endpoint, reason = None, ""
        try:
            endpoint = self._fabrics[name].connect(offered.offer, self)
        except FabricError as error:
            reason = str(error)
        with self._lock:
            if not self._closing:
                self._endpoint = endpoint
                self._core.dialled(endpoint.rails if endpoint is not None else 0, reason)
                self._pump()
                return
        if endpoint is not None:
            endpoint.close()

    def _check_security(self, peer: wire.Hello) -> None:
        if bool(peer.seal_key) != self._stream.secure:
            raise ProtocolError("one side seals its chunks and the other does not")
        self._opener = sealing.Sealer(peer.seal_key) if peer.seal_key else None

    def _opened(self, rails: int, reason: str) -> None:
        if rails:
            log.info("%s: data goes over %s, %d rails", self.name, self.fabric, rails)
            return
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            self._after.append(endpoint.close)
        self.fabric = "control"
        log.warning("%s: no rail, data goes over the control stream, which is slower: %s", self.name, reason)

    # -- the writer ----------------------------------------------------------------------------------------

    def _write_loop(self) -> None:
        try:
            while (item := self._output.get()) is not None:
                messages, inline_bytes = item
                self._stream.send(messages)
                with self._lock:
                    self._queued -= inline_bytes
                    self._unsent -= 1
                    self._write_progress = time.monotonic()
                    self._room.notify_all()
        except OSError as error:
            if not self._closing:
                # The reader sees the same and ends the link; wake it in case it does not.
                log.debug("%s: control stream can't be written: %s", self.name, error)
                with contextlib.suppress(OSError):
                    self._stream.close()
