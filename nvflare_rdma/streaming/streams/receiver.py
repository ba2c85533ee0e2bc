"""The receiving half of FLARE's streams over links: see `sender`."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from nvflare.apis.shareable import ReturnCode, make_reply
from nvflare.apis.streaming import ConsumerFactory, ObjectConsumer, StreamContextKey

from nvflare_rdma.errors import FabricError, RdmaError, TransferError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.identity import name_in_certificate
from nvflare_rdma.streaming.requests import stream_request_function
from nvflare_rdma.streaming.streams.messages import KEY, PREFIX, Said, prepare_to_read
from nvflare_rdma.transfer import Meter, PeerLinks

log = get_logger(__name__)

_SILENT = PREFIX + "silent"  # in a receiver's stream context: FLARE's stream follows on the fallback, or came before
#: A receiver's state that asks for the fallback, as messages have it.
FALLBACK = "own"
#: How long a receiver waits for its data to come before it answers that it is still coming; if there is a place to wait
#: for its sender's site (`SitePlaces`), as this is a thread of FLARE's.
TURN_SECONDS = 2.0
#: A receiver whose own part is over takes its sender for gone if it is silent for so long, or for so many of the
#: sender's turns if that is longer: it waits for the slowest of its targets.
SENDER_SILENCE_SECONDS, _SILENCE_TURNS = 120.0, 4
_LOOK_SECONDS = 1.0
#: So many strangers in a stream are in the log.
_REFUSALS_SAID = 8
#: Also of what a sender may ask for: whoever is gone is not waited for.
_MAX_TIMEOUT = 3600.0


class Receiving(ABC):
    """Receives one stream's object. It is made when the stream starts, from the stream's context.

    `kind` is that of its `TransferRecord`; `size` tells how many items and bytes have arrived.

    Raises:
        RdmaError: the context is malformed.
    """

    kind: str
    size: tuple[int, int]

    def take(self, what: Any) -> None:
        """Take what came with a message."""
        raise TransferError("nothing is expected with messages")

    @abstractmethod
    def run(
        self,
        links: PeerLinks,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        aborted: Callable[[], bool],
        meter: Meter,
    ) -> None:
        """Receive the object.

        Raises:
            RdmaError, OSError, MemoryError: it did not come, or can't be stored.
        """

    def finish(self, stream_ctx: dict[str, Any]) -> None:
        """Make the object known: everything is here."""
        return

    def undo(self) -> None:
        """Undo what `finish` did: everything is here, but the stream has ended with an error."""
        return

    @abstractmethod
    def may_fall_back(self, error: Exception) -> bool:
        """Whether the fallback is worth a try after `error`."""

    def dismiss(self) -> None:
        """Remove what is left: the object will not come in this way, now or later."""
        return


#: Makes what receives a stream, from the stream's context, this site's name, and the sender's site.
Make: TypeAlias = Callable[[dict[str, Any], str, str], Receiving]


class _Consumer(ObjectConsumer):
    def __init__(self, stream_ctx: dict[str, Any], make: Make) -> None:
        self._stream_ctx = stream_ctx
        self._make = make
        self._fl_ctx: Any = None
        self._peer = ""
        self._receiving: Receiving | None = None
        self._state, self._reason = "running", ""
        self._lock = threading.Lock()  # for these, and:
        self._failed = False
        self._ended, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = False
        self._place = contextlib.ExitStack()  # of the streams of its sender's site
        #: Other cells that have sent messages in this stream, as far as the log has them.
        self._refused: set[str] = set()
        self._heard_at, self._patience = time.monotonic(), SENDER_SILENCE_SECONDS

    def consume(self, shareable: Any, stream_ctx: dict[str, Any], fl_ctx: Any) -> tuple[bool, Any]:
        """Answer a message of the sender; FLARE calls this."""
        said = shareable.get(KEY)
        if self._begun and not (isinstance(said, Said) and said.cell == self._peer):
            return True, self._refuse(said)
        self._fl_ctx, self._heard_at = fl_ctx, time.monotonic()
        words = said.words if isinstance(said, Said) else said
        what = words.get("do") if isinstance(words, dict) else None
        if self._begun:
            return self._answer(what, words)
        if what == "hello":
            return False, self._greet(stream_ctx, fl_ctx)
        if what != "start":
            raise TransferError(f"a stream begins with {what!r}")
        if not isinstance(said, Said) or not said.cell:
            raise TransferError("a stream begins with a message that FLARE does not say the sender of")
        self._start(said, fl_ctx)
        return True, _reply(self._state, self._reason)

    def _refuse(self, said: Any) -> Any:
        """Answer a message of another cell than the stream's sender, who goes on."""
        cell = said.cell if isinstance(said, Said) else ""
        if cell not in self._refused and len(self._refused) < _REFUSALS_SAID:
            self._refused.add(cell)
            log.warning("%r has sent a message in a stream of %s, and is refused", cell or "nobody", self._peer)
        return _reply("failed", "this is the stream of another cell")

    def _greet(self, stream_ctx: dict[str, Any], fl_ctx: Any) -> Any:
        stream_ctx[_SILENT] = True
        cell = fl_ctx.get_engine().get_cell()
        ready = shared().links.of(cell) is not None
        reason = "" if ready else "it has no links (RdmaTransfer is not running)"
        reply = make_reply(ReturnCode.OK)
        # FLARE's simulator answers from another cell of the server's process than the one that will ask.
        reply[KEY] = Said({"state": "ready" if ready else FALLBACK, "reason": reason, "cell": cell.get_fqcn()})
        return reply

    def _answer(self, what: Any, words: dict[str, Any]) -> tuple[bool, Any]:
        if what == "more":
            assert self._receiving is not None
            if self._state == "running":
                self._receiving.take(words.get("what"))
        elif what == "wait":
            self._wait()
        elif what == "end":
            return False, self._end(words.get("gone") is True)
        else:
            raise TransferError(f"unknown message {what!r} in a stream")
        return True, _reply(self._state, self._reason)

    def _wait(self) -> None:
        with shared().waiting_places.place(self._peer) as free:
            if free:
                self._over.wait(TURN_SECONDS)

    def _start(self, said: Said, fl_ctx: Any) -> None:
        message, peer, stream = said.words, said.cell, said.words.get("stream")
        if type(stream) is not str:
            raise TransferError("a stream begins with a malformed message")
        timeout: Any = message.get("timeout")
        number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not number or not 0 < timeout <= _MAX_TIMEOUT:
            raise TransferError(f"a stream begins with a timeout of {timeout!r} s")
        self._patience = max(SENDER_SILENCE_SECONDS, _SILENCE_TURNS * timeout)
        cell = fl_ctx.get_engine().get_cell()
        self._receiving = self._make(self._stream_ctx, fl_ctx.get_identity_name(), name_in_certificate(cell, peer))
        abort = fl_ctx.get_run_abort_signal()

        def aborted() -> bool:
            return self._ended.is_set() or bool(abort is not None and abort.triggered)

        ask = stream_request_function(cell, peer, stream, message.get("secure") is True)
        arguments = (self._receiving, shared().links.of(cell), peer, ask, aborted)
        self._peer, self._begun = peer, True
        if not self._place.enter_context(shared().stream_places.place(peer)):
            self._place.close()
            self._state, self._reason = FALLBACK, "too many streams of this site are being received"
            self._over.set()
            return
        self._thread = threading.Thread(target=self._receive, args=arguments, name="rdma-stream", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._place.close()
            raise

    def _receive(self, *arguments: Any) -> None:
        with self._place:
            self._receive_and_wait(*arguments)

    def _receive_and_wait(
        self, receiving: Receiving, links: Any, peer: str, ask: Any, aborted: Callable[[], bool]
    ) -> None:
        state, reason = "failed", "receiving it broke, and this side's log says how"
        try:
            state, reason = self._run(receiving, links, peer, ask, aborted)
        except Exception:
            log.exception("receiving a stream from %s failed, and its sender is told so", peer)
        finally:  # the sender asks until it is not "running"
            with self._lock:
                self._state, self._reason = state, reason
                self._undo_if_failed()
            self._over.set()
        if self._sender_is_silent():
            # The sender is gone, and nobody else ends the stream.
            code = ReturnCode.OK if state == "done" else ReturnCode.EXECUTION_EXCEPTION
            if state == "done":
                receiving.finish(self._stream_ctx)
            self._stream_ctx[StreamContextKey.END_STREAM](code, self._fl_ctx)

    def _run(
        self, receiving: Receiving, links: Any, peer: str, ask: Any, aborted: Callable[[], bool]
    ) -> tuple[str, str]:
        """Receive the object, and give the state that it ends in, and the reason."""
        state, reason = "done", ""
        name = self._fl_ctx.get_engine().get_cell().get_fqcn()
        meter = Meter("received", name, peer, receiving.kind, shared().ledger)
        try:
            if links is None:
                raise FabricError("this side has no links any more")
            meter.budget = links.budget.watch()
            receiving.run(links, peer, ask, aborted, meter)
            meter.end(*receiving.size)
        except (RdmaError, OSError, MemoryError) as error:
            state, reason = (FALLBACK if receiving.may_fall_back(error) else "failed"), str(error)
        except Exception as error:
            log.exception("receiving a stream from %s failed, and its sender is told so", peer)
            state, reason = "failed", f"{type(error).__name__}: {error}"
        meter.end(failure=reason)
        return state, reason

    def _sender_is_silent(self) -> bool:
        """Whether the sender falls silent before the stream ends."""
        while not self._ended.wait(_LOOK_SECONDS):
            if time.monotonic() - self._heard_at > self._patience:
                return True
        return False

    def _end(self, gone: bool) -> Any:
        assert self._receiving is not None
        if gone or self._state == FALLBACK:
            self._receiving.dismiss()
        if self._state == FALLBACK:
            self._stream_ctx[_SILENT] = True
        elif self._state == "done":
            self._receiving.finish(self._stream_ctx)
        else:
            raise TransferError(self._reason or "its sender has ended the stream too early")
        return _reply(self._state, self._reason)

    def finalize(self, stream_ctx: dict[str, Any], fl_ctx: Any) -> None:
        """End: FLARE calls this when the stream is over, however it went."""
        self._ended.set()
        with self._lock:
            self._failed = stream_ctx.get(StreamContextKey.RC) != ReturnCode.OK
            self._undo_if_failed()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._wait()

    def _undo_if_failed(self) -> None:
        """Undo what was received if its stream has failed, whichever of the two comes last."""
        if self._failed and self._state == "done" and self._receiving is not None:
            self._receiving.undo()


def _reply(state: str, reason: str) -> Any:
    reply = make_reply(ReturnCode.OK)
    reply[KEY] = {"state": state, "reason": reason}
    return reply


class _Factory(ConsumerFactory):
    def __init__(self, make: Make) -> None:
        self._make = make

    def get_consumer(self, stream_ctx: dict[str, Any], fl_ctx: Any) -> ObjectConsumer:
        """Make what answers a stream's messages; FLARE calls this."""
        # The application knows the channel by this name.
        stream_ctx[StreamContextKey.CHANNEL] = str(stream_ctx.get(StreamContextKey.CHANNEL, "")).removeprefix(PREFIX)
        return _Consumer(stream_ctx, self._make)


def register(engine: Any, channel: str, topic: str, make: Make, callbacks: dict[str, Any]) -> None:
    """Receive streams over links, besides those of FLARE's way. `callbacks` has FLARE's, and what they get."""
    prepare_to_read()
    wrapped = {
        name: _unless_silent(value, position)
        for name, position in (("stream_done_cb", 0), ("consumed_cb", 1))
        if (value := callbacks.get(name)) is not None
    }
    engine.register_stream_processing(
        channel=PREFIX + channel, topic=topic, factory=_Factory(make), **{**callbacks, **wrapped}
    )


def _unless_silent(callback: Callable[..., Any], position: int) -> Callable[..., Any]:
    """Wrap a callback, which has the stream's context at `position` of its arguments."""

    def told(*args: Any, **kwargs: Any) -> Any:
        return None if args[position].get(_SILENT) else callback(*args, **kwargs)

    told.__name__ = getattr(callback, "__name__", type(callback).__name__)
    return told
