"""What a controller is: how large the next granted chunk is, and how many bytes may be granted and not yet landed.

One per connection, at the receiver, which alone sets the pace. Time comes in as an argument (seconds of any
monotonic clock); a controller looks at no clock, starts no thread and is not random.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Controller(ABC):
    """Told of every chunk that is granted, lands or will not; asked for size and window before each grant."""

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, chunk_bytes: int, depth: int, max_window_bytes: int) -> None:
        """Start with `depth` chunks of `chunk_bytes`, and never have more than `max_window_bytes` in flight."""

    @property
    @abstractmethod
    def chunk_bytes(self) -> int:
        """Length of the next chunk to grant; what is left of a message may be less."""

    @property
    @abstractmethod
    def window_bytes(self) -> int:
        """Bytes that may be granted and not landed at once, over all messages of the connection; at least a chunk."""

    def set_rails(self, count: int) -> None:
        """So many rails are up from here on."""
        return

    @abstractmethod
    def granted(self, length: int, now: float, rail: int = 0) -> None:
        """A chunk was granted at `now`, over a rail: what goes over one is expected to land in order."""

    @abstractmethod
    def landed(self, length: int, granted_at: float, now: float, rail: int = 0) -> None:
        """A chunk that was granted at `granted_at` (the same value as told then) has landed."""

    @abstractmethod
    def lost(self, length: int, now: float, rail: int = 0) -> None:
        """A granted chunk will not land: its rail broke, or it arrived damaged."""

    @abstractmethod
    def forgotten(self, length: int, granted_at: float, now: float, rail: int = 0) -> None:
        """A chunk that was granted at `granted_at` is of no use any more, and its grant is over. Nothing was lost, and
        nothing can be told from when it ended."""

    @abstractmethod
    def idle(self, now: float) -> None:
        """The window is not filled because the sender has nothing more to send."""


class FixedController(Controller):
    """Grants the same chunk, and `depth` of them at once, whatever happens."""

    name: ClassVar[str] = "fixed"

    def __init__(self, chunk_bytes: int, depth: int, max_window_bytes: int) -> None:
        self._chunk_bytes = min(chunk_bytes, max_window_bytes)
        self._window_bytes = min(chunk_bytes * depth, max_window_bytes)

    @property
    def chunk_bytes(self) -> int:
        """See `Controller.chunk_bytes`."""
        return self._chunk_bytes

    @property
    def window_bytes(self) -> int:
        """See `Controller.window_bytes`."""
        return self._window_bytes

    def granted(self, length: int, now: float, rail: int = 0) -> None:
        """See `Controller.granted`."""

    def landed(self, length: int, granted_at: float, now: float, rail: int = 0) -> None:
        """See `Controller.landed`."""

    def lost(self, length: int, now: float, rail: int = 0) -> None:
        """See `Controller.lost`."""

    def forgotten(self, length: int, granted_at: float, now: float, rail: int = 0) -> None:
        """See `Controller.forgotten`."""

    def idle(self, now: float) -> None:
        """See `Controller.idle`."""
