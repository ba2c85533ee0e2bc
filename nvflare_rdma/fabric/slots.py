"""Pages and the pool of re-used slots.

First-touch page faults cost several times the copy itself, so buffers that come and go with every message, or
with every round, are kept and handed out again while their pages are warm; big ones are asked for as huge pages.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import weakref
from collections import Counter, deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_GRAIN = 64 * 1024
#: From here on memory is taken in whole huge pages (2 MiB where the kernel's pages have 4 KiB).
HUGE_PAGE_BYTES = 2 * 1024 * 1024
_MIB = 1024 * 1024


def anonymous_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Map private memory of `nbytes`, in huge pages where the kernel has some (madvise(2), MADV_HUGEPAGE).

    Raises:
        MemoryError: the kernel has not that much.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    except OSError as error:
        raise MemoryError(f"can't map {nbytes} bytes: {error}") from error
    if nbytes >= HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError, AttributeError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


def slot_bytes(nbytes: int) -> int:
    """Return what a slot for `nbytes` really holds: nearly equal sizes share slots, and large ones are whole huge
    pages."""
    grain = _GRAIN if nbytes <= HUGE_PAGE_BYTES else HUGE_PAGE_BYTES
    return max(-(-nbytes // grain), 1) * grain


class SlotPool:
    """Buffers that are recycled when the last view of them is gone.

    Sizes are rounded up to a grain, so that messages of nearly the same length share slots. What is idle stays within
    `keep_bytes`; without that, idle and used together stay within what was in use at the busiest moment, and within
    `most_bytes`. What is taken for something that is only announced does not count as in use before it is `filled`: a
    peer may announce much. What was of use least recently goes first. `allocate` makes new slots.
    """

    def __init__(
        self,
        keep_bytes: int | None = 64 * _MIB,
        allocate: Callable[[int], npt.NDArray[np.uint8]] = anonymous_pages,
        most_bytes: float = math.inf,
    ) -> None:
        self._keep_bytes = keep_bytes
        self._most_bytes = most_bytes
        self._allocate = allocate
        # Appending to a deque is atomic: `_release` may run inside any allocation of any thread.
        self._free: dict[int, deque[npt.NDArray[np.uint8]]] = {}
        self._last_use: dict[int, int] = {}
        self._takes = itertools.count()
        self._used: Counter[int] = Counter()  # slots of a size that are out; approximate, as no lock guards it
        self._announced: dict[int, int] = {}  # identity of a buffer that is not filled -> the bytes of its slot
        self._busiest: float = 0

    def take(self, nbytes: int) -> memoryview:
        """Return a writable buffer of `nbytes`. Its slot comes back when no view or slice of it is referenced.

        Raises:
            MemoryError: there is not that much.
        """
        buffer = self._take(nbytes, announced=False)
        self._see()
        return buffer

    def take_for_announced(self, nbytes: int) -> memoryview:
        """See `take`. When what was announced has come, `filled` is to be called."""
        return self._take(nbytes, announced=True)

    def _take(self, nbytes: int, announced: bool) -> memoryview:
        size = self.cost(nbytes)
        self._last_use[size] = next(self._takes)
        free = self._free.setdefault(size, deque())
        try:
            slot = free.pop()
        except IndexError:
            if self._keep_bytes is None:
                self._drop_idle(max(self._busiest - self._filled_bytes - size, 0))
            slot = self._allocate(size)
        # The memoryview and every slice of it keep `lease` alive; `lease` keeps `slot` alive through `.base`.
        lease = slot[:nbytes]
        if announced:
            self._announced[id(lease)] = size  # before it counts as used
        self._used[size] += 1
        weakref.finalize(lease, self._release, slot, id(lease)).atexit = False
        return lease.data

    def filled(self, buffer: memoryview) -> None:
        """What `buffer`, as `take_for_announced` has returned it, was taken for has come."""
        if self._announced.pop(id(buffer.obj), None) is not None:
            self._see()

    def _see(self) -> None:
        self._busiest = min(max(self._busiest, self._filled_bytes), self._most_bytes)

    @property
    def _filled_bytes(self) -> int:
        return self.used_bytes - sum(list(self._announced.values()))

    def cost(self, nbytes: int) -> int:
        """Return the bytes that `take(nbytes)` really holds."""
        return slot_bytes(nbytes)

    @property
    def idle_bytes(self) -> int:
        """Bytes of the slots that lie idle."""
        return sum(size * len(free) for size, free in list(self._free.items()))

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that are out. It is approximate."""
        return sum(size * count for size, count in list(self._used.items()))

    def _release(self, slot: npt.NDArray[np.uint8], buffer: int) -> None:
        self._used[slot.size] -= 1
        self._announced.pop(buffer, None)
        keep = self._busiest - self._filled_bytes if self._keep_bytes is None else self._keep_bytes
        if slot.size > keep:
            return
        self._drop_idle(keep - slot.size, spare=slot.size)
        if self.idle_bytes + slot.size <= keep:
            self._free[slot.size].append(slot)

    def _drop_idle(self, keep: float, spare: int = 0) -> None:
        """Give idle slots back until `keep` bytes are left, but none of `spare` bytes."""
        while self.idle_bytes > keep:
            sizes = [size for size, free in list(self._free.items()) if free and size != spare]
            if not sizes:
                return
            with contextlib.suppress(IndexError):
                self._free[min(sizes, key=self._last_use.__getitem__)].popleft()

    def clear(self) -> None:
        """Give all idle slots back."""
        self._drop_idle(0)
