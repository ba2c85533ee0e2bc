"""Runs a `Channel` on a control stream and the rails of a fabric: the one place with threads.

    FLARE's thread   Link.send       -> core -> writer queue
    reader thread    Link.run        control stream -> core -> events
    writer thread                    writer queue -> control stream; once a second the core's deadlines
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nvflare_rdma.channel import events, sealing, wire
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.control_rail import ControlRail
from nvflare_rdma.channel.core import Channel, ChannelLimits
from nvflare_rdma.channel.state import Phase, Role
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, RdmaError, TransferError
from nvflare_rdma.fabric.base import Endpoint, Fabric, Region
from nvflare_rdma.fabric.memory import MemoryBudget, SlotPool
from nvflare_rdma.fabric.selection import choose

log = logging.getLogger(__name__)

Delivery: TypeAlias = bytes | memoryview
_LINGER = 5.0


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
        own = {n: context.unavailable.get(n, "not part of this process") for n in context.order}
        key = sealing.new_key() if stream.secure else b""
        self._sealer = sealing.Sealer(key) if key else None
        self._opener: sealing.Sealer | None = None
        hello = wire.Hello(own, context.limits.max_message_bytes, context.limits.inline_bytes, key)
        overhead = sealing.TAG_BYTES if key else 0
        self._core = Channel(role, context.limits, hello, time.monotonic(), overhead)
        self._endpoint: Endpoint | None = None
        self._control_rail = ControlRail(self._send_on_control)
        self._output: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._queued = 0  # bytes in _output that belong to inline messages
        self._outgoing: dict[int, memoryview] = {}
        self._in_flight = 0
        self._arriving: dict[int, _Arriving] = {}
        self._sealed: dict[int, _SealedChunk] = {}
        self._reserving: dict[int, Callable[[], None]] = {}
        self._after: list[Callable[[], None]] = []
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
        self._stream.set_timeout(self._context.limits.handshake_timeout)
        self._writer.start()
        try:
            with self._lock:
                self._pump()
            while self._core.state is not Phase.OPEN:
                data = self._stream.receive()
                if not data:
                    raise FabricError(f"{self.name}: {self._failure or 'the peer closed the connection'}")
                with self._lock:
                    self._core.receive(data, time.monotonic())
                    self._pump()
                if self._failure is not None:
                    raise FabricError(f"{self.name}: {self._failure}")
        except TimeoutError:
            self._shut_down("the handshake took too long")
            raise FabricError(
                f"{self.name}: the peer did not answer the handshake within "
                f"{self._context.limits.handshake_timeout:g} s; is it an nvflare-rdma listener?"
            ) from None
        except Exception as error:
            self._shut_down(str(error))
            raise
        self._stream.set_timeout(None)

    def run(self) -> None:
        """Receive until the connection ends. Call once, after `open`."""
        reason = "the peer closed the connection"
        try:
            self._run_after()
            while data := self._stream.receive():
                with self._lock:
                    self._core.receive(data, time.monotonic())
                    self._pump()
                self._run_after()
        except ProtocolError as error:
            reason = str(error)
            log.error("%s: disconnected, the peer broke the protocol: %s", self.name, error)
        except (RdmaError, OSError) as error:
            reason = str(error)
            if not self._closing:
                log.warning("%s: connection lost: %s", self.name, error)
        self._shut_down(reason)
        # Another thread may have begun it; when this returns, everything is freed.
        self._ended.wait(2 * _LINGER)

    def close(self) -> None:
        """Let what was sent arrive (bounded), then disconnect. Callable from any thread, any number of times."""
        deadline = time.monotonic() + _LINGER
        with self._lock:
            while self._in_flight and not self._closing:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._room.wait(remaining):
                    break
        self._shut_down("")

    def _shut_down(self, reason: str) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._failure = self._failure or reason or "the connection was closed"
            self._core.close(reason)
            self._pump()
            self._room.notify_all()
            waiting = list(self._reserving.values())
            self._reserving.clear()
        self._run_after()
        for granted in waiting:
            # A reservation that is granted meanwhile is given back by `granted` itself: nobody waits for it.
            self._context.budget.cancel(granted)
        self._output.put(None)
        if self._writer is not threading.current_thread() and self._writer.is_alive():
            self._writer.join(timeout=2.0)
        self._stream.close()
        if self._endpoint is not None:
            self._endpoint.close()
        self._ended.set()

    def failed(self, error: Exception) -> None:
        """A fabric reports that it can't go on."""
        if isinstance(error, FabricError):
            # A peer that leaves closes its rails right after its goodbye: give the goodbye time to be read.
            with self._room:
                self._room.wait_for(lambda: self._failure is not None or self._closing, timeout=1.0)
                if self._failure is not None:
                    return
        if not self._closing:
            log.error("%s: disconnected: %s", self.name, error)
        self._shut_down(str(error))

    # -- sending -------------------------------------------------------------------------------------------

    def send(self, message: bytes | bytearray | memoryview, timeout: float) -> None:
        """Send a message. Blocks while more than the window waits for the peer; keeps ``message`` until it is
        delivered, so it must not be changed afterwards.

        Raises:
            TransferError: the connection is closed, the message is too large, or ``timeout`` (seconds) is over.
        """
        view = memoryview(message).cast("B") if len(message) else memoryview(b"")
        deadline = time.monotonic() + timeout
        inline = len(view) <= self._context.limits.inline_bytes
        with self._lock:
            self._wait_for_room(len(view), inline, deadline, timeout)
            if inline and self._core.peer is not None and len(view) <= self._core.peer.inline_bytes:
                self._core.send_inline(view)
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
                raise TransferError(
                    f"{self.name}: the peer took none of {used} bytes within {timeout:g} s (streaming_send_timeout)"
                )

    def _send_on_control(self, notification: int, payload: memoryview) -> None:
        self._core.send_data(notification, payload)
        self._core.written(notification, time.monotonic())

    def written(self, notification: int) -> None:
        with self._lock:
            self._core.written(notification, time.monotonic())
            self._pump()

    # -- receiving -----------------------------------------------------------------------------------------

    def landed(self, notification: int, length: int) -> None:
        try:
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
                if self._closing:
                    return
                self._core.landed(notification, length, time.monotonic())
                self._pump()
            self._run_after()
        except RdmaError as error:
            self.failed(error)

    def _reserve(self, transfer: int, length: int) -> None:
        def granted() -> None:
            with self._lock:
                live = self._reserving.pop(transfer, None) is not None
                if live:
                    self._start(transfer, length)
                    self._pump()
            if not live:
                self._context.budget.release(length)
            self._run_after()

        with self._lock:
            if self._closing:
                return
            self._reserving[transfer] = granted
        self._context.budget.request(length, granted)

    def _start(self, transfer: int, length: int) -> None:
        buffer = self._context.pool.take(length)
        region = None if self._opener is not None else self._writable().register(buffer)
        self._arriving[transfer] = _Arriving(buffer, region)
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

    def _pump(self) -> None:
        """Carry out what the core asks for and queue what it has to say. Holds the lock."""
        while happened := self._core.next_events():
            for event in happened:
                self._handle(event)
        if output := self._core.data_to_send():
            self._queued += sum(map(len, output))
            self._output.put(output)

    def _run_after(self) -> None:
        while True:
            with self._lock:
                todo, self._after = self._after, []
            if not todo:
                return
            for call in todo:
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
                    log.debug("%s: message %d was not delivered: %s", self.name, transfer, event.reason)
            case events.ChooseFabric(peer):
                self._choose(peer)
            case events.OpenRails(fabric, offer):
                self._open_rails(fabric, offer)
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
        length = len(arriving.buffer)
        if deliver:
            buffer = arriving.buffer
            self._after.append(lambda: self._deliver(buffer))
        self._after.append(lambda: self._context.budget.release(length))

    # -- choosing a fabric ---------------------------------------------------------------------------------

    def _choose(self, peer: wire.Hello) -> None:
        self._check_security(peer)
        own = {name: self._context.unavailable.get(name, "") for name in self._context.order}
        name, passed_over = choose(self._context.order, own, peer.fabrics)
        if not name:
            raise FabricUnavailable(
                f"no fabric that both sides allow (rdma_fabrics={','.join(self._context.order)}): {passed_over}"
            )
        log.info("%s: fabric %s%s", self.name, name, f" ({passed_over})" if passed_over else "")
        self.fabric = name
        self._endpoint, offer = self._fabrics[name].offer(self)
        self._core.choose(name, offer)

    def _open_rails(self, name: str, offer: Mapping[str, Any]) -> None:
        peer = self._core.peer
        assert peer is not None
        self._check_security(peer)
        if name not in self._context.order or self._context.unavailable.get(name, "unknown"):
            raise ProtocolError(f"the peer chose the fabric {name!r}, which this side did not offer")
        self.fabric = name
        try:
            self._endpoint = self._fabrics[name].connect(offer, self)
        except FabricError as error:
            self._core.dialled(0, str(error))
        else:
            self._core.dialled(self._endpoint.rails)

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
            while True:
                try:
                    messages = self._output.get(timeout=1.0)
                except queue.Empty:
                    with self._lock:
                        self._core.check(time.monotonic())
                    continue
                if messages is None:
                    return
                self._stream.send(messages)
                with self._lock:
                    self._queued -= sum(map(len, messages))
                    self._room.notify_all()
        except TransferError as error:
            self.failed(error)
        except OSError as error:
            if not self._closing:
                # The reader sees the same and ends the link; wake it in case it does not.
                log.debug("%s: control stream can't be written: %s", self.name, error)
                with contextlib.suppress(OSError):
                    self._stream.close()
