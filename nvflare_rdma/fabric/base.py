"""The fabric interface: one-sided writes into memory that the peer has exposed.

A fabric moves bytes and nothing else. It knows no messages, no transfers and no budget: the link above it
decides what to expose and what to write. The shape follows verbs (IB spec vol. 1, ch. 10-11): memory is
*registered* once, a *slice* of it is exposed for one write over one *rail* (a connection, a queue pair), and the
write carries a 32-bit notification value (RDMA WRITE WITH IMM) by which the owner of the memory learns that the
bytes have landed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from nvflare_rdma.errors import ProtocolError

#: The most rails to one peer, over any fabric: each costs this side a thread.
MAX_RAILS = 64


@dataclass(frozen=True, slots=True)
class RemoteSlice:
    """Memory of a peer that may be written once: `key` names the region, `address` the first byte in it.

    All three come over the wire; the fabric that owns the memory checks them before every use."""

    key: int
    address: int
    length: int


class CompletionHandler(Protocol):
    """Is told what happened, by the fabric's own threads: its methods are short and raise nothing."""

    def landed(self, notification: int, length: int, digest: int) -> None:
        """The peer answered the exposure `notification` with `length` bytes (0 if it withdrew the write), and
        with the `digest` that it gave to `Endpoint.write`. The slice is closed again."""

    def written(self, notification: int) -> None:
        """A local write has ended: its source may be changed or freed. If it landed, it is in the receiver's memory."""

    def rail_down(self, rail: int, error: Exception) -> None:
        """A rail broke. What landed over it was reported before this, nothing will be after; the writes queued
        on it are reported as `written`. Once per rail, not after `Endpoint.close`. FabricUnavailable: others would
        break too."""

    def admits(self, first: bool) -> bool:
        """Passive side: whether one more rail may be opened, which is one of the `first` or not. It has a place then,
        until its endpoint is closed. Not within a lock of the endpoint's."""
        return True

    def rail_up(self, rail: int) -> None:
        """Active side: a rail that `Endpoint.grow` asked for is open, on both sides."""

    def failed(self, error: Exception) -> None:
        """The peer broke the rules (it wrote where nothing was exposed): nothing of it can be trusted."""


class Region(ABC):
    """A registered buffer, which it refers to until it is closed."""

    @abstractmethod
    def expose(self, notification: int, offset: int, length: int, rail: int) -> RemoteSlice:
        """Let the peer write `[offset, offset + length)` once, over `rail`; `landed` reports `notification`."""

    @abstractmethod
    def revoke(self, notification: int) -> None:
        """Take back what `expose` gave. A write that arrives later is still reported as landed; the slice may be
        written until then, and is of no use to anybody."""

    @abstractmethod
    def close(self) -> None:
        """Deregister. Everything still exposed is revoked first."""


class Endpoint(ABC):
    """One peer over one fabric, with the rails that were opened to it, numbered from 0."""

    @property
    @abstractmethod
    def rails(self) -> int:
        """How many rails were opened."""

    @property
    def most_rails(self) -> int:
        """Passive side: how many rails the peer may open."""
        return MAX_RAILS

    @property
    def answer(self) -> Mapping[str, Any]:
        """Active side: what the peer's endpoint needs before it can use the rails (msgpack types)."""
        return {}

    def accept(self, answer: Mapping[str, Any]) -> None:
        """Passive side: take the peer's `answer`, if it gave one. It does so before anything moves.

        Raises:
            FabricError: no rail can be used. ProtocolError: `answer` is malformed.
        """
        raise ProtocolError("the peer answered an offer that asks for nothing")

    @property
    def write_is_nonblocking(self) -> bool:
        """Whether `write` only tells somebody else to move the bytes, so that a thread of its own is not worth it.
        Then it never blocks, and any thread may call it."""
        return False

    def allocate(self, nbytes: int) -> memoryview | None:
        """Memory that the peer can write without a copy on this side; None if any memory is as good.

        It is re-used when no view of it is left."""
        return None

    @abstractmethod
    def register(self, buffer: memoryview) -> Region:
        """Make a writable, contiguous buffer of bytes exposable."""

    @abstractmethod
    def write(self, rail: int, source: memoryview, remote: RemoteSlice, notification: int, digest: int) -> None:
        """Write `source` (at most `remote.length` bytes) one-sidedly; `digest` (64 bits) travels with it.

        May block while the rail is full: one thread per rail calls it. `written` reports the end, also if the rail
        is down or breaks meanwhile. `source` may be empty: that answers the exposure and writes nothing.

        Raises:
            ValueError: `source` is larger than the slice.
        """

    def wanted(self) -> int:
        """How many rails would do, as far as this side can tell from the path and from what was lost on it since this
        was called last. Called once a second at most."""
        return self.rails

    def grow(self, count: int) -> None:
        """Active side: open rails beside those that are open, until there are `count`, or as many as there may be. Does
        not wait for them: `CompletionHandler.rail_up` reports each."""
        return

    def has_joined(self, rail: int) -> bool:
        """Whether a rail is open beside the first ones."""
        return False

    def check(self) -> None:
        """Look for rails that have died without a word, and drop them. Called once a second, by one thread."""
        return

    @abstractmethod
    def drop(self, rail: int) -> None:
        """Close one rail (the peer says that it is broken); `rail_down` follows. Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Close all rails and wait for the fabric's threads. Idempotent, callable from any thread."""


class Fabric(ABC):
    """A way to reach a peer. The passive side offers, the active side connects.

    A fabric that is `same_host` works on one host only, whose memory the bytes never leave, so they are not sealed.
    With one that is `checked`, nothing below protects the bytes well (TCP's 16-bit sum), so chunks carry a checksum
    unless `rdma_integrity` says otherwise.
    """

    name: ClassVar[str]
    same_host: ClassVar[bool] = False
    checked: ClassVar[bool] = False

    @abstractmethod
    def offer(self, handler: CompletionHandler) -> tuple[Endpoint, Mapping[str, Any]]:
        """Passive side: an endpoint that waits for rails, and what the peer needs to open them (msgpack types)."""

    @abstractmethod
    def connect(self, offer: Mapping[str, Any], handler: CompletionHandler) -> Endpoint:
        """Active side: open the rails that `offer` describes.

        Raises:
            FabricError: no rail could be opened (firewall, wrong ticket); the message says which address and why.
            ProtocolError: `offer` is malformed.
        """
