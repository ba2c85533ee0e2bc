"""The memory of what a link receives: message buffers, the slots that sealed chunks land in, and the budget."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from nvflare_rdma.channel import sealing
from nvflare_rdma.channel.bodies import Sink
from nvflare_rdma.channel.context import LinkContext
from nvflare_rdma.channel.controllers import Controller
from nvflare_rdma.channel.protocol import events
from nvflare_rdma.channel.protocol.limits import MIN_CHUNK_BYTES, whole_units
from nvflare_rdma.errors import FabricError, IntegrityError
from nvflare_rdma.fabric import Endpoint, Region, RemoteSlice, Reservation
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)


@dataclass(slots=True)
class _Arriving:
    #: Where the message lands in the end; None if its sink takes it chunk by chunk.
    buffer: memoryview | None
    reservation: Reservation
    sink: Sink | None = None
    #: Registered whole when chunks land in place; sealed ones are exposed in slots of their own. None until the
    #: first chunk is exposed, and again when the rails are lost.
    region: Region | None = None
    #: Chunks whose answer may still come. Their memory is in use until then, whatever becomes of the message.
    open_chunks: int = 0
    reached: int = 0
    ended: bool = False
    #: Whom to tell when the message is whole and nothing of it is written or consumed any more.
    done: Callable[[], None] | None = None


@dataclass(slots=True)
class _Landing:
    chunk: events.ExposeChunk
    arriving: _Arriving
    target: memoryview
    region: Region
    slot: memoryview | None
    """Where a chunk lands that is sealed, and opened into `target` (which may be its beginning), or that its sink
    takes from there."""
    revoked: bool = False


class Inbox:
    """What a link receives. All methods but `verify` are called under the link's lock; `later` makes a call when it is
    released."""

    def __init__(
        self,
        context: LinkContext,
        controller: Controller,
        secure: bool,
        site: str,
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        self._budget = context.budget
        self._pool = context.pool
        self._wait = context.memory_wait
        self._controller = controller
        self._same_host = False
        self._secure = secure
        self._site = site
        self._later = later
        self._arriving: dict[int, _Arriving] = {}
        self._landings: dict[int, _Landing] = {}
        #: With how many bytes of the message may be in slots at once, and in one.
        self._waiting: dict[int, tuple[Reservation, Sink | None, int, int]] = {}
        self._opener: sealing.Sealer | None = None
        self._checked = False

    def set_protection(self, opener: sealing.Sealer | None, checked: bool) -> None:
        """Open the seals, or compare the checksums, of the chunks that are exposed from now on."""
        self._opener, self._checked = opener, checked

    def set_controller(self, controller: Controller, same_host: bool) -> None:
        """See `Connection.set_controller`. `same_host` says that chunks stay in memory of this host."""
        self._controller, self._same_host = controller, same_host

    # -- memory for a message ------------------------------------------------------------------------------

    def reserve(
        self,
        transfer: int,
        length: int,
        sink: Sink | None,
        granted: Callable[[], None],
        refused: Callable[[str], None],
        revoked: Callable[[str], None],
    ) -> None:
        """Ask the budget for a message's memory, when the lock is released. `start` has to follow `granted`. For
        `revoked` see `Reservation`."""
        cost, room, most = self._cost(length, sink)
        # A frame that waits holds up FLARE's sender; what has a sink waits for its turn among others of its kind.
        deadline = time.monotonic() + self._wait if sink is None else float("inf")
        reservation = Reservation(self._budget, cost, self._site, granted, refused, revoked, deadline)
        self._waiting[transfer] = reservation, sink, room, most
        self._later(reservation.request)

    def _cost(self, length: int, sink: Sink | None) -> tuple[int, int, int]:
        """What receiving a message holds: its buffer, unless that is the sink's, and the slots that chunks land in
        which are sealed or for the sink (they may be sealed only later, over other rails); and how many of its bytes
        may be in slots at once, and how many in one, 0 for any number."""
        cost = self._pool.cost(length) if sink is None else 0
        if not self._secure and (sink is None or sink.buffer is not None):
            return cost, 0, 0
        unit, limit = sink.unit if sink is not None else 1, self._budget.limit
        window, chunk, most = self._controller.window_bytes, self._controller.chunk_bytes, 0
        if sink is not None:  # several such messages make up a window; one is never more than half of the budget
            window = min(window, limit // 4)
        if self._same_host:
            # Chunks are long there, and many of them on their way, for what takes no slots. What takes some is to leave
            # room for the next, here, where its sender makes it, and where that keeps it for other receivers.
            window, chunk = min(window, limit // 4), min(chunk, max(limit // 12, MIN_CHUNK_BYTES))
            most = whole_units(chunk, unit) if sink is not None and sink.buffer is None else 0
        room = min(whole_units(window, unit), length)
        chunk = min(whole_units(chunk, unit), room)
        each = self._pool.cost(chunk + sealing.TAG_BYTES)
        slots = -(-room // chunk)
        if not cost:  # what is alone in the budget holds no more than that, unless it has to lie in memory whole anyway
            slots = min(slots, max(limit // each, 1))
        return cost + slots * each, min(slots * chunk, room), most

    def start(self, transfer: int, length: int, endpoint: Endpoint | None) -> tuple[int, int, int] | None:
        """Take the memory of a message that has its share of the budget, such that `endpoint` can land in it.

        Returns the unit of its chunks, how much of it may be on its way at once (0 for as much as there is room for),
        and how much in one chunk (0 for as much as the controller says); None if the message has failed meanwhile.

        Raises:
            MemoryError: there is none, whatever the budget says. `finish` is to follow.
        """
        if transfer not in self._waiting:
            return None
        reservation, sink, room, most = self._waiting[transfer]
        try:
            if sink is not None:
                buffer = sink.buffer
            else:
                buffer = self._memory(length, endpoint) if self._opener is None else self._pool.take(length)
        except MemoryError:
            self._later(reservation.release)  # before the peer hears of it
            raise
        del self._waiting[transfer]
        self._arriving[transfer] = _Arriving(buffer, reservation, sink)
        return sink.unit if sink is not None else 1, room, most

    def _memory(self, length: int, endpoint: Endpoint | None) -> memoryview:
        buffer = None
        if endpoint is not None:
            try:
                buffer = endpoint.allocate(length)
            except (FabricError, MemoryError) as error:
                log.warning("%s: %s; other memory costs a copy more", self._site, error)
        return self._pool.take(length) if buffer is None else buffer

    # -- chunks --------------------------------------------------------------------------------------------

    def expose(self, chunk: events.ExposeChunk, endpoint: Endpoint) -> RemoteSlice:
        """Expose memory for a chunk."""
        arriving = self._arriving[chunk.transfer]
        buffer = arriving.buffer
        if self._opener is not None or buffer is None:
            slot = self._memory(chunk.length + (sealing.TAG_BYTES if self._opener else 0), endpoint)
            target = slot[: chunk.length] if buffer is None else buffer[chunk.offset : chunk.offset + chunk.length]
            region = endpoint.register(slot)
            remote = region.expose(chunk.notification, 0, len(slot), chunk.rail)
            landing = _Landing(chunk, arriving, target, region, slot)
        else:
            if arriving.region is None:
                arriving.region = endpoint.register(buffer)
            remote = arriving.region.expose(chunk.notification, chunk.offset, chunk.length, chunk.rail)
            target = buffer[chunk.offset : chunk.offset + chunk.length]
            landing = _Landing(chunk, arriving, target, arriving.region, None)
        self._landings[chunk.notification] = landing
        arriving.open_chunks += 1
        if arriving.sink is not None and chunk.offset < arriving.reached:
            arriving.sink.resent_chunks += 1
        arriving.reached = max(arriving.reached, chunk.offset + chunk.length)
        return remote

    def revoke(self, event: events.RevokeChunk) -> None:
        """Take back what was exposed for a chunk. Its memory stays in use as long as its write may come."""
        landing = self._landings.get(event.notification)
        if landing is None:
            return
        landing.region.revoke(event.notification)
        landing.revoked = True
        if not event.answered:
            self._landings.pop(event.notification)
            self.closed(landing)

    def landed(self, notification: int) -> _Landing | None:
        """Return what was exposed under `notification`, for `verify` and then for `closed`."""
        return self._landings.pop(notification, None)

    def verify(self, landing: _Landing, length: int, digest: int) -> bool:
        """Open a chunk's seal, or compare its checksum, and hand it to its sink. Returns whether it is what was sent.
        This takes a while, so it is not called under the lock.

        Raises:
            RdmaError, OSError: the sink can't consume it.
        """
        chunk = landing.chunk
        if landing.revoked or length != len(landing.target if landing.slot is None else landing.slot):
            return True  # what came was discarded, or nothing was written, or the connection says what is wrong
        if landing.slot is not None and self._opener is not None:
            try:
                self._opener.open_into(chunk.transfer, chunk.offset, chunk.notification, landing.slot, landing.target)
            except IntegrityError:
                return False
        elif self._checked and sealing.checksum(landing.target) != digest:
            return False
        if (sink := landing.arriving.sink) is not None:
            if landing.arriving.buffer is None:
                sink.put(chunk.offset, landing.target)
            else:
                sink.landed(chunk.offset, chunk.length)
        return True

    def closed(self, landing: _Landing, landed: bool = False) -> None:
        """Free what a chunk was exposed in: nothing will be written there any more. If it has `landed`, verified, its
        sink has it."""
        if landed and not landing.revoked and (sink := landing.arriving.sink) is not None:
            sink.landed_bytes += landing.chunk.length
        if landing.slot is not None:
            landing.region.close()
            # The next chunk takes a slot before whoever calls this is done with `landing`.
            landing.slot, landing.target = None, memoryview(b"")
        landing.arriving.open_chunks -= 1
        self._settle(landing.arriving)

    def _settle(self, arriving: _Arriving) -> None:
        """A message has ended, or a chunk of it has: if both, its memory is free."""
        if arriving.ended and not arriving.open_chunks:
            self._later(arriving.reservation.release)
            if arriving.done is not None:
                self._later(arriving.done)
                arriving.done = None

    def rails_lost(self) -> None:
        """Forget the regions of an endpoint that is closed. The chunks in them are exposed anew."""
        for arriving in self._arriving.values():
            arriving.region = None

    # -- ends ----------------------------------------------------------------------------------------------

    def finish(self, transfer: int, failure: str = "") -> memoryview | None:
        """End a message, and return its buffer unless it has a sink, which is told. Its memory counts until nothing is
        written to it any more."""
        if transfer in self._waiting:
            reservation, sink, *_ = self._waiting.pop(transfer)
            self._later(reservation.release)
            self._tell(sink, failure)
            return None
        arriving = self._arriving.pop(transfer, None)
        if arriving is None:
            return None
        if arriving.region is not None:
            arriving.region.close()
        arriving.ended = True
        if failure:
            self._tell(arriving.sink, failure)
        elif arriving.sink is not None:
            # A chunk whose rail broke while it was consumed has come again over another: two threads are at it.
            arriving.done = arriving.sink.done
        self._settle(arriving)
        return arriving.buffer if arriving.sink is None else None

    def _tell(self, sink: Sink | None, failure: str) -> None:
        if sink is not None:
            self._later(functools.partial(sink.failed, failure))

    def clear(self) -> None:
        """End everything: the endpoint is closed, or about to be, and nothing will be written any more."""
        for landing in self._landings.values():
            self.closed(landing)
        self._landings.clear()
        for transfer in [*self._arriving, *self._waiting]:
            self.finish(transfer, "the connection has ended")
