"""Requests of `pulling` receivers, and answers of `serving` senders, in FLARE's messages from cell to cell."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from nvflare_rdma.errors import TransferError
from nvflare_rdma.transfer import LostError, Service

_CHANNEL, _TOPIC = "nvflare_rdma", "stream"
#: Nothing that is asked takes long, but a sender may have to dial first.
_ANSWER_SECONDS = {"describe": 20.0, "send": 60.0}
_PROMPT_SECONDS = 5.0
_TRIES = 3


class Desk:
    """What is being sent by the streams of this process's cells."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._services: dict[str, Service] = {}
        self._cells: weakref.WeakSet[Any] = weakref.WeakSet()

    def open(self, cell: Any, service: Service) -> str:
        """From now on those who know the result are answered."""
        stream = uuid.uuid4().hex
        with self._lock:
            self._services[stream] = service
            if cell not in self._cells:
                cell.register_request_cb(channel=_CHANNEL, topic=_TOPIC, cb=self._answer)
                self._cells.add(cell)
        return stream

    def close(self, stream: str) -> None:
        """It is over."""
        with self._lock:
            service = self._services.pop(stream, None)
        if service is not None:
            service.close()

    def _answer(self, message: Any) -> Any:
        payload = message.payload if isinstance(message.payload, dict) else {}
        with self._lock:
            service = self._services.get(str(payload.get("stream")))
        if service is None:
            answer: dict[str, Any] = {"refused": "the stream is over"}
        else:
            answer = service.answer(payload.get("request"), message.get_header(MessageHeaderKey.ORIGIN))
        return make_reply(ReturnCode.OK, "", answer)


#: The process's.
desk = Desk()


def asker(cell: Any, peer: str, stream: str, secure: bool) -> Callable[[dict[str, Any]], Any]:
    """What sends requests to the `Desk` of ``peer`` (an FQCN): for `pulling.pull`."""

    def ask(request: dict[str, Any]) -> Any:
        # An answer may be lost; what may be said twice is. A report comes again by itself.
        for _ in range(1 if request["do"] in ("send", "report") else _TRIES):
            reply = cell.send_request(
                channel=_CHANNEL,
                topic=_TOPIC,
                target=peer,
                request=new_cell_message({}, {"stream": stream, "request": request}),
                timeout=_ANSWER_SECONDS.get(request["do"], _PROMPT_SECONDS),
                secure=secure,
                optional=True,
            )
            code = reply.get_header(MessageHeaderKey.RETURN_CODE)
            if code != ReturnCode.TIMEOUT:
                break
        if code == ReturnCode.TIMEOUT:
            raise LostError(f"{peer} did not answer {request['do']!r}")
        if code != ReturnCode.OK:
            raise TransferError(f"{peer} answered {request['do']!r} with {code}")
        return reply.payload

    return ask
