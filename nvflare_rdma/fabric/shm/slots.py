"""Memory that two processes map: slots that the owner hands out, and the peer's slots as the writer sees them.

A slot is one memfd. Its descriptor goes to the peer once, when it is made, and is closed on both sides as soon as
it is mapped. Slots belong to one endpoint: a peer never maps what another peer writes. (The peer can write into a
slot at any time, also when nothing of it is exposed. It is a process of the same user on the same host, which may
do as much with ptrace.)
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.shm.process_memory import address_of, check_sealed, map_shared, sealed_memory
from nvflare_rdma.fabric.slots import slot_bytes

#: Mappings per peer; a process may have 65,530 of all kinds (vm.max_map_count).
MAX_SLOTS = 8192
KEEP_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Memory that is mapped by both processes."""

    key: int
    address: int
    memory: npt.NDArray[np.uint8]


class SlotOwner:
    """Slots that are recycled when the last view of them is gone; at most `keep_bytes` lie idle.

    `announce(key, nbytes, fd)` gives a new slot to the peer and closes `fd`; `forget(key)` tells it to unmap
    one; `wake` makes another thread call `settle` soon, and is called from finalisers: it takes no lock.
    """

    def __init__(
        self,
        announce: Callable[[int, int, int], None],
        forget: Callable[[int], None],
        wake: Callable[[], None],
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self._announce, self._forget, self._wake = announce, forget, wake
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._keys = 0
        self._live: dict[int, Slot] = {}
        self._idle: deque[Slot] = deque()  # the longest unused first
        self._idle_bytes = 0
        # Appending is atomic: `_give_back` runs inside any allocation of any thread, perhaps one under the lock.
        self._returned: deque[Slot] = deque()
        self._closed = False

    def take(self, nbytes: int) -> tuple[Slot, memoryview]:
        """A slot and its first `nbytes` bytes; it comes back when no view or slice of those is referenced.

        Raises:
            MemoryError: no memory, or too many slots. FabricError: no descriptor is left.
        """
        size = slot_bytes(nbytes)
        with self._lock:
            self._collect()
            slot = next((s for s in reversed(self._idle) if s.memory.size == size), None)
            if slot is not None:
                self._idle.remove(slot)
                self._idle_bytes -= size
        if slot is None:
            slot = self._make(size)
        lease = slot.memory[:nbytes]
        weakref.finalize(lease, self._give_back, slot).atexit = False
        return slot, lease.data

    def find(self, buffer: memoryview) -> tuple[Slot, int] | None:
        """The slot that holds all of `buffer` and the buffer's offset in it, however the view was derived."""
        if not len(buffer):
            return None
        address = address_of(buffer)
        with self._lock:
            for slot in self._live.values():
                if slot.address <= address and address + len(buffer) <= slot.address + slot.memory.size:
                    return slot, address - slot.address
        return None

    def settle(self) -> None:
        """Take back what was returned, and free what is idle beyond the limit."""
        surplus: list[Slot] = []
        with self._lock:
            self._collect()
            while self._idle_bytes > self._keep_bytes:
                slot = self._idle.popleft()
                self._idle_bytes -= slot.memory.size
                del self._live[slot.key]
                surplus.append(slot)
        for slot in surplus:
            self._forget(slot.key)

    def close(self) -> None:
        """Recycle nothing from now on: the peer may still be writing. What is in use lives until its views die."""
        with self._lock:
            self._closed = True
            self._live.clear()
            self._idle.clear()
            self._returned.clear()

    def _make(self, size: int) -> Slot:
        try:
            fd = sealed_memory(size)
        except OSError as error:
            raise FabricError(f"can't make {size} bytes of shared memory: {error} (see `ulimit -n`)") from error
        try:
            memory = map_shared(fd, size)
            with self._lock:
                if len(self._live) >= MAX_SLOTS:
                    raise MemoryError(f"the peer shares {MAX_SLOTS} slots already: expose fewer slices at once")
                self._keys += 1
                slot = Slot(self._keys, address_of(memory.data), memory)
                if not self._closed:
                    self._live[slot.key] = slot
        except BaseException:
            os.close(fd)
            raise
        self._announce(slot.key, size, fd)
        return slot

    def _give_back(self, slot: Slot) -> None:
        if not self._closed:
            self._returned.append(slot)
            self._wake()

    def _collect(self) -> None:
        while self._returned:
            slot = self._returned.popleft()
            self._idle.append(slot)
            self._idle_bytes += slot.memory.size


class PeerSlots:
    """The peer's slots, mapped here. What `get` returned stays mapped while it is referenced."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._slots: dict[int, npt.NDArray[np.uint8]] = {}
        self._newest = 0
        self._closed = False

    def add(self, key: int, nbytes: int, fd: int) -> None:
        """Map what the peer sent; closes `fd`. Raises ProtocolError, or MemoryError."""
        try:
            if len(self._slots) >= MAX_SLOTS or key <= self._newest:
                raise ProtocolError(f"the peer shares slot {key} after {self._newest}, with {len(self._slots)} mapped")
            try:
                check_sealed(fd, nbytes)
            except ValueError as error:
                raise ProtocolError(f"the peer shares memory that is not safe to write: {error}") from error
            memory = map_shared(fd, nbytes)
        finally:
            os.close(fd)
        with self._changed:
            self._newest = key
            self._slots[key] = memory
            self._changed.notify_all()

    def forget(self, key: int) -> None:
        """Unmap a slot that the peer takes back. Raises ProtocolError if it is not mapped."""
        if self._slots.pop(key, None) is None:
            raise ProtocolError(f"the peer takes back slot {key}, which it has not shared")

    def get(self, key: int, timeout: float) -> npt.NDArray[np.uint8]:
        """Wait for a slot: its exposure comes over another connection than the slot itself, and may be faster.

        Raises:
            FabricError: it did not come.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while key not in self._slots:
                remaining = deadline - time.monotonic()
                if self._closed or remaining <= 0:
                    raise FabricError(f"the peer exposed slot {key} but did not share it within {timeout:g} s")
                self._changed.wait(remaining)
            return self._slots[key]

    def close(self) -> None:
        """Unmap all slots, and end every `get` that waits."""
        with self._changed:
            self._closed = True
            self._slots.clear()
            self._changed.notify_all()
