"""How long a receiver waits for a peer that does not answer, and when it asks again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from nvflare_rdma.errors import TransferError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.peers import PeerLinks

log = get_logger(__name__)

#: Pauses between two questions: the first, and the longest. Each is twice as long as the one before.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0
#: And before a peer that answers is asked to open a link again.
_LINK_PAUSE = 2.0
_LOOK_SECONDS = 0.2
#: Where a peer is missed, its parent is asked so often whether it has ended.
_ENDED_EVERY = 30.0

T = TypeVar("T")


class AbortedError(TransferError):
    """The receiver does not want the message any more."""


class LostError(TransferError):
    """An answer to a request did not come in time, or the peer can't be reached."""


class EndedError(TransferError):
    """The peer's process has ended, so what it had will not come, whatever the way."""


class Patience:
    """A receiver's, with one peer. `links` has how long it is; `aborted` tells whether to stop, and `waits` is called
    now and then while the peer is waited for."""

    def __init__(
        self, links: PeerLinks, peer: str, aborted: Callable[[], bool], waits: Callable[[], None] = lambda: None
    ) -> None:
        self._links = links
        self._peer = peer
        self._aborted = aborted
        self._waits = waits

    def ask(self, question: Callable[[], T], probe: Callable[[], object], before: str = "") -> tuple[T, bool]:
        """The answer to `question`, and whether the peer had to be waited for. It is asked again when the peer has
        answered a `probe`, which takes little time. `before` is what had happened, for the log.

        Raises:
            AbortedError: `aborted` says so. EndedError: the peer has ended. TransferError: this side ends, or it took
                too long.
        """
        waited = False
        while True:
            try:
                return question(), waited
            except LostError as error:
                if not self._links.patience:
                    raise
                self._await_peer(probe, f"{before}; {error}" if before else str(error))
                waited = True

    def pause(self) -> None:
        """Wait a little before a peer that answers is asked to open a link again."""
        if self._links.patience:
            self._sleep(_LINK_PAUSE)

    def _await_peer(self, probe: Callable[[], object], reason: str) -> None:
        began = now = time.monotonic()
        patience, pause, ended_at = self._links.patience, _FIRST_PAUSE, began + _ENDED_EVERY
        log.warning("%s; %s is waited for, for %g s at most", reason, self._peer, patience)
        while True:
            self._sleep(min(pause, max(began + patience - now, 0.0)))
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._waits()
            try:
                probe()
            except LostError:
                now = time.monotonic()
            else:
                log.info("%s answers again, after %.0f s; the transfer goes on", self._peer, time.monotonic() - began)
                return
            if now - began >= patience:
                raise TransferError(f"{reason}; it has been waited for, for {patience:g} s")
            if now >= ended_at:
                if self._links.has_ended(self._peer):
                    raise EndedError(f"{reason}; its process has ended, as its parent shows")
                ended_at = time.monotonic() + _ENDED_EVERY

    def _sleep(self, seconds: float) -> None:
        deadline, known = time.monotonic() + seconds, self._links.find(self._peer)
        while True:
            if self._aborted():
                raise AbortedError(f"the transfer from {self._peer} was aborted")
            if self._links.closed:
                raise TransferError("this side is ending")
            # Whoever dials this side is back. A link that was there before says nothing: answers are missing.
            left = max(min(deadline - time.monotonic(), _LOOK_SECONDS), 0.0)
            if self._links.await_other(self._peer, known, left) is not None:
                return
            if time.monotonic() >= deadline:
                return


__all__ = ["AbortedError", "EndedError", "LostError", "Patience"]
