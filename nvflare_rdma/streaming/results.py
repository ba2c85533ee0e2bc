"""Where a server's results are until they are added: in memory as they came, or on disk if memory has no room."""

from __future__ import annotations

import math
import threading
from typing import Any

from nvflare_rdma.accumulate import Bytes, Encoded, InMemory, InSpool, Pieces, Plain, Spool, encoded_tensor
from nvflare_rdma.codecs import FLOAT_NAMES
from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import Shared
from nvflare_rdma.transfer import EncodedInMemory, Item, Place, site_of
from nvflare_rdma.transfer import InMemory as InMemoryPlace

log = get_logger(__name__)

#: Smaller tensors are always in memory. Most of them come in bundles, and a model has few bytes in them.
_SMALL = 128 * 1024


class Results:
    """The places of one message's tensors at a server whose results wait until they are added.

    What all received tensors of the process take in memory stays within the budget of its `Holdings`; what comes beyond
    it is on disk, and read from there when it is added. So a server that gets results of many sites at once needs no
    memory for them.
    """

    def __init__(self, shared: Shared, sender: str) -> None:
        """The places of a message of the cell `sender`."""
        self._shared = shared
        self._spool = Spool(shared.holdings.disk, site_of(sender))
        self._sizes: dict[str, int] = {}

    def land(self, item: Item) -> Place:
        """The place of a tensor. Other than torch tensors of floating-point numbers are in memory, as tensors."""
        memory = self._shared.tensor_memory
        waits = item.torch and (item.cut is not None or item.dtype in FLOAT_NAMES)
        if not waits or item.sent_nbytes < _SMALL:
            room: memoryview | None = memory.take(item.sent_nbytes if waits else item.nbytes)
        else:
            room = memory.take_within(item.sent_nbytes, self._shared.holdings.budget)
        self._sizes[item.name] = 0 if room is None else len(room)
        if room is None:
            return _OnDisk(item, self._spool, self._shared)
        if waits and item.cut is not None:
            return EncodedInMemory(item, room, lambda item, room: _tensor(item, InMemory(room), self._shared))
        return InMemoryPlace(item, room)

    def nbytes(self, item: Item) -> int:
        """Bytes of memory that a tensor takes."""
        return self._sizes.get(item.name, 0)


class _OnDisk(Place):
    """Keeps a tensor as it comes: in a spool, or in memory if the disk has no room."""

    def __init__(self, item: Item, spool: Spool, shared: Shared) -> None:
        self.encoded = item.cut is not None
        self._item = item
        self._spool = spool
        self._shared = shared
        self._lock = threading.Lock()
        self._where: InSpool | None = None
        self._instead: memoryview | None = None

    def write(self, offset: int, data: memoryview) -> None:
        """See `Place.write`."""
        with self._lock:  # when something comes, and not because a peer has announced it
            if self._where is None and self._instead is None:
                self._begin()
        if self._where is not None:
            self._where.write(offset, data)
        elif self._instead is not None:
            self._instead[offset : offset + len(data)] = data

    def finish(self) -> Any:
        """See `Place.finish`."""
        if self._where is not None:
            return _tensor(self._item, self._where, self._shared)
        assert self._instead is not None  # it is not small, so something was written
        if self._item.cut is not None:
            return _tensor(self._item, InMemory(self._instead), self._shared)
        return InMemoryPlace(self._item, self._instead).finish()

    def _begin(self) -> None:
        nbytes = self._item.sent_nbytes
        try:
            self._where = self._spool.reserve(nbytes)
        except OSError as error:
            log.log(
                self._shared.notices.level("kept", self._spool.folder, error.strerror),
                "results that wait to be added are in memory beyond the budget: %d bytes can't be on disk in %s: %s; "
                "free disk space there, or set TMPDIR for the server's process (too many open files: raise ulimit -n)",
                *(nbytes, self._spool.folder, error),
            )
            self._instead = self._shared.tensor_memory.take(nbytes)


def _tensor(item: Item, where: Bytes, shared: Shared) -> Any:
    """The torch tensor that has what came."""
    cut = item.cut
    if cut is not None:
        encoded: Encoded = Pieces(cut.codec, cut.values, cut.n, item.dtype, where)
    else:
        encoded = Plain(math.prod(item.shape), item.dtype, where)
    return encoded_tensor(encoded, item.shape, shared.holdings)
