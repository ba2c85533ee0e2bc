"""Which service answers the requests for which stream of this process, and to whom."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.service import Service

log = get_logger(__name__)

#: So many strangers are in the log for each stream.
_STRANGERS_SAID = 8


@dataclass(frozen=True)
class _Stream:
    service: Service
    receivers: frozenset[str]
    strangers: set[Any] = field(default_factory=set)


class StreamRequestRouter:
    """Names the streams that this process's cells send, and takes each request to the `Service` of its stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}
        self._cells: weakref.WeakSet[Any] = weakref.WeakSet()

    def open(self, cell: Any, service: Service, receivers: Iterable[str], listen: Callable[[Any], None]) -> str:
        """Answer requests for `service` until `close`, to the cells `receivers` if they know the name that is returned.
        `listen(cell)` is called for the first stream of a cell: it has the cell's messages brought to `answer`."""
        stream = uuid.uuid4().hex
        with self._lock:
            self._streams[stream] = _Stream(service, frozenset(receivers))
            if cell not in self._cells:
                listen(cell)
                self._cells.add(cell)
        return stream

    def close(self, stream: str) -> None:
        """End a stream and its service."""
        with self._lock:
            found = self._streams.pop(stream, None)
        if found is not None:
            found.service.close()

    def answer(self, stream: Any, request: Any, receiver: Any) -> dict[str, Any]:
        """What the stream's service says to the request of `receiver`, the cell that FLARE says it came from."""
        with self._lock:
            found = self._streams.get(str(stream))
        if found is None:
            return {"refused": "the stream is over"}
        if receiver not in found.receivers:
            with self._lock:
                news = receiver not in found.strangers and len(found.strangers) < _STRANGERS_SAID
                if news:
                    found.strangers.add(receiver)
            if news:
                log.warning("%r asks for a stream that was announced to others, and is refused", receiver)
            return {"refused": "the stream was not announced to the cell that asks"}
        return found.service.answer(request, receiver)
