"""Chunks on the control stream: the endpoint of last resort, when no rail can be opened.

A network may let the control stream through and cut rails, for instance one that passes TLS only. Then the same grants
are filled, and the bytes travel inside `Data` messages, at the price of two copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import Endpoint, Region, RemoteSlice


class ControlRegion(Region):
    """Memory that chunks which come on the control stream are put into."""

    def __init__(self, key: int, buffer: memoryview, exposed: dict[int, memoryview | None]) -> None:
        self._key = key
        self._buffer = buffer
        self._exposed = exposed
        self._mine: set[int] = set()

    def expose(self, notification: int, offset: int, length: int, rail: int) -> RemoteSlice:
        """See `Region.expose`."""
        self._exposed[notification] = self._buffer[offset : offset + length]
        self._mine.add(notification)
        return RemoteSlice(self._key, offset, length)

    def revoke(self, notification: int) -> None:
        """See `Region.revoke`."""
        if notification in self._exposed:
            self._exposed[notification] = None
        self._mine.discard(notification)

    def close(self) -> None:
        """See `Region.close`."""
        for notification in list(self._mine):
            self.revoke(notification)


class ControlRail(Endpoint):
    """The endpoint whose only rail is the control stream. `send(notification, digest, payload)` puts a chunk there and
    reports it written."""

    def __init__(self, send: Callable[[int, int, memoryview], None]) -> None:
        self._send = send
        self._keys = itertools.count(1)
        self._exposed: dict[int, memoryview | None] = {}

    @property
    def rails(self) -> int:
        """See `Endpoint.rails`."""
        return 1

    def register(self, buffer: memoryview) -> ControlRegion:
        """See `Endpoint.register`."""
        return ControlRegion(next(self._keys), buffer, self._exposed)

    def write(self, rail: int, source: memoryview, remote: RemoteSlice, notification: int, digest: int) -> None:
        """See `Endpoint.write`."""
        self._send(notification, digest, source)

    def fill(self, notification: int, payload: bytes) -> None:
        """Put an arrived chunk in its place.

        Raises:
            ProtocolError: nothing is exposed there, or less than was sent.
        """
        if notification not in self._exposed:
            raise ProtocolError(f"the peer sent {len(payload)} bytes for slice {notification}, which is not exposed")
        target = self._exposed.pop(notification)
        if target is None:
            return  # revoked
        if len(payload) > len(target):
            raise ProtocolError(f"the peer sent {len(payload)} bytes for a slice of {len(target)}")
        target[: len(payload)] = payload

    def drop(self, rail: int) -> None:
        """Nothing: this rail is the control stream."""

    def close(self) -> None:
        """See `Endpoint.close`."""
        self._exposed.clear()
