"""Streams containers and files as FLARE does (`nvflare.private.stream_runner`), but moves their data over links.

    stream       sender, in FLARE's stream messages                  receiver
    "hello"      who can take it directly?                           yes, or why not; the stream of hello is over
    "start"      which stream to ask for                             a `Pull` begins in a thread, which asks the cell
                                                                     that this came from
    "more"       what goes with messages, in small batches           takes it
    "wait"       how is it?                                          running, done, failed or "own": after some time,
                                                                     or at once if many of the sender's wait already
    "end"        when nobody is running any more                     FLARE's stream ends: result, callback, return code

These messages go under a FLARE channel name that is this package's, where a receiver without this package has nothing
registered. To it, and to those who can't be served directly ("own"), the sender streams on the fallback afterwards, in
FLARE's way. So stream contexts, callbacks, return codes and the abort signal are FLARE's, and N receivers pull at the
same time.

Who is who is FLARE's word (`messages.Said`), and not what messages say: a stream is served to the cells that have
answered "hello", and only its sender's messages are obeyed.
"""

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nvflare.apis.shareable import ReturnCode, Shareable
from nvflare.apis.streaming import ObjectProducer, StreamContextKey

from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.requests import close_stream, open_stream
from nvflare_rdma.streaming.streams.messages import KEY, PREFIX, Said, prepare_to_read
from nvflare_rdma.streaming.streams.receiver import FALLBACK, TURN_SECONDS
from nvflare_rdma.transfer import Service

log = get_logger(__name__)

#: An answer may take so long at least. FLARE's default for a chunk of a file is 5 s.
_MIN_TIMEOUT = 10.0
#: A receiver that leaves so many messages in a row unanswered, for as long as transfers wait for a peer
#: (`PeerLinks.patience`), has failed.
_UNANSWERED = 3
#: Receivers are asked how they are no more often than so, also if all of them answer at once.
_PACE_SECONDS = TURN_SECONDS / 2
_LOOK_SECONDS = 0.125


class StreamedObject(ABC):
    """An object that is streamed. `service` serves its data."""

    service: Service

    def more(self) -> Iterator[Any]:
        """The batches that go with messages; each is for `Receiving.take`."""
        return iter(())

    @property
    def broken(self) -> str:
        """Why nobody can have the object, in no way; "" as long as they can."""
        return ""


class _Inquiry(ObjectProducer):
    """Asks targets who of them can take an object directly."""

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

    def __init__(
        self,
        streamed: StreamedObject,
        start: dict[str, Any],
        targets: Iterable[str],
        timeout: float,
        patience: float = 0.0,
    ) -> None:
        self._streamed = streamed
        self._start = start
        self._more = streamed.more()
        self._timeout = timeout
        self._begun = self._ending = False
        self.states = dict.fromkeys(targets, "running")
        self.reasons: dict[str, str] = {}
        self.replies: dict[str, Any] = {}
        self._patience = patience
        self._unanswered = dict.fromkeys(self.states, 0)
        self._heard_at = dict.fromkeys(self.states, time.monotonic())
        self._next_turn = 0.0

    def produce(self, stream_ctx: Any, fl_ctx: Any) -> tuple[Any, float]:
        if not self._begun:
            self._begun, message = True, self._start
        elif "running" not in self.states.values():
            self._ending, message = True, {"do": "end", "gone": bool(self._streamed.broken)}
        elif (more := next(self._more, None)) is not None:
            message = {"do": "more", "what": more}
        else:
            self._pace(fl_ctx)
            message = {"do": "wait"}
        return Shareable({KEY: Said(message)}), self._timeout

    def _pace(self, fl_ctx: Any) -> None:
        abort = fl_ctx.get_run_abort_signal()
        while (left := self._next_turn - time.monotonic()) > 0 and not (abort is not None and abort.triggered):
            time.sleep(min(left, _LOOK_SECONDS))
        self._next_turn = time.monotonic() + _PACE_SECONDS

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
        if state in ("failed", FALLBACK):
            return
        said = reply.get(KEY) if isinstance(reply, Shareable) else None
        if isinstance(said, dict) and said.get("state") in ("running", "done", "failed", FALLBACK):
            self._unanswered[target], self._heard_at[target] = 0, time.monotonic()
            self.states[target], self.reasons[target] = said["state"], str(said.get("reason", ""))
            return
        code = reply.get_return_code() if isinstance(reply, Shareable) else ReturnCode.COMMUNICATION_ERROR
        self._unanswered[target] += 1
        lost = code in (ReturnCode.TIMEOUT, ReturnCode.COMMUNICATION_ERROR)
        silence = time.monotonic() - self._heard_at[target]
        gone = self._unanswered[target] >= _UNANSWERED and silence >= self._patience
        if not lost or self._ending or gone:
            self.states[target], self.reasons[target] = "failed", f"it answered with {code}"


@dataclass(frozen=True)
class StreamCall:
    """What a caller of FLARE's streamers wants streamed, and to whom.

    `channel`, `topic`, `stream_ctx`, `targets`, `optional` and `secure` are FLARE's; who the targets are is heard from
    their answers. `extra` is added to the stream's context for those who make a `Receiving` of it, and take it out.
    `what` names the object in log lines. `timeout` is that of each message, in seconds.
    """

    fl_ctx: Any
    channel: str
    topic: str
    stream_ctx: dict[str, Any]
    extra: dict[str, Any]
    targets: Any
    what: str
    timeout: float
    optional: bool = False
    secure: bool = False

    def run(self, producer: ObjectProducer, targets: Any) -> str:
        """Run one of FLARE's streams, and give its return code."""
        context = {**self.stream_ctx, **self.extra}
        engine, flags = self.fl_ctx.get_engine(), {"optional": self.optional, "secure": self.secure}
        code, _ = engine.stream_objects(
            PREFIX + self.channel, self.topic, context, targets, producer, self.fl_ctx, **flags
        )
        return str(code)


def stream(
    call: StreamCall,
    make: Callable[[Any], StreamedObject],
    fallback: Callable[[Any], tuple[str, Any]],
) -> tuple[str, dict[str, Any]]:
    """Stream an object, and give FLARE's return code and the replies of the targets that have it.

    Args:
        make: makes what is streamed by a FLARE cell, if anybody takes it directly.
        fallback: streams in FLARE's way, to the targets it is given.
    """
    prepare_to_read()
    cell, timeout = call.fl_ctx.get_engine().get_cell(), max(call.timeout, _MIN_TIMEOUT)
    if (links := shared().links.of(cell)) is None:
        reason = "this side has no links (RdmaTransfer is not running)"
        log.log(shared().notices.level("streamed", "", reason), "%s goes on FLARE's own path: %s", call.what, reason)
        return _fall_back(fallback, call.targets)

    call.stream_ctx.update({StreamContextKey.CHANNEL: call.channel, StreamContextKey.TOPIC: call.topic})
    inquiry = _Inquiry(timeout)
    if (code := call.run(inquiry, call.targets)) != ReturnCode.OK:
        return code, {}
    found = {target: _receiver(reply) for target, reply in inquiry.answers.items()}
    receivers = {target: cell for target, (cell, reason) in found.items() if not reason}
    others = {target: reason for target, (_, reason) in found.items() if reason}
    direct = list(receivers)
    failed, replies = False, {}
    if direct:
        made = make(cell)
        name = open_stream(cell, made.service, receivers.values())
        timeout += TURN_SECONDS
        start = {"do": "start", "stream": name, "secure": bool(call.secure), "timeout": timeout}
        announcements = _Announcements(made, start, direct, timeout, links.patience)
        try:
            code = call.run(announcements, direct)
        finally:
            close_stream(name)
        if code != ReturnCode.OK:
            return code, {}
        replies = announcements.replies
        for target, state in announcements.states.items():
            if state == FALLBACK and not made.broken:
                others[target] = announcements.reasons[target]
            elif state != "done":
                failed = True
                reason = made.broken or announcements.reasons[target]
                log.error("%s did not get to %s: %s", call.what, target, reason)
    for target, reason in others.items():
        level = shared().notices.level("streamed", target, reason)
        log.log(level, "%s goes to %s on FLARE's own path: %s", call.what, target, reason)
    if others or not found:
        # If no target has answered, FLARE says what is wrong with them.
        code, their_replies = _fall_back(fallback, list(others) if replies or failed else call.targets)
        if code != ReturnCode.OK:
            return code, {}
        replies = {**replies, **their_replies}
    return (ReturnCode.ERROR if failed else ReturnCode.OK), replies


def _fall_back(fallback: Callable[[Any], tuple[str, Any]], targets: Any) -> tuple[str, dict[str, Any]]:
    code, result = fallback(targets)
    return code, result if isinstance(result, dict) else {}


def _receiver(reply: Any) -> tuple[str, str]:
    """The cell that a target will ask from, and why it can't be served directly; "" if it can."""
    said = reply.get(KEY) if isinstance(reply, Shareable) else None
    if not isinstance(said, Said):
        code = reply.get_return_code() if isinstance(reply, Shareable) else type(reply).__name__
        return "", f"it does not know this package's streams, or those of another version ({code})"
    if said.words.get("state") != "ready":
        return "", str(said.words.get("reason") or "it is not ready")
    named = said.words.get("cell")
    if type(named) is not str or not said.cell or not _is_one_site(named, said.cell):
        return "", f"it answered from {said.cell!r} that {named!r} would ask"
    return named, ""


def _is_one_site(name: str, other: str) -> bool:
    """Whether two cells are the same, or one of them is below the other."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
