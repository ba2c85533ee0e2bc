"""The receiving half of a transfer: asks a peer's `Service` for a message's items, and receives them over a link.

    describe   tells what there is, and how to get there; where there is a link already, has everything sent as well,
               under labels that the receiver reserves
    send       asks for items, under labels; each of them comes over the link then
    report     asks every few seconds why nothing more will come; this also tells FLARE that the transfer lives
    done       tells that everything is here      (not where FLARE's next message tells that)
    give up    tells that the receiver has failed, and nothing more need be sent

A link that breaks is opened again, and what is missing is asked for again.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.channel import Link, Sink
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, RdmaError, TransferError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer import manifest
from nvflare_rdma.transfer.long_waits import Wait
from nvflare_rdma.transfer.manifest import STARTS, Item
from nvflare_rdma.transfer.patience import AbortedError, LostError, Patience
from nvflare_rdma.transfer.peers import PeerLinks
from nvflare_rdma.transfer.places import Land
from nvflare_rdma.transfer.records import Meter
from nvflare_rdma.transfer.sinks import Arrivals, Destination, TensorDestination

log = get_logger(__name__)

REPORT_SECONDS = 2.0
_LOOK_SECONDS = 0.2
#: How long the peer may take to open a link, and how often it is asked whether it can.
OPEN_SECONDS, _OPEN_LOOK_SECONDS = 30.0, 0.5
#: So many attempts in a row that bring nothing are the end of a transfer.
ATTEMPTS = 3


class RefusedError(TransferError):
    """The peer does not do what it was asked."""


@dataclass(frozen=True)
class Progress:
    """Tells how much is here: whole items, and their bytes as they were sent."""

    nbytes: int
    items: int


def pull(
    links: PeerLinks,
    peer: str,
    ask: Callable[[dict[str, Any]], Any],
    land: Land,
    aborted: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda done: None,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Receive all tensors of a message that `peer` holds, and give what their places give, by FLARE's item ids.

    Args:
        ask: brings a request to the peer's `Service.answer`, and gives its answer.
        land: makes the place of a tensor.
        aborted: tells whether to stop; it is called several times a second.
        meter: counts what came over links, and how.

    Raises:
        AbortedError: `aborted` said so.
        RdmaError: there is no direct way, or what came over it is no good. Nothing is kept.
    """
    meter = meter or Meter("received", links.name, peer, ledger=links.ledger)
    tensors: dict[str, Any] = Pull(links, peer, ask, TensorDestination(land), aborted, progress, meter).run()
    return tensors


class Pull:
    """Receives what one peer's `Service` holds into a destination; one for each message. `items` are those that the
    peer has told of."""

    def __init__(
        self,
        links: PeerLinks,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        destination: Destination,
        aborted: Callable[[], bool],
        progress: Callable[[Progress], None],
        meter: Meter,
    ) -> None:
        self._links = links
        self._peer = peer
        self._ask_peer = ask
        self._destination = destination
        self._aborted = aborted
        self._progress = progress
        self._meter = meter
        self.items: list[Item] = []
        self._whole: set[int] = set()
        #: Of these, what an earlier transfer had brought.
        self._begun: Set[int] = frozenset()
        self._whole_bytes = 0
        self._began = time.monotonic()
        self._asked = False
        self._seen = False
        #: The first of the labels that are reserved for what the peer sends with its description.
        self._reserved: int | None = None
        self._patience = Patience(links, peer, aborted, self._tell_progress)
        #: What the items came over last.
        self._link: Link | None = None
        #: Item -> how much of its message had landed before, and is not sent again.
        self._starts: dict[int, int] = {}

    @property
    def tensors(self) -> list[Item]:
        """The items, and of bundles what is in them."""
        return [tensor for item in self.items for tensor in item.tensors]

    def run(self, confirmed: bool = False) -> Any:
        """Receive everything, and give what the destination gives.

        Args:
            confirmed: the peer is asked next whether it `has_served`, and need not be told what it sees by itself.

        Raises:
            AbortedError: the receiver does not want it any more. RdmaError: there is no direct way, or the transfer
                failed.
        """
        try:
            # This comes first: once the peer has heard "done", nobody else has the message.
            result = self._receive()
            # A sender that "sees" knows by itself what has arrived, while the link lives.
            if not (confirmed and self._seen and (self._is_all_described or self._links.find(self._peer))):
                self._say_done()
            return result
        except Exception as error:
            if self._asked or self._destination.durable:
                with contextlib.suppress(Exception):  # the error is told as it is
                    self._ask_peer({"do": "give up"})
            # An OSError is about where the items are stored, and not about how they come.
            if not (self._destination.durable or isinstance(error, RdmaError)) and isinstance(error, OSError):
                raise TransferError(f"tensors from {self._peer} can't be stored: {error}") from error
            raise

    def _receive(self) -> Any:
        try:
            described, _ = self._patience.ask(self._describe, self._probe)
            self._meter.wire_bytes += sum(len(item.content or b"") for item in self.items)
            self._begun = self._destination.begin()
            self._whole |= self._begun
            self._land(described)
            return self._destination.finish()
        finally:
            self._release()
            self._destination.close()

    @property
    def _is_all_described(self) -> bool:
        return all(item.content is not None for item in self.items)

    def _say_done(self) -> None:
        self._asked = True
        try:
            ask_for(self._ask_peer, {"do": "done"})
        except RdmaError as error:
            if not self._destination.durable:
                raise
            log.info("%s could not be told that everything is here, which changes nothing: %s", self._peer, error)

    def _land(self, described: Mapping[str, Any]) -> None:
        large = {number for number, item in enumerate(self.items) if item.content is None}
        missing, fruitless = large - self._whole, 0
        while missing:
            before = self._whole_bytes
            reason = self._try(missing, described)
            self._destination.check(attempt_is_over=True)
            left = missing - self._whole
            if not left:
                return
            what = f"{len(left)} of {len(large)} items did not come from {self._peer}"
            self._keep(left)
            fruitless = fruitless + 1 if self._whole_bytes == before else 0
            if fruitless == ATTEMPTS:
                raise TransferError(f"{what}: {reason}")
            if fruitless and self._links.find(self._peer) is None:
                self._patience.pause()  # its end of the link may not have ended yet
            log.warning("%s, and are asked for again: %s", what, reason)
            missing, (described, waited) = left, self._describe_again(f"{what}: {reason}", left)
            fruitless = 0 if waited else fruitless

    def _try(self, missing: Set[int], described: Mapping[str, Any]) -> str:
        """Receive what is missing, and give the reason if not all of it came. That there is no way any more, where
        there was one, is such a reason."""
        try:
            return self._attempt(missing, described)
        except LostError as error:
            return str(error)
        except FabricError as error:
            if not (self._links.patience and self._links.was_linked(self._peer)):
                raise
            return str(error)

    def _keep(self, left: Set[int]) -> None:
        """Find out what has landed of items that are not whole, and need not be sent again: if nothing can be written
        there any more."""
        self._links.find_alive(self._peer)  # one that has only fallen silent ends now
        over = self._link is not None and self._links.await_end(self._peer, self._link)
        for number in left:
            held, start = self._destination.held(number) if over else 0, self._starts.pop(number, 0)
            if held:
                self._starts[number] = held
                self._whole_bytes += held - start
                self._meter.wire_bytes += held - start

    def _attempt(self, missing: Set[int], described: Mapping[str, Any]) -> str:
        """Receive what is missing, and give the reason if not all of it came."""
        if described.get("sending") != len(missing):
            self._release()  # it sends nothing, or something else
        invitation = self._find_way(described) if self._reserved is None else None
        arrivals, link = Arrivals(set(missing)), self._links.find(self._peer)
        wanted = sorted(missing)
        starts = self._agreed(wanted, described)
        sinks = [self._destination.sink(number, arrivals, self._starts.get(number, 0)) for number in wanted]
        reserved, self._reserved = self._reserved, None
        first = self._links.expected.expect(self._peer, sinks, reserved)
        try:
            self._asked = True
            if reserved is None:
                request = {"do": "send", "first": first, "items": wanted, "invitation": invitation, **starts}
                self._seen = ask_for(self._ask_peer, request).get("sees") is True
            if invitation is None or self._peer_has_dialled(arrivals):
                link = self._links.find(self._peer) or link
                self._wait(arrivals, sinks, link)
        finally:
            self._link = self._links.find(self._peer) or link
            self._count(sinks, arrivals, link)
            self._links.expected.forget(self._peer, first, len(sinks))
        with arrivals.changed:
            self._whole |= arrivals.whole
            self._whole_bytes += arrivals.nbytes
            reason = arrivals.failure or arrivals.lost
        return reason

    def _agreed(self, wanted: Sequence[int], described: Mapping[str, Any]) -> dict[str, Any]:
        """Agree with the peer where each item begins that it sends: it has said so if it sends already, else it does as
        it is asked, if it can. Returns what to ask it."""
        if self._reserved is not None:
            theirs = described.get(STARTS)
            theirs = theirs if isinstance(theirs, list | tuple) and len(theirs) == len(wanted) else [0] * len(wanted)
            # It may begin an item anew that it sends otherwise than before.
            self._starts = {n: at for n, at in zip(wanted, theirs, strict=True) if at and self._starts.get(n) == at}
        elif described.get("resumes") is not True:
            self._starts = {}
        self._starts = {n: at for n, at in self._starts.items() if self._destination.held(n) >= at}
        return {STARTS: [self._starts.get(n, 0) for n in wanted]} if self._starts else {}

    def _peer_has_dialled(self, arrivals: Arrivals) -> bool:
        """Wait until the link is here that the peer is to open. If it does not come, `arrivals` has failed.

        Raises:
            AbortedError: the receiver does not want it any more. FabricUnavailable: the peer can't reach this side.
        """
        deadline = time.monotonic() + OPEN_SECONDS
        while self._links.await_open(self._peer, _OPEN_LOOK_SECONDS) is None:
            if self._aborted():
                raise AbortedError(f"the transfer from {self._peer} was aborted")
            if time.monotonic() > deadline:
                arrivals.fail(f"the peer has opened no link in {OPEN_SECONDS:g} s")
            else:
                self._report(arrivals)
            with arrivals.changed:
                if arrivals.failure:
                    return False
        return True

    def _count(self, sinks: list[Sink], arrivals: Arrivals, link: Link | None) -> None:
        if (found := self._links.find(self._peer) or link) is not None:
            self._meter.fabric, self._meter.way = found.fabric, found.way
        self._meter.resent_chunks += sum(sink.resent_chunks for sink in sinks)
        with arrivals.changed:
            self._meter.wire_bytes += arrivals.nbytes

    def _find_way(self, described: Mapping[str, Any]) -> dict[str, Any] | None:
        """Open a link if there is none. Returns an invitation if the peer has to open it."""
        if described.get("channel") is True and self._links.find(self._peer) is not None:
            return None
        theirs = described.get("invitation")
        if theirs is not None:
            return self._links.dial_or_invite(self._peer, theirs)
        try:
            return self._links.invite(self._peer)
        except FabricUnavailable as error:
            raise FabricUnavailable(f"neither side has a door: {error}; {described.get('closed')}") from error

    def _wait(self, arrivals: Arrivals, sinks: Sequence[Sink], link: Link | None) -> None:
        """Wait until everything is here, or something is wrong. `link` is what the items are to come over."""
        now, nbytes = time.monotonic(), self._whole_bytes
        with self._links.long_waits.wait(self._peer, self._began, now, nbytes) as wait:
            self._wait_for(arrivals, sinks, link, wait)

    def _wait_for(self, arrivals: Arrivals, sinks: Sequence[Sink], link: Link | None, wait: Wait) -> None:
        coming = (item for number, item in enumerate(self.items) if number not in self._begun)
        total = sum(item.sent_nbytes for item in coming if item.content is None)
        now = time.monotonic()
        report_at, moved_at, known, moved, asked_why = now + REPORT_SECONDS, now, -1, (0, 0), False
        while True:
            with arrivals.changed:
                arrivals.changed.wait_for(lambda: not arrivals.open or arrivals.failure, _LOOK_SECONDS)
                over = not arrivals.open or bool(arrivals.failure)
                count, nbytes, lost = len(arrivals.whole), arrivals.nbytes, arrivals.lost
                whole = set(arrivals.whole) if count != known else ()
            if count != known:
                known = count
                self._tell_progress(nbytes, whole)
                self._destination.check(attempt_is_over=False)
            if over:
                return
            if self._aborted():
                raise AbortedError(f"the transfer from {self._peer} was aborted")
            now = time.monotonic()
            if (moving := (nbytes, self._links.arriving(self._peer))) != moved:
                moved, moved_at = moving, now
            # What else the peer sends says that data moves, but not how far this is.
            landed = sum(min(sink.landed_bytes, sink.nbytes) for sink in sinks)
            self._links.long_waits.look(wait, self._whole_bytes + landed, total, now)
            if self._links.find(self._peer) is None:
                arrivals.fail(
                    f"the link broke: {link.failure}" if link is not None and link.failure else "the link broke"
                )
            elif now - moved_at > (stall := self._links.stall_timeout):  # and nobody says why
                arrivals.fail(f"nothing has come for {stall:g} s")
            elif now >= report_at or (lost and not asked_why):
                asked_why = bool(lost)  # the sender may have stopped, or this may be the only one
                self._report(arrivals)
                report_at = time.monotonic() + REPORT_SECONDS

    def _tell_progress(self, nbytes: int = 0, whole: Iterable[int] = ()) -> None:
        count = sum(len(self.items[number].tensors) for number in {*self._whole, *whole})
        self._progress(Progress(self._whole_bytes + nbytes, count))

    def _probe(self) -> None:
        with contextlib.suppress(RefusedError):  # that is an answer, too
            ask_for(self._ask_peer, {"do": "report"})

    def _report(self, arrivals: Arrivals) -> None:
        try:
            answer = ask_for(self._ask_peer, {"do": "report"})
        except LostError as error:
            log.info("the transfer goes on, though %s", error)  # whether data comes shows by itself
            return
        if failed := answer.get("failed"):
            if answer.get("unreachable") is True:
                raise FabricUnavailable(f"no direct way from {self._peer} to here: {failed}")
            arrivals.fail(str(failed))

    def _describe_again(self, before: str, missing: Set[int]) -> tuple[Mapping[str, Any], bool]:
        """Ask again what there is, and tell whether the peer had to be waited for. If that fails, too, the error says
        what was `before`."""
        try:
            return self._patience.ask(functools.partial(self._describe, missing), self._probe, before)
        except AbortedError:
            raise
        except TransferError as error:
            if before in str(error):
                raise
            raise TransferError(f"{before}; asked again: {error}") from error

    def _describe(self, missing: Set[int] | None = None) -> Mapping[str, Any]:
        # Whoever says here that there is no link has the peer dial, or invite, anew.
        joined, asked = self._links.find_alive(self._peer) is not None, self._asked
        request = {"do": "describe", "channel": joined, "compact": True}
        if joined if missing is not None else not self._destination.begun:
            self._release()
            request["first"] = self._reserved = self._links.expected.reserve(self._peer)
            request["items"] = None if missing is None else sorted(missing)
            if missing is not None and self._starts:
                request[STARTS] = [self._starts.get(number, 0) for number in sorted(missing)]
            self._asked = True  # if the answer is lost, it sends
        try:
            described = ask_for(self._ask_peer, request)
        except RefusedError:
            self._asked = asked
            raise
        self._asked, self._seen = asked or "sending" in described, described.get("sees") is True
        items, known = manifest.unpack(described.get("manifest"), self._destination.bundles), self.items
        # How the items are sent may have changed since, but not what they are.
        if known and list(map(_identity, items)) != list(map(_identity, known)):
            raise ProtocolError("the peer has other tensors than it said before")
        self.items = items
        self._destination.accept(items, described)
        return described

    def _release(self) -> None:
        if self._reserved is not None:
            self._links.expected.release(self._peer, self._reserved)
            self._reserved = None


def ask_for(ask: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> Mapping[str, Any]:
    """The answer that `ask` brings.

    Raises:
        ProtocolError: it is malformed. TransferError: the peer refuses.
    """
    answer = ask(request)
    if not isinstance(answer, Mapping):
        raise ProtocolError(f"the peer answered {request['do']!r} with {type(answer).__name__}")
    if answer.get("refused"):
        raise RefusedError(f"the peer refused: {answer['refused']}")
    return answer


def _identity(item: Item) -> tuple[Any, ...]:
    if item.members:  # how large it is follows from how they are sent
        return item.name, tuple(map(_identity, item.members))
    return item.name, item.torch, item.dtype, item.shape, item.content is None


__all__ = ["AbortedError", "LostError", "Progress", "Pull", "pull"]
