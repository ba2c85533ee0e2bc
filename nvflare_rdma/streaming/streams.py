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
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from nvflare.apis.shareable import ReturnCode, Shareable, make_reply
from nvflare.apis.streaming import ConsumerFactory, ObjectConsumer, ObjectProducer, StreamContextKey

from nvflare_rdma.errors import FabricError, RdmaError, TransferError
from nvflare_rdma.metrics.transfers import Meter
from nvflare_rdma.streaming.asking import asker, desk
from nvflare_rdma.streaming.channels import DataChannels
from nvflare_rdma.streaming.registry import registry
from nvflare_rdma.streaming.serving import Service

log = logging.getLogger(__name__)

PREFIX = "nvflare_rdma."
KEY = "nvflare_rdma"
_SILENT = PREFIX + "silent"  # in a receiver's stream context: FLARE's own stream follows, or came before
#: How long a receiver waits for its data to come before it answers that it is still coming.
_TURN_SECONDS = 2.0
#: For an answer, besides; FLARE's default for a chunk of a file is 5 s.
_MIN_TIMEOUT = 10.0
#: In a row, that a receiver may leave unanswered.
_UNANSWERED = 3
#: A receiver that is ready hears no more of its sender.
_LONELY_SECONDS = 120.0


# -- sending ---------------------------------------------------------------------------------------------------


class Offer(ABC):
    """What is streamed. ``service``: has its data."""

    service: Service

    def more(self) -> Iterator[Any]:
        """What goes with messages; `Receiving.take` gets each."""
        return iter(())

    @property
    def broken(self) -> str:
        """Why nobody can have it, in no way."""
        return ""


class _Hello(ObjectProducer):
    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.answers: dict[str, Any] = {}

    def produce(self, stream_ctx: Any, fl_ctx: Any) -> tuple[Any, float]:
        return Shareable({KEY: {"do": "hello"}}), self._timeout

    def process_replies(self, replies: dict[str, Any], stream_ctx: Any, fl_ctx: Any) -> Any:
        self.answers = replies
        return True


class _Tickets(ObjectProducer):
    """Tells receivers what to ask for, and hears how they get on."""

    def __init__(self, offer: Offer, start: dict[str, Any], targets: Iterable[str], timeout: float) -> None:
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
    offer: Callable[[Any], Offer],
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
    if registry.of(cell) is None:
        log.warning("%s goes on FLARE's own path: this side has no data channels (RdmaTransfer is not running)", what)
        return _own(own, targets)

    stream_ctx |= {StreamContextKey.CHANNEL: channel, StreamContextKey.TOPIC: topic}

    def run(producer: ObjectProducer, to: Any) -> str:
        code, _ = engine.stream_objects(PREFIX + channel, topic, {**stream_ctx, **extra}, to, producer, fl_ctx, **flags)
        return str(code)

    hello = _Hello(timeout)
    if (code := run(hello, targets)) != ReturnCode.OK:
        return code, {}
    reasons = {target: _hello_reason(reply) for target, reply in hello.answers.items()}
    direct = [target for target, reason in reasons.items() if reason is None]
    others = {target: reason or "" for target, reason in reasons.items() if reason is not None}
    failed, replies = False, {}
    if direct:
        made = offer(cell)
        name = desk.open(cell, made.service)
        start = {"do": "start", "stream": name, "peer": cell.get_fqcn(), "secure": bool(flags.get("secure"))}
        tickets = _Tickets(made, start, direct, timeout + _TURN_SECONDS)
        try:
            code = run(tickets, direct)
        finally:
            desk.close(name)
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


# -- receiving -------------------------------------------------------------------------------------------------


class Receiving(ABC):
    """One stream's object on its way in. It is made when the stream starts, from the stream's context. ``kind``: see
    `TransferRecord`. ``size``: items and bytes that have arrived.

    Raises:
        RdmaError: the context is malformed.
    """

    kind: str
    size: tuple[int, int]

    def take(self, what: Any) -> None:
        """What came with a message."""
        raise TransferError("nothing is expected with messages")

    @abstractmethod
    def run(
        self,
        channels: DataChannels,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        aborted: Callable[[], bool],
        meter: Meter,
    ) -> None:
        """Receive it. Raises RdmaError, OSError or MemoryError."""

    @abstractmethod
    def finish(self, stream_ctx: dict[str, Any]) -> None:
        """Everything is here: make it known."""

    @abstractmethod
    def may_come_otherwise(self, error: Exception) -> bool:
        """Whether FLARE's own path is worth a try."""

    def dismiss(self) -> None:
        """It will not come in this way, now or later."""
        return


#: Of a stream's context, and this site's name.
Make: TypeAlias = Callable[[dict[str, Any], str], Receiving]


class _Consumer(ObjectConsumer):
    def __init__(self, stream_ctx: dict[str, Any], make: Make) -> None:
        self._stream_ctx = stream_ctx
        self._make = make
        self._fl_ctx: Any = None
        self._receiving: Receiving | None = None
        self._state, self._reason = "running", ""
        self._ended, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def consume(self, shareable: Any, stream_ctx: dict[str, Any], fl_ctx: Any) -> tuple[bool, Any]:
        self._fl_ctx = fl_ctx
        message = shareable.get(KEY)
        what = message.get("do") if isinstance(message, dict) else None
        if what == "hello":
            stream_ctx[_SILENT] = True
            cell = fl_ctx.get_engine().get_cell()
            ready = registry.of(cell) is not None
            reason = "" if ready else "it has no data channels (RdmaTransfer is not running)"
            return False, _reply("ready" if ready else "own", reason)
        if what == "start" and self._thread is None:
            self._start(message, fl_ctx)
        elif self._thread is None:
            raise TransferError(f"a stream begins with {what!r}")
        elif what == "more":
            assert self._receiving is not None
            if self._state == "running":
                self._receiving.take(message.get("what"))
        elif what == "wait":
            self._over.wait(_TURN_SECONDS)
        elif what == "end":
            return False, self._end(message.get("gone") is True)
        else:
            raise TransferError(f"unknown message {what!r} in a stream")
        return True, _reply(self._state, self._reason)

    def _start(self, message: dict[str, Any], fl_ctx: Any) -> None:
        stream, peer = message.get("stream"), message.get("peer")
        if type(stream) is not str or type(peer) is not str:
            raise TransferError("a stream begins with a malformed message")
        self._receiving = self._make(self._stream_ctx, fl_ctx.get_identity_name())
        cell = fl_ctx.get_engine().get_cell()
        abort = fl_ctx.get_run_abort_signal()

        def aborted() -> bool:
            return self._ended.is_set() or bool(abort is not None and abort.triggered)

        ask = asker(cell, peer, stream, message.get("secure") is True)
        arguments = (self._receiving, registry.of(cell), peer, ask, aborted)
        self._thread = threading.Thread(target=self._receive, args=arguments, name="rdma-stream", daemon=True)
        self._thread.start()

    def _receive(self, receiving: Receiving, channels: Any, peer: str, ask: Any, aborted: Callable[[], bool]) -> None:
        state, reason = "done", ""
        meter = Meter("received", self._fl_ctx.get_engine().get_cell().get_fqcn(), peer, receiving.kind)
        try:
            if channels is None:
                raise FabricError("this side has no data channels any more")
            meter.budget = channels.budget.watch()
            receiving.run(channels, peer, ask, aborted, meter)
            meter.end(*receiving.size)
        except (RdmaError, OSError, MemoryError) as error:
            state, reason = ("own" if receiving.may_come_otherwise(error) else "failed"), str(error)
        except Exception as error:
            log.exception("receiving a stream failed")
            state, reason = "failed", f"{type(error).__name__}: {error}"
        meter.end(failure=reason)
        self._state, self._reason = state, reason
        self._over.set()
        if not self._ended.wait(_LONELY_SECONDS):
            # The sender is gone, and nobody else ends the stream.
            code = ReturnCode.OK if state == "done" else ReturnCode.EXECUTION_EXCEPTION
            if state == "done":
                receiving.finish(self._stream_ctx)
            self._stream_ctx[StreamContextKey.END_STREAM](code, self._fl_ctx)

    def _end(self, gone: bool) -> Any:
        assert self._receiving is not None
        if gone or self._state == "own":
            self._receiving.dismiss()
        if self._state == "own":
            self._stream_ctx[_SILENT] = True
        elif self._state == "done":
            self._receiving.finish(self._stream_ctx)
        else:
            raise TransferError(self._reason or "its sender has ended the stream too early")
        return _reply(self._state, self._reason)

    def finalize(self, stream_ctx: dict[str, Any], fl_ctx: Any) -> None:
        """FLARE's: the stream is over, however it went."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._over.wait(_TURN_SECONDS)


def _reply(state: str, reason: str) -> Any:
    reply = make_reply(ReturnCode.OK)
    reply[KEY] = {"state": state, "reason": reason}
    return reply


class _Factory(ConsumerFactory):
    def __init__(self, make: Make) -> None:
        self._make = make

    def get_consumer(self, stream_ctx: dict[str, Any], fl_ctx: Any) -> ObjectConsumer:
        # As the application knows it.
        stream_ctx[StreamContextKey.CHANNEL] = str(stream_ctx.get(StreamContextKey.CHANNEL, "")).removeprefix(PREFIX)
        return _Consumer(stream_ctx, self._make)


def register(engine: Any, channel: str, topic: str, make: Make, callbacks: dict[str, Any]) -> None:
    """Take direct streams, besides FLARE's own. ``callbacks``: FLARE's, and what they get."""
    wrapped = {
        name: _unless_silent(value, position)
        for name, position in (("stream_done_cb", 0), ("consumed_cb", 1))
        if (value := callbacks.get(name)) is not None
    }
    engine.register_stream_processing(
        channel=PREFIX + channel, topic=topic, factory=_Factory(make), **{**callbacks, **wrapped}
    )


def _unless_silent(callback: Callable[..., Any], position: int) -> Callable[..., Any]:
    """``position``: of the stream's context among the arguments."""

    def told(*args: Any, **kwargs: Any) -> Any:
        return None if args[position].get(_SILENT) else callback(*args, **kwargs)

    told.__name__ = getattr(callback, "__name__", type(callback).__name__)
    return told
