"""Which service answers the requests for which stream of this process."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any

from nvflare_rdma.transfer.service import Service


class StreamRequestRouter:
    """Names the streams that this process's cells send, and takes each request to the `Service` of its stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._services: dict[str, Service] = {}
        self._cells: weakref.WeakSet[Any] = weakref.WeakSet()

    def open(self, cell: Any, service: Service, listen: Callable[[Any], None]) -> str:
        """Answer requests for `service` until `close`; whoever knows the name that is returned may ask. `listen(cell)`
        is called for the first stream of a cell: it has the cell's messages brought to `answer`."""
        stream = uuid.uuid4().hex
        with self._lock:
            self._services[stream] = service
            if cell not in self._cells:
                listen(cell)
                self._cells.add(cell)
        return stream

    def close(self, stream: str) -> None:
        """End a stream and its service."""
        with self._lock:
            service = self._services.pop(stream, None)
        if service is not None:
            service.close()

    def answer(self, stream: Any, request: Any, receiver: Any) -> dict[str, Any]:
        """What the stream's service says to the request of `receiver`."""
        with self._lock:
            service = self._services.get(str(stream))
        if service is None:
            return {"refused": "the stream is over"}
        return service.answer(request, receiver)
