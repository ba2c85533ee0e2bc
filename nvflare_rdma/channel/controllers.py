"""How much the receiver grants: the size of the next chunk, and how many bytes may be on their way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Controller(ABC):
    name: ClassVar[str]

    @property
    @abstractmethod
    def chunk_bytes(self) -> int: ...

    @property
    @abstractmethod
    def window_bytes(self) -> int: ...

    def granted(self, length: int, now: float) -> None: ...

    def landed(self, length: int, granted_at: float, now: float) -> None: ...

    def lost(self, length: int, now: float) -> None: ...

    def idle(self, now: float) -> None: ...


class Fixed(Controller):
    name = "fixed"

    def __init__(self, chunk_bytes: int, depth: int, max_window_bytes: int) -> None:
        self._window = min(chunk_bytes * depth, max_window_bytes)
        self._chunk = min(chunk_bytes, self._window)

    @property
    def chunk_bytes(self) -> int:
        return self._chunk

    @property
    def window_bytes(self) -> int:
        return self._window


CONTROLLERS: dict[str, type[Fixed]] = {"fixed": Fixed}


def make_controller(name: str, chunk_bytes: int, depth: int, max_window_bytes: int) -> Controller:
    return CONTROLLERS[name](chunk_bytes, depth, max_window_bytes)
