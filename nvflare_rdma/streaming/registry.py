"""The data channels of a process's FLARE cells: made for a cell when its tensors first need them.

FLARE has more than one cell in a process (the simulator's server has one for the job and one for itself), and which of
them sends or receives a message shows only when it does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from nvflare_rdma.errors import RdmaError
from nvflare_rdma.transfer import PeerLinks

log = logging.getLogger(__name__)


class Registry:
    """Between `start` and `stop`; these may be nested, as a process may have several runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._make: Callable[[Any], PeerLinks] | None = None
        self._channels: dict[str, PeerLinks | None] = {}

    def start(self, make: Callable[[Any], PeerLinks]) -> None:
        """A run begins: from now on ``make`` opens channels for a FLARE `Cell`."""
        with self._lock:
            self._runs += 1
            self._make = make

    def stop(self) -> bool:
        """A run has ended; with the last one all channels are closed. Whether it was the last."""
        with self._lock:
            self._runs = max(self._runs - 1, 0)
            if self._runs:
                return False
            channels, self._channels, self._make = list(self._channels.values()), {}, None
        for opened in channels:
            if opened is not None:
                opened.close()
        return True

    def of(self, cell: Any) -> PeerLinks | None:
        """Those of ``cell``; None outside of runs, or if they can't be made, which is logged once."""
        name = cell.get_fqcn()
        with self._lock:
            if name not in self._channels and self._make is not None:
                try:
                    self._channels[name] = self._make(cell)
                except (RdmaError, OSError, RuntimeError) as error:
                    log.error("%s has no data channels: %s", name, error)
                    self._channels[name] = None
            return self._channels.get(name)


#: The process's.
registry = Registry()
