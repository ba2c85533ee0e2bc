"""How the requests of a receiver's `Pull`, and the answers of a sender's `Service`, travel in FLARE's messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from nvflare_rdma.errors import TransferError
from nvflare_rdma.runtime import shared
from nvflare_rdma.transfer import LostError, Service

_CHANNEL, _TOPIC = "nvflare_rdma", "stream"
#: Nothing that is asked takes long, but a sender may have to dial first.
_ANSWER_SECONDS = {"describe": 20.0, "send": 60.0}
_PROMPT_SECONDS = 10.0
#: What FLARE says where nobody has answered.
_NOBODY = (ReturnCode.TIMEOUT, ReturnCode.COMM_ERROR, ReturnCode.TARGET_UNREACHABLE)
_TRIES = 3
#: How often it is looked whether an answer is still wanted.
_ABORT_SECONDS = 0.2
#: Requests that are sent once: "send" must not be obeyed twice, and "report" comes again by itself.
_SENT_ONCE = ("send", "report")

#: Sends a request to a sender's `Service.answer` and returns what it says.
RequestFunction: TypeAlias = Callable[[dict[str, Any]], Any]


class PlainRequests:
    """Sends the requests of a FLARE `Cell` in one message each, and has their answers in one. Those that FLARE is to
    encrypt from end to end (`secure`) go as it sends them: it does not encrypt what is serialized in several parts.

    The cell itself makes a byte stream of each, with its threads and buffers, as if it were a model; whoever registers
    for such requests gets plain ones as well. A request is not waited for any longer once its `abort_signal` is
    triggered.
    """

    def __init__(self, cell: Any) -> None:
        self._cell = cell

    def send_request(self, abort_signal: Any = None, **request: Any) -> Any:
        """See FLARE's `Cell.send_request`."""
        if request.get("secure"):
            return self._cell.send_request(abort_signal=abort_signal, **request)
        send_plain = self._cell.core_cell.send_request
        if abort_signal is None:
            return send_plain(**request)
        over, replies = threading.Event(), [make_reply(ReturnCode.TIMEOUT)]

        def send() -> None:
            try:
                replies.append(send_plain(**request))
            except Exception as error:  # noqa: BLE001 - as FLARE has it for what can't be sent
                replies.append(make_reply(ReturnCode.COMM_ERROR, str(error)))
            over.set()

        try:
            threading.Thread(target=send, name="rdma-request", daemon=True).start()
        except RuntimeError:  # there are too many threads
            return send_plain(**request)
        while not over.wait(_ABORT_SECONDS) and not abort_signal.triggered:
            pass
        return replies[-1]


def answer_seconds(request: dict[str, Any]) -> float:
    """How long an answer to a request is waited for."""
    return _ANSWER_SECONDS.get(request["do"], _PROMPT_SECONDS)


def request_function(peer: str, send: Callable[[dict[str, Any]], Any]) -> RequestFunction:
    """A function that asks `peer` and asks again if no answer came, where that does no harm. `send` sends a request
    once and returns FLARE's reply.

    The function raises `LostError` if no answer came in time, or the peer is out of reach, and `TransferError` if FLARE
    answered with an error.
    """

    def ask(request: dict[str, Any]) -> Any:
        code = ReturnCode.TIMEOUT
        for _ in range(1 if request["do"] in _SENT_ONCE else _TRIES):
            reply = send(request)
            code = reply.get_header(MessageHeaderKey.RETURN_CODE)
            if code != ReturnCode.TIMEOUT:
                break
        if code in _NOBODY:
            raise LostError(f"{peer} did not answer {request['do']!r} ({code})")
        if code != ReturnCode.OK:
            raise TransferError(f"{peer} answered {request['do']!r} with {code}")
        return reply.payload

    return ask


def stream_request_function(cell: Any, peer: str, stream: str, secure: bool) -> RequestFunction:
    """A function that asks the cell `peer` (an FQCN) about one of its streams, for `pull`."""

    requests = PlainRequests(cell)

    def send(request: dict[str, Any]) -> Any:
        return requests.send_request(
            channel=_CHANNEL,
            topic=_TOPIC,
            target=peer,
            request=new_cell_message({}, {"stream": stream, "request": request}),
            timeout=answer_seconds(request),
            secure=secure,
            optional=True,
        )

    return request_function(peer, send)


def open_stream(cell: Any, service: Service, receivers: Iterable[str]) -> str:
    """Let `service` answer the requests of the cells `receivers` that reach `cell`, until `close_stream`. Returns the
    stream's name, by which they ask for it."""

    def listen(cell: Any) -> None:
        cell.register_request_cb(channel=_CHANNEL, topic=_TOPIC, cb=_answer)

    return shared().stream_requests.open(cell, service, receivers, listen)


def close_stream(stream: str) -> None:
    """End the stream and its service."""
    shared().stream_requests.close(stream)


def _answer(message: Any) -> Any:
    payload = message.payload if isinstance(message.payload, dict) else {}
    origin = message.get_header(MessageHeaderKey.ORIGIN)
    answer = shared().stream_requests.answer(payload.get("stream"), payload.get("request"), origin)
    return make_reply(ReturnCode.OK, "", answer)
