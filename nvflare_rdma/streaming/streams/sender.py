"""FLARE's streams (`nvflare.private.stream_runner`) whose objects move over data channels: containers and files.

    stream       sender, in FLARE's stream messages                  receiver
    "hello"      who can take it directly?                           yes, or why not; the stream of hello is over
    "start"      which stream to ask for, at which cell              `pulling` begins in a thread: it asks by cell
    "more"       what goes with messages, in small portions          takes it
    "wait"       how is it?                                          running, done, failed or "own", after some time
    "end"        when nobody is running any more                     FLARE's stream ends: result, callback, return code

These go under a channel's name of their own, where a receiver without this package has nothing registered. To it, and
to those who can't be served directly ("own"), the sender streams in FLARE's way afterwards. So stream contexts,
callbacks, return codes and the abort signal are FLARE's, and N receivers pull at the same time.
"""

from __future__ import annotations

import logging
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nvflare.apis.shareable import ReturnCode, Shareable
from nvflare.apis.streaming import ObjectProducer, StreamContextKey

from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.requests import close_stream, open_stream
from nvflare_rdma.streaming.streams.receiver import KEY, PREFIX, TURN_SECONDS
from nvflare_rdma.transfer import Service

log = logging.getLogger(__name__)

#: For an answer, besides; FLARE's default for a chunk of a file is 5 s.
_MIN_TIMEOUT = 10.0
#: In a row, that a receiver may leave unanswered.
_UNANSWERED = 3


class StreamedObject(ABC):
    """What is streamed. ``service``: has its data."""

    service: Service

    def more(self) -> Iterator[Any]:
        """What goes with messages; `Receiving.take` gets each."""
        return iter(())

    @property
    def broken(self) -> str:
        """Why nobody can have it, in no way."""
        return ""


class _Inquiry(ObjectProducer):
    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.answers: dict[str, Any] = {}

    def produce(self, stream_ctx: Any, fl_ctx: Any) -> tuple[Any, float]:
        return Shareable({KEY: {"do": "hello"}}), self._timeout

    def process_replies(self, replies: dict[str, Any], stream_ctx: Any, fl_ctx: Any) -> Any:
        self.answers = replies
        return True


class _Announcements(ObjectProducer):
    """Tells receivers what to ask for, and hears how they get on."""

    def __init__(self, offer: StreamedObject, start: dict[str, Any], targets: Iterable[str], timeout: float) -> None:
        self._offer = offer
        self._start = start
        self._more = offer.more()
        self._timeout = timeout
        self._begun = self._ending = False
        self.states = dict.fromkeys(targets, "running")
        self.reasons: dict[str, str] = {}
        self.replies: dict[str, Any] = {}
        self._unanswered = dict.fromkeys(self.states, 0)

    def produce(self, stream_ctx: Any, fl_ctx: Any) -> tuple[Any, float]:
        if not self._begun:
            self._begun, message = True, self._start
        elif "running" not in self.states.values():
            self._ending, message = True, {"do": "end", "gone": bool(self._offer.broken)}
        elif (more := next(self._more, None)) is not None:
            message = {"do": "more", "what": more}
        else:
            message = {"do": "wait"}
        return Shareable({KEY: message}), self._timeout

    def process_replies(self, replies: dict[str, Any], stream_ctx: Any, fl_ctx: Any) -> Any:
        for target in self.states:
            self._heard(target, replies.get(target))
        if not self._ending:
            return None
        self.replies = {target: reply for target, reply in replies.items() if self.states.get(target) == "done"}
        for reply in self.replies.values():
            reply.pop(KEY, None)
        return True

    def _heard(self, target: str, reply: Any) -> None:
        state = self.states[target]
        if state in ("failed", "own"):
            return
        said = reply.get(KEY) if isinstance(reply, Shareable) else None
        if isinstance(said, dict) and said.get("state") in ("running", "done", "failed", "own"):
            self._unanswered[target] = 0
            self.states[target], self.reasons[target] = said["state"], str(said.get("reason", ""))
            return
        code = reply.get_return_code() if isinstance(reply, Shareable) else ReturnCode.COMMUNICATION_ERROR
        self._unanswered[target] += 1
        lost = code in (ReturnCode.TIMEOUT, ReturnCode.COMMUNICATION_ERROR)
        if not lost or self._ending or self._unanswered[target] == _UNANSWERED:
            self.states[target], self.reasons[target] = "failed", f"it answered with {code}"


def stream(
    fl_ctx: Any,
    channel: str,
    topic: str,
    stream_ctx: dict[str, Any],
    extra: dict[str, Any],
    targets: Any,
    offer: Callable[[Any], StreamedObject],
    own: Callable[[Any], tuple[str, Any]],
    what: str,
    timeout: float,
    **flags: bool,
) -> tuple[str, dict[str, Any]]:
    """FLARE's return code, and the replies of targets that were served directly.

    Args:
        stream_ctx: FLARE's. ``extra``: what it also has for those who make a `Receiving` of it, and take it out.
        targets: FLARE's; who they are is heard from their answers.
        offer: makes what is offered by FLARE's cell, if anybody takes it directly.
        own: streams in FLARE's way, to the targets it is given.
        timeout: for each message, seconds.
        flags: FLARE's ``optional`` and ``secure``.
    """
    engine, timeout = fl_ctx.get_engine(), max(timeout, _MIN_TIMEOUT)
    cell = engine.get_cell()
    if shared().links.of(cell) is None:
        log.warning("%s goes on FLARE's own path: this side has no data channels (RdmaTransfer is not running)", what)
        return _own(own, targets)

    stream_ctx |= {StreamContextKey.CHANNEL: channel, StreamContextKey.TOPIC: topic}

    def run(producer: ObjectProducer, to: Any) -> str:
        code, _ = engine.stream_objects(PREFIX + channel, topic, {**stream_ctx, **extra}, to, producer, fl_ctx, **flags)
        return str(code)

    hello = _Inquiry(timeout)
    if (code := run(hello, targets)) != ReturnCode.OK:
        return code, {}
    reasons = {target: _hello_reason(reply) for target, reply in hello.answers.items()}
    direct = [target for target, reason in reasons.items() if reason is None]
    others = {target: reason or "" for target, reason in reasons.items() if reason is not None}
    failed, replies = False, {}
    if direct:
        made = offer(cell)
        name = open_stream(cell, made.service)
        timeout += TURN_SECONDS
        secure = bool(flags.get("secure"))
        start = {"do": "start", "stream": name, "peer": cell.get_fqcn(), "secure": secure, "timeout": timeout}
        tickets = _Announcements(made, start, direct, timeout)
        try:
            code = run(tickets, direct)
        finally:
            close_stream(name)
        if code != ReturnCode.OK:
            return code, {}
        replies = tickets.replies
        for target, state in tickets.states.items():
            if state == "own" and not made.broken:
                others[target] = tickets.reasons[target]
            elif state != "done":
                failed = True
                log.error("%s did not get to %s: %s", what, target, made.broken or tickets.reasons[target])
    for target, reason in others.items():
        log.warning("%s goes to %s on FLARE's own path: %s", what, target, reason)
    if others or not reasons:
        # Without a single answer: FLARE says what is wrong with the targets.
        code, their_replies = _own(own, list(others) if replies or failed else targets)
        if code != ReturnCode.OK:
            return code, {}
        replies = {**replies, **their_replies}
    return (ReturnCode.ERROR if failed else ReturnCode.OK), replies


def _own(own: Callable[[Any], tuple[str, Any]], targets: Any) -> tuple[str, dict[str, Any]]:
    code, result = own(targets)
    return code, result if isinstance(result, dict) else {}


def _hello_reason(reply: Any) -> str | None:
    """Why a target can't be served directly; None if it can."""
    said = reply.get(KEY) if isinstance(reply, Shareable) else None
    if not isinstance(said, dict):
        code = reply.get_return_code() if isinstance(reply, Shareable) else type(reply).__name__
        return f"it does not know this package's streams ({code})"
    return None if said.get("state") == "ready" else str(said.get("reason"))
