"""The fabric interface: one-sided writes into memory that the peer has exposed.

A fabric moves bytes and nothing else. It knows no messages, no transfers and no budget: the channel above it
decides what to expose and what to write. The shape follows verbs (IB spec vol. 1, ch. 10-11): memory is
*registered* once, a *slice* of it is exposed for one write, and the write carries a 32-bit notification
value (RDMA WRITE WITH IMM) by which the owner of the memory learns that the bytes have landed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class RemoteSlice:
    """Memory of a peer that may be written once: ``key`` names the region, ``address`` the first byte in it.

    All three come over the wire; the fabric that owns the memory checks them before every use.
    """

    key: int
    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a fabric can be used by this process. ``reason`` says why not, and what would change that."""

    usable: bool
    reason: str = ""


class CompletionHandler(Protocol):
    """Who is told what happened. Called from the fabric's own threads: be short, raise nothing."""

    def landed(self, notification: int, length: int) -> None:
        """The peer wrote ``length`` bytes into the slice exposed under ``notification``; it is closed again."""

    def written(self, notification: int) -> None:
        """A local write is complete: its source buffer may be changed or freed."""

    def failed(self, error: Exception) -> None:
        """The endpoint can't go on (a rail broke, the peer wrote outside what was exposed)."""


class Region(ABC):
    """A registered buffer. Holds a reference to it until closed."""

    @abstractmethod
    def expose(self, notification: int, offset: int, length: int) -> RemoteSlice:
        """Let the peer write ``[offset, offset + length)`` once; its landing reports ``notification``."""

    @abstractmethod
    def revoke(self, notification: int) -> None:
        """Take back what `expose` gave. A write that arrives later is refused."""

    @abstractmethod
    def close(self) -> None:
        """Deregister. Everything still exposed is revoked first."""


class Endpoint(ABC):
    """One peer over one fabric, with the rails that are open to it."""

    @property
    @abstractmethod
    def rails(self) -> int:
        """How many rails (parallel connections, queue pairs) are open."""

    @abstractmethod
    def register(self, buffer: memoryview) -> Region:
        """Make a writable, contiguous buffer of bytes exposable."""

    @abstractmethod
    def write(self, source: memoryview, remote: RemoteSlice, notification: int) -> None:
        """Queue a one-sided write of ``source`` (at most ``remote.length`` bytes). `written` reports its end.

        Raises:
            FabricError: the endpoint is closed or its rails are broken.
        """

    @abstractmethod
    def close(self) -> None:
        """Close all rails and wait for the fabric's threads. Idempotent, callable from any thread."""


class Fabric(ABC):
    """A way to reach a peer. The passive side offers, the active side connects."""

    name: ClassVar[str]

    @abstractmethod
    def offer(self, handler: CompletionHandler) -> tuple[Endpoint, Mapping[str, Any]]:
        """Passive side: an endpoint that waits for rails, and what the peer needs to open them (msgpack types)."""

    @abstractmethod
    def connect(self, offer: Mapping[str, Any], handler: CompletionHandler) -> Endpoint:
        """Active side: open the rails that ``offer`` describes.

        Raises:
            FabricError: no rail could be opened (firewall, wrong ticket); the message says which address and why.
            ProtocolError: ``offer`` is malformed.
        """
