"""The receiving half of a direct transfer: a message's tensors, landed in their own memory.

    describe   what there is, and how to get there          (FLARE's messages, `serving`)
    send       "that and that, under these labels"
               ... each tensor lands over the data channel (`channels`) ...
    report     every few seconds: is it still coming? This also tells FLARE that the transfer lives.
    done       it may be forgotten

A channel that breaks is opened again, and what is missing is asked for again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.channel.bodies import Sink
from nvflare_rdma.errors import FabricUnavailable, ProtocolError, RdmaError, TransferError
from nvflare_rdma.streaming import manifest
from nvflare_rdma.streaming.arrays import Allocate, from_bytes, from_content
from nvflare_rdma.streaming.channels import DataChannels
from nvflare_rdma.streaming.manifest import Item

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
_LOOK_SECONDS = 0.2
ATTEMPTS = 3


class AbortedError(TransferError):
    """The receiver does not want it any more."""


@dataclass(frozen=True)
class Progress:
    nbytes: int
    items: int


class Landings:
    """What is still to come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.landed: dict[int, memoryview] = {}
        self.open: set[int] = set()
        self.failure = ""


class TensorSink(Sink):
    """Where one tensor lands: ``number`` in the manifest, in memory that nobody else has."""

    def __init__(self, number: int, memory: memoryview, landings: Landings) -> None:
        self.nbytes = len(memory)
        self._number = number
        self._memory = memory
        self._landings = landings

    @property
    def buffer(self) -> memoryview | None:
        return self._memory

    def done(self) -> None:
        with self._landings.changed:
            self._landings.open.discard(self._number)
            self._landings.landed[self._number] = self._memory
            self._landings.changed.notify_all()

    def failed(self, reason: str) -> None:
        with self._landings.changed:
            self._landings.open.discard(self._number)
            self._landings.failure = reason
            self._landings.changed.notify_all()


def pull(
    channels: DataChannels,
    peer: str,
    ask: Callable[[dict[str, Any]], Any],
    allocate: Allocate,
    aborted: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda done: None,
) -> dict[str, Any]:
    """All tensors of a message that ``peer`` holds, by FLARE's item ids.

    Args:
        ask: sends a request to the peer's `Service.answer` and gives what it says.
        allocate: memory for a tensor of so many bytes.
        aborted: whether to stop; it is looked at several times a second.

    Raises:
        AbortedError: ``aborted`` said so.
        RdmaError: there is no direct way, or what came over it is no good. Nothing is kept.
    """
    described = _ask(ask, {"do": "describe"})
    items = manifest.unpack(described.get("manifest"))
    large = {number: item for number, item in enumerate(items) if item.content is None}
    landed: dict[int, memoryview] = {}
    reason = ""
    for _ in range(ATTEMPTS if large else 0):
        missing = {number: item for number, item in large.items() if number not in landed}
        attempt = _Attempt(channels, peer, ask, allocate, aborted)
        came, reason = attempt.run(missing, described, landed, items, progress)
        landed |= came
        if len(landed) == len(large):
            break
        log.warning("%s: %d of %d tensors are missing (%s)", peer, len(large) - len(landed), len(large), reason)
        described = _ask(ask, {"do": "describe"})
    if len(landed) != len(large):
        raise TransferError(f"{len(large) - len(landed)} of {len(large)} tensors did not come from {peer}: {reason}")
    _ask(ask, {"do": "done"})
    return {
        item.name: from_content(item) if item.content is not None else from_bytes(item, landed[number])
        for number, item in enumerate(items)
    }


class _Attempt:
    def __init__(
        self,
        channels: DataChannels,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        allocate: Allocate,
        aborted: Callable[[], bool],
    ) -> None:
        self._channels = channels
        self._peer = peer
        self._ask = ask
        self._allocate = allocate
        self._aborted = aborted

    def run(
        self,
        missing: Mapping[int, Item],
        described: Mapping[str, Any],
        before: Mapping[int, memoryview],
        items: list[Item],
        progress: Callable[[Progress], None],
    ) -> tuple[dict[int, memoryview], str]:
        """Land what is missing: what of it came, and why the rest did not."""
        invitation = self._find_way(described)
        landings = Landings()
        sinks = [TensorSink(number, self._allocate(item.nbytes), landings) for number, item in missing.items()]
        landings.open = set(missing)
        first = self._channels.expect(self._peer, sinks)
        try:
            request = {"do": "send", "first": first, "items": list(missing), "invitation": invitation}
            _ask(self._ask, request)
            self._wait(landings, before, items, progress)  # the peer has dialled by now, if it was to
        finally:
            self._channels.forget(self._peer, first, len(sinks))
        with landings.changed:
            return dict(landings.landed), landings.failure

    def _find_way(self, described: Mapping[str, Any]) -> dict[str, Any] | None:
        """See that there is a channel; an invitation if the peer has to make it."""
        if self._channels.find(self._peer) is not None:
            return None
        theirs = described.get("invitation")
        if theirs is not None:
            self._channels.dial(self._peer, theirs)
            return None
        try:
            return self._channels.invite(self._peer)
        except FabricUnavailable as error:
            raise FabricUnavailable(f"neither side has a door: {error}; {described.get('closed')}") from error

    def _wait(
        self,
        landings: Landings,
        before: Mapping[int, memoryview],
        items: list[Item],
        progress: Callable[[Progress], None],
    ) -> None:
        report_at, known = time.monotonic() + REPORT_SECONDS, -1
        while True:
            with landings.changed:
                landings.changed.wait_for(lambda: not landings.open or landings.failure, _LOOK_SECONDS)
                over = not landings.open or bool(landings.failure)
                done = [*before, *landings.landed]
            if len(done) != known:
                known = len(done)
                progress(Progress(sum(items[number].nbytes for number in done), known))
            if over:
                return
            if self._aborted():
                raise AbortedError(f"the transfer from {self._peer} was aborted")
            if self._channels.find(self._peer) is None:
                landings.failure = "the data channel broke"
            if time.monotonic() >= report_at:
                failed = _ask(self._ask, {"do": "report"}).get("failed")
                if failed:
                    landings.failure = str(failed)
                report_at = time.monotonic() + REPORT_SECONDS


def _ask(ask: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> Mapping[str, Any]:
    answer = ask(request)
    if not isinstance(answer, Mapping):
        raise ProtocolError(f"the peer answered {request['do']!r} with {type(answer).__name__}")
    if answer.get("refused"):
        raise TransferError(f"the peer refused: {answer['refused']}")
    return answer


__all__ = ["AbortedError", "Progress", "RdmaError", "pull"]
