"""Memory for what has to be made before it is written, apart from the budget of what arrives."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

import numpy as np

from nvflare_rdma.fabric.slots import SlotPool


class Allowance:
    """Bytes that may be out at once; who wants more waits, in the order of coming.

    What comes back may do so from anywhere, also from within a garbage collection: hence the queue, whose `put` needs
    no lock of this class.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._turn = threading.Lock()
        self._out = 0
        self._back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def take(self, nbytes: int) -> None:
        """Wait for `nbytes`. More than the limit is admitted alone."""
        with self._turn:
            while self._out and (self._out + nbytes > self._limit or not self._back.empty()):
                self._out -= self._back.get()
            self._out += nbytes

    def give(self, nbytes: int) -> None:
        """Give bytes back that are not needed any more."""
        self._back.put(nbytes)


class SendMemory:
    """Slots of a pool for what has to be made before it is written (encoded, sealed, read from a file): as many as all
    sites together may have, and each of them at most a quarter of that, over all links to it. A slot counts until no
    view of it is left. It is apart from the `MemoryBudget` of what arrives, since two processes that send to each other
    would otherwise wait for each other's memory.
    """

    def __init__(self, pool: SlotPool, limit: int) -> None:
        self._pool = pool
        self._limit = limit
        self._allowance = Allowance(limit)
        self._lock = threading.Lock()
        self._shares: weakref.WeakValueDictionary[str, Allowance] = weakref.WeakValueDictionary()

    @property
    def share_bytes(self) -> int:
        """How many bytes of slots a site may have. A slot that is longer by itself is admitted alone."""
        return self._limit // 4

    def share(self, site: str) -> Callable[[int], memoryview]:
        """Return what gives a link to `site` writable slots of so many bytes. It may wait for others to be written."""
        with self._lock:
            own = self._shares.setdefault(site, Allowance(self.share_bytes))

        def take(nbytes: int) -> memoryview:
            cost = self._pool.cost(nbytes)
            own.take(cost)
            self._allowance.take(cost)
            try:
                slot = np.frombuffer(self._pool.take(nbytes), np.uint8)
            except MemoryError:
                self._allowance.give(cost)
                own.give(cost)
                raise
            weakref.finalize(slot, self._give, own, cost).atexit = False
            return slot.data

        return take

    def _give(self, own: Allowance, cost: int) -> None:
        self._allowance.give(cost)
        own.give(cost)
