"""The process's memory budget and its pool of re-used slots.

First-touch page faults cost several times the copy itself, so buffers that come and go with every message are
kept and handed out again while their pages are warm.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

SLOT_BYTES = 2 * 1024 * 1024
_GRAIN = 64 * 1024


class MemoryBudget:
    """How many bytes all transfers of a process may hold at once; first come, first served.

    A request larger than the whole budget is admitted alone, as if it were the size of the budget: a message
    that has to be contiguous can't be received in less memory than it has, but there is never more than one.
    """

    def __init__(self, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"a memory budget needs a positive number of bytes, not {limit}")
        self.limit = limit
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._in_use = 0
        self._peak = 0

    @property
    def in_use(self) -> int:
        return self._in_use

    @property
    def peak(self) -> int:
        return self._peak

    def request(self, nbytes: int, granted: Callable[[], None]) -> None:
        """Call ``granted`` (from this thread, or later from the one that releases) when the bytes are there."""
        with self._lock:
            self._waiting.append((min(nbytes, self.limit), granted))
        self._serve()

    def release(self, nbytes: int) -> None:
        with self._lock:
            self._in_use -= min(nbytes, self.limit)
        self._serve()

    def cancel(self, granted: Callable[[], None]) -> bool:
        """Withdraw a request that still waits. False: it was granted already, so release it instead."""
        with self._lock:
            for entry in self._waiting:
                if entry[1] is granted:
                    self._waiting.remove(entry)
                    break
            else:
                return False
        self._serve()
        return True

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._in_use + self._waiting[0][0] > self.limit:
                    return
                nbytes, granted = self._waiting.popleft()
                self._in_use += nbytes
                self._peak = max(self._peak, self._in_use)
            granted()


class SlotPool:
    """Buffers that are recycled when the last view of them is gone.

    Sizes are rounded up to a grain, so that messages of nearly the same length share slots; what is longer than
    ``slot_bytes`` is not kept.
    """

    def __init__(self, slot_bytes: int = SLOT_BYTES, keep_bytes: int = 64 * 1024 * 1024) -> None:
        self.slot_bytes = slot_bytes
        self._keep_bytes = keep_bytes
        # Appending to a deque is atomic: `_release` may run inside any allocation of any thread.
        self._free: dict[int, deque[npt.NDArray[np.uint8]]] = {}

    def take(self, nbytes: int) -> memoryview:
        """A writable buffer of ``nbytes``. Its slot comes back when no view or slice of it is referenced."""
        size = self.cost(nbytes)
        if size > self.slot_bytes:
            return np.empty(nbytes, dtype=np.uint8).data
        free = self._free.setdefault(size, deque())
        try:
            slot = free.pop()
        except IndexError:
            slot = np.empty(size, dtype=np.uint8)
        # The memoryview and every slice of it keep `lease` alive; `lease` keeps `slot` alive through `.base`.
        lease = slot[:nbytes]
        weakref.finalize(lease, self._release, slot).atexit = False
        return lease.data

    def cost(self, nbytes: int) -> int:
        """What `take` of ``nbytes`` really holds."""
        return nbytes if nbytes > self.slot_bytes else -(-nbytes // _GRAIN) * _GRAIN

    @property
    def idle_bytes(self) -> int:
        return sum(size * len(free) for size, free in list(self._free.items()))

    def _release(self, slot: npt.NDArray[np.uint8]) -> None:
        if self.idle_bytes + slot.size <= self._keep_bytes:
            self._free[slot.size].append(slot)
