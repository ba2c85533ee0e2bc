"""The rails that are open to a peer, with a sending thread for each, and the choice of the fabric behind them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from logging import LoggerAdapter
from typing import Any, Protocol, TypeAlias

from nvflare_rdma.channel.protocol import events, wire
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError
from nvflare_rdma.fabric import CompletionHandler, Endpoint, Fabric, RailPlaces, choose, join_threads
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

#: Makes the bytes of a chunk, and their digest. It may take as long as sealing does.
MakeChunk: TypeAlias = Callable[[], tuple[memoryview, int]]

#: A fabric that has failed so often, and never lasted so long (seconds), is not chosen again on this connection.
_MAX_FAILURES = 3
#: Over rails by which less was ever to be moved, in bytes, more of them are not worth their threads.
_MUCH = 256 * 1024
_LASTED = 30.0


class RailOwner(Protocol):
    """The link, as its rails see it: a `CompletionHandler` that is told which rails speak, for they are replaced when
    they break."""

    @property
    def log(self) -> LoggerAdapter[Any]:
        """Where what is said of a guest waits until it is let in."""

    def landed(self, rails: RailSet, notification: int, length: int, digest: int) -> None:
        """See `CompletionHandler.landed`."""

    def written(self, rails: RailSet, notification: int) -> None:
        """See `CompletionHandler.written`."""

    def rail_down(self, rails: RailSet, rail: int, error: Exception) -> None:
        """See `CompletionHandler.rail_down`."""

    def rail_up(self, rails: RailSet, rail: int) -> None:
        """See `CompletionHandler.rail_up`."""

    def closed(self, rails: RailSet) -> None:
        """Called when nothing is written, or lands, over these rails any more."""

    def failed(self, error: Exception) -> None:
        """See `CompletionHandler.failed`; also called for errors of this side."""


class RailSet(CompletionHandler):
    """One endpoint and its sending threads. After `close` nothing of it is heard any more. Rails that the peer opens
    take places of `site`."""

    def __init__(self, owner: RailOwner, places: RailPlaces, site: str) -> None:
        self.endpoint: Endpoint
        self.fabric = ""
        """Name of the fabric, "control" if everything goes on the control stream."""
        #: Rails that broke before the link knew of any.
        self.broken: dict[int, Exception] = {}
        #: Set by the link, under its lock, when other rails or none take the place of these: their grants are void.
        self.void = False
        self._owner = owner
        self._queues: dict[int, queue.SimpleQueue[tuple[events.WriteChunk, MakeChunk] | None]] = {}
        self._threads: list[threading.Thread] = []
        self._offered = self._wanted = 0
        self._places, self._site, self._admitted = places, site, 0
        self._admission = threading.Lock()
        self._closed = False

    def start(self, rail: int) -> None:
        """Start the sending thread of a rail."""
        work: queue.SimpleQueue[tuple[events.WriteChunk, MakeChunk] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._send, args=(work,), name=f"rdma-rail-{rail}", daemon=True)
        thread.start()
        self._queues[rail] = work
        self._threads.append(thread)

    def join(self, rail: int) -> None:
        """Have one more rail carry chunks.

        Raises:
            ProtocolError: it is not open here, whatever the peer says.
        """
        if not self.endpoint.has_joined(rail):
            raise ProtocolError(f"the peer says that {self.fabric} rail {rail} is open, which it is not here")
        self.start(rail)

    def is_now_worth_more(self, nbytes: int) -> bool:
        """Count bytes that are to be moved, in either direction. Returns whether there are now enough of them, for the
        first time, that more rails would be worth their threads."""
        before, self._offered = self._offered, self._offered + nbytes
        return before < _MUCH <= self._offered

    def wanted(self) -> int:
        """How many rails would do, if that is more than what was wanted before and much is to be moved; else 0."""
        if self._offered < _MUCH or (wanted := self.endpoint.wanted()) <= max(self._wanted, self.endpoint.rails):
            return 0
        self._wanted = wanted
        return wanted

    def post(self, chunk: events.WriteChunk, make: MakeChunk) -> None:
        """Have a chunk written by the thread of its rail."""
        self._queues[chunk.rail].put((chunk, make))

    def write(self, chunk: events.WriteChunk, make: MakeChunk) -> None:
        """Write a chunk in this thread."""
        try:
            source, digest = make()
            self.endpoint.write(chunk.rail, source, chunk.remote, chunk.notification, digest)
        except Exception as error:  # noqa: BLE001 - reported and translated by the link
            if not self._closed:
                self._owner.failed(error)

    def _send(self, work: queue.SimpleQueue[tuple[events.WriteChunk, MakeChunk] | None]) -> None:
        while (item := work.get()) is not None and not self._closed:
            self.write(*item)

    def close(self) -> None:
        """Close the endpoint and end the threads. Not under a lock that they need."""
        self._closed = True
        for work in list(self._queues.values()):
            work.put(None)
        self.endpoint.close()
        with self._admission:
            admitted, self._admitted = self._admitted, 0
        self._places.free(self._site, admitted)
        join_threads(list(self._threads), 5.0)
        self._queues.clear()  # what was not begun counts as no read, but keeps its message
        self._owner.closed(self)

    # -- what the endpoint says ----------------------------------------------------------------------------

    def landed(self, notification: int, length: int, digest: int) -> None:
        """See `CompletionHandler.landed`."""
        if not self._closed:
            self._owner.landed(self, notification, length, digest)

    def written(self, notification: int) -> None:
        """See `CompletionHandler.written`."""
        if not self._closed:
            self._owner.written(self, notification)

    def rail_down(self, rail: int, error: Exception) -> None:
        """See `CompletionHandler.rail_down`."""
        if not self._closed:
            self._owner.rail_down(self, rail, error)

    def admits(self, first: bool) -> bool:
        """See `CompletionHandler.admits`."""
        with self._admission:
            if self._closed or not self._places.take(self._site, first):
                return False
            self._admitted += 1
        return True

    def rail_up(self, rail: int) -> None:
        """See `CompletionHandler.rail_up`."""
        if not self._closed:
            self._owner.rail_up(self, rail)

    def failed(self, error: Exception) -> None:
        """See `CompletionHandler.failed`."""
        if not self._closed:
            self._owner.failed(error)


class FabricChooser:
    """Says which fabric the passive side offers next. One that keeps failing is passed over; at last there is the
    control stream, which needs no rails, unless `rdma_fabrics` leaves tcp out."""

    def __init__(self, order: Sequence[str], own: Mapping[str, str], host: str, clock: Callable[[], float]) -> None:
        self._order = order
        self._own = dict(own)
        self._host = host
        self._clock = clock
        self._failures: dict[str, int] = {}
        self._current = ""
        self._since = 0.0

    def require_tcp(self) -> None:
        """Check, on the active side, that the peer may do without rails. Raises FabricUnavailable if it may not."""
        if "tcp" not in self._order:
            raise FabricUnavailable(
                f"the peer found no fabric that works (its log says why), and rdma_fabrics={','.join(self._order)} "
                "does not allow the control stream here: add tcp"
            )

    def explain(self, name: str, peer: wire.Hello, same_host: Collection[str], failure: str) -> str:
        """Why there is nothing better than `name`, which the peer has chosen; `failure` says what happened here to what
        it had chosen before."""
        best, passed_over = choose(self._order, self._own, peer.fabrics, self._host == peer.host != "", same_host)
        if best == name:
            return passed_over
        return failure or f"the peer has chosen so, and its log says why; here it would be {best or 'none'}"

    def rule_out(self, name: str, reason: str) -> None:
        """Don't choose a fabric again on this connection."""
        self._own[name] = reason

    def offer(
        self, fabrics: Mapping[str, Fabric], rails: RailSet, peer: wire.Hello, failure: str, opened: bool
    ) -> tuple[str, str, Mapping[str, Any]]:
        """Call `next` until a fabric can be offered. Its endpoint is put into `rails`, and its offer is the last
        result."""
        while True:
            name, passed_over = self.next(peer, failure, opened, {n for n, f in fabrics.items() if f.same_host})
            if not name:
                return name, passed_over, {}
            try:
                rails.endpoint, offer = fabrics[name].offer(rails)
                return name, passed_over, offer
            except FabricError as error:
                failure, opened = str(error), False

    def next(self, peer: wire.Hello, failure: str, opened: bool, same_host: Collection[str] = ()) -> tuple[str, str]:
        """Return the name of the fabric ("" for the control stream), and why better ones were passed over.

        `failure` says what happened to the fabric that was chosen before, which is of no use again if it could not even
        be `opened`. `same_host` names the fabrics that need both sides on one host.

        Raises:
            FabricUnavailable: there is none that both sides allow.
        """
        now = self._clock()
        if failure and self._current:
            lasted = now - self._since > _LASTED
            self._failures[self._current] = 1 if lasted else self._failures.get(self._current, 0) + 1
            if not opened or self._failures[self._current] >= _MAX_FAILURES:
                self.rule_out(self._current, failure)
        name, passed_over = choose(self._order, self._own, peer.fabrics, self._host == peer.host != "", same_host)
        if not name and not (failure and "tcp" in self._order):
            raise FabricUnavailable(
                f"no fabric that both sides allow (rdma_fabrics={','.join(self._order)}): {passed_over}"
            )
        self._current, self._since = name, now
        return name, passed_over
