"""What one shm endpoint has exposed to its peer, and where the peer's writes land."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric.base import Region, RemoteSlice
from nvflare_rdma.fabric.shm.slots import SlotOwner
from nvflare_rdma.fabric.shm.wire import Message


@dataclass(slots=True, eq=False)
class _ExposedSlice:
    remote: RemoteSlice
    region: ShmRegion | None
    target: memoryview | None
    """Where the bytes go; None if revoked."""
    shared: memoryview | None = None
    """The part of a slot that the peer writes. Held until the peer has answered, so that it is not recycled."""


class ShmRegion(Region):
    """A buffer of which slices are exposed: as they are, or through a shared slot."""

    def __init__(self, exposures: Exposures, key: int, buffer: memoryview, slot: tuple[int, int] | None) -> None:
        self._exposures = exposures
        self.key = key
        self.buffer = buffer
        self.slot = slot
        """Key of the shared slot that holds the buffer, and where in it; None if the buffer is other memory."""

    def expose(self, notification: int, offset: int, length: int, rail: int) -> RemoteSlice:
        """See `Region.expose`."""
        if offset < 0 or length < 0 or offset + length > len(self.buffer):
            raise ValueError(f"slice {offset}+{length} is outside a region of {len(self.buffer)} bytes")
        if rail != 0:
            raise ValueError(f"shm has one rail, 0, not {rail}")
        return self._exposures.expose(self, notification, offset, length)

    def revoke(self, notification: int) -> None:
        """See `Region.revoke`."""
        self._exposures.revoke(self, notification)

    def close(self) -> None:
        """See `Region.close`."""
        self._exposures.revoke(self, None)
        self.buffer = memoryview(b"")


class Exposures:
    """What an endpoint has exposed. `slots` is set if the peer writes into shared memory; else this side reads the
    peer's."""

    def __init__(self) -> None:
        self.slots: SlotOwner | None = None
        self._keys = itertools.count(1)
        self._open: dict[int, _ExposedSlice] = {}
        #: Notification -> what is copied to now; `revoke` waits for the copy's end.
        self._landing: dict[int, _ExposedSlice] = {}
        self._landed = threading.Condition()
        self._closed = False

    def register(self, buffer: memoryview) -> ShmRegion:
        """See `Endpoint.register`."""
        if buffer.readonly or not buffer.c_contiguous:
            raise ValueError("only writable, contiguous memory can be exposed")
        buffer = buffer.cast("B")
        found = self.slots.find(buffer) if self.slots is not None else None
        return ShmRegion(self, next(self._keys), buffer, (found[0].key, found[1]) if found else None)

    def expose(self, region: ShmRegion, notification: int, offset: int, length: int) -> RemoteSlice:
        """Raises MemoryError or FabricError if the bytes need a slot to arrive in and there is none."""
        target = region.buffer[offset : offset + length]
        if notification in self._open:
            raise ValueError(f"notification {notification} is exposed already")
        if self.slots is None or self._closed:
            exposure = _ExposedSlice(RemoteSlice(region.key, offset, length), region, target)
        elif region.slot is not None:
            key, start = region.slot
            exposure = _ExposedSlice(RemoteSlice(key, start + offset, length), region, target, target)
        else:
            slot, bounce = self.slots.take(length)
            exposure = _ExposedSlice(RemoteSlice(slot.key, 0, length), region, target, bounce)
        if not self._closed:
            self._open[notification] = exposure
        return exposure.remote

    def revoke(self, region: ShmRegion, notification: int | None) -> None:
        """Take back one exposure of `region`, or all. When this returns, nothing is copied to the region any more (but
        the peer may write into a slot until it has answered)."""
        with self._landed:
            for number in list(self._open) if notification is None else [notification]:
                exposure = self._open.get(number)
                if exposure is not None and exposure.region is region:
                    exposure.region = exposure.target = None
            self._landed.wait_for(
                lambda: not any(e.region is region for n, e in self._landing.items() if notification in (None, n))
            )

    def land(self, message: Message, read: Callable[[int, memoryview], None]) -> None:
        """Take the peer's answer to an exposure. `read(address, target)` copies from the peer's memory. Several
        threads may be at it.

        Raises:
            ProtocolError: nothing like it is exposed. OSError: the copy failed.
        """
        number, length = message.notification, message.length
        with self._landed:
            exposure = self._open.pop(number, None)
            if exposure is None:
                raise ProtocolError(f"the peer wrote {length} bytes to slice {number}, which is not exposed")
            remote = exposure.remote
            if (message.key, message.address) != (remote.key, remote.address) or length > remote.length:
                raise ProtocolError(
                    f"the peer wrote {length} bytes at {message.key}:{message.address}, but slice {number} is "
                    f"{remote.length} bytes at {remote.key}:{remote.address}"
                )
            if not length or exposure.target is None:
                return
            self._landing[number] = exposure
            target = exposure.target[:length]
        try:
            if exposure.shared is None:
                read(message.source, target)
            elif exposure.shared is not exposure.target:
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(exposure.shared[:length], np.uint8))
        finally:
            with self._landed:
                del self._landing[number]
                self._landed.notify_all()

    def close(self) -> None:
        """The rail is down: nothing lands any more, and no slot is recycled."""
        self._closed = True
        self._open.clear()
        if self.slots is not None:
            self.slots.close()
