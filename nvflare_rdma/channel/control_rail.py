"""Chunks on the control stream: the endpoint of last resort, when no rail can be opened.

The same grants are filled; only the bytes travel inside `Data` messages, at the price of two copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric.base import Endpoint, Region, RemoteSlice


class ControlRegion(Region):
    def __init__(self, key: int, buffer: memoryview, exposed: dict[int, memoryview]) -> None:
        self._key = key
        self._buffer = buffer
        self._exposed = exposed
        self._mine: set[int] = set()

    def expose(self, notification: int, offset: int, length: int) -> RemoteSlice:
        self._exposed[notification] = self._buffer[offset : offset + length]
        self._mine.add(notification)
        return RemoteSlice(self._key, offset, length)

    def revoke(self, notification: int) -> None:
        self._exposed.pop(notification, None)
        self._mine.discard(notification)

    def close(self) -> None:
        for notification in self._mine:
            self._exposed.pop(notification, None)
        self._mine.clear()


class ControlRail(Endpoint):
    """``send(notification, payload)`` puts a chunk on the control stream and reports it written."""

    def __init__(self, send: Callable[[int, memoryview], None]) -> None:
        self._send = send
        self._keys = itertools.count(1)
        self._exposed: dict[int, memoryview] = {}

    @property
    def rails(self) -> int:
        return 0

    def register(self, buffer: memoryview) -> ControlRegion:
        return ControlRegion(next(self._keys), buffer, self._exposed)

    def write(self, source: memoryview, remote: RemoteSlice, notification: int) -> None:
        self._send(notification, source)

    def fill(self, notification: int, payload: bytes) -> None:
        """Put an arrived chunk in its place.

        Raises:
            ProtocolError: nothing is exposed there, or less than was sent.
        """
        target = self._exposed.pop(notification, None)
        if target is None or len(payload) > len(target):
            raise ProtocolError(f"the peer sent {len(payload)} bytes for slice {notification}, which can't take them")
        target[: len(payload)] = payload

    def close(self) -> None:
        self._exposed.clear()
