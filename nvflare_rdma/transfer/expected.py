"""The messages that peers are to send over links, and the sinks that are for them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence

from nvflare_rdma.channel import Later, Sink
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.transfer.manifest import MAX_ITEMS

#: How many messages a sender offers ahead of what has arrived, and so how many before their receiver knows what they
#: are.
MAX_AHEAD = 64


class ExpectedMessages:
    """Knows what one cell expects from its peers, by peer and label. Threads of receivers say what they expect, and
    links ask for the `place` of what is offered.

    Labels are such that nobody else can know them: what is late from an earlier attempt has no place in the next one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sinks: dict[tuple[str, int], Sink] = {}
        #: (Peer, first of the labels that are reserved) -> what was offered: label -> how to have it placed.
        self._reserved: dict[tuple[str, int], dict[int, Callable[[], None]]] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._sinks) + len(self._reserved)

    def reserve(self, peer: str) -> int:
        """Let `peer` offer what it will send before this side knows what that is: under the label that is returned and
        the `MAX_ITEMS` - 1 that follow it. What is offered waits for `expect`, and is refused on `release`."""
        first = _new_label()
        with self._lock:
            self._reserved[peer, first] = {}
        return first

    def release(self, peer: str, first: int) -> None:
        """Give labels back that were reserved and that nothing is expected under. Does nothing if they are not
        reserved any more."""
        with self._lock:
            early = self._reserved.pop((peer, first), {})
        for place in early.values():
            place()

    def expect(self, peer: str, sinks: Sequence[Sink], first: int | None = None) -> int:
        """Let `peer` send what the sinks are for, as messages with the label that is returned and those that follow it:
        with `first`, if that was reserved. `forget` is to be called afterwards."""
        label = _new_label() if first is None else first
        with self._lock:
            self._sinks |= {(peer, label + i): sink for i, sink in enumerate(sinks)}
        self.release(peer, label)
        return label

    def forget(self, peer: str, first: int, count: int) -> None:
        """Expect these messages no more. One that has begun to come goes on, and its sink is told how it ended."""
        with self._lock:
            for label in range(first, first + count):
                self._sinks.pop((peer, label), None)

    def place(self, peer: str, label: int, again: Callable[[], None]) -> Sink | Later | None:
        """The sink of a message that `peer` offers; None if there is none. If it is not known yet, `again` is called
        once it can be asked for again.

        Raises:
            ProtocolError: the peer offers more than it may, or the same twice.
        """
        with self._lock:
            if (sink := self._sinks.pop((peer, label), None)) is not None:
                return sink
            for (whose, first), early in self._reserved.items():
                if whose == peer and first <= label < first + MAX_ITEMS:
                    if label in early:
                        raise ProtocolError(f"a message is offered twice, as {label}")
                    if len(early) == MAX_AHEAD:
                        raise ProtocolError(f"more than {MAX_AHEAD} messages are offered ahead of their description")
                    early[label] = again
                    return Later()
        return None


def _new_label() -> int:
    return secrets.randbits(62) + 1
