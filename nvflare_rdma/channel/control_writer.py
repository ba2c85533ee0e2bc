"""Sends what a link has to say on its control stream: at once if that is little, else by a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.errors import TransferError
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

_SEND_NOW_BYTES = 128 * 1024
#: A peer that reads nothing while it has much answered ends its link. Inline messages do not count, which the window of
#: their sender bounds; chunks are a few.
_MOST_WAITING_BYTES = 16 * 1024 * 1024
#: Batches that wait for the control stream when the next chunk is put behind them.
_DATA_AHEAD = 2


class ControlWriter:
    """The writer of one link's control stream. What ends in `_locked` is called under the link's lock, which is that of
    `room`; `room` is notified when something was sent. `closing` says whether the link is about to end."""

    def __init__(
        self, stream: ControlStream, room: threading.Condition, closing: Callable[[], bool], name: str
    ) -> None:
        self.unsent = 0
        """Batches that the thread has not sent yet."""
        self.inline_bytes = 0
        """Bytes of inline messages among them."""
        self.failure = ""
        """Why the stream could not be written; "" if it could."""
        self.thread = threading.Thread(target=self._run, name=f"rdma-control-{name}", daemon=True)
        self._stream = stream
        self._room = room
        self._closing = closing
        self._name = name
        #: Control messages, or what of them is ready for the socket, and how many bytes are inline messages; None ends
        #: the thread. It has only what could not be sent at once.
        self._batches: queue.SimpleQueue[tuple[list[bytes] | bytes, int] | None] = queue.SimpleQueue()
        self._progress_at = time.monotonic()
        self._waiting_bytes = 0

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread when it has sent what is queued, and wait for that, but not longer than `timeout` seconds."""
        self._batches.put(None)
        if self.thread is not threading.current_thread() and self.thread.is_alive():
            self.thread.join(timeout)

    def send_locked(self, output: list[bytes], inline_bytes: int) -> None:
        """Send control messages, after those before them; `inline_bytes` of them are inline messages."""
        if not self.unsent and sum(map(len, output)) <= _SEND_NOW_BYTES:
            # A hand-over to the thread costs more than the few bytes of a grant do.
            with self._closing_broken_stream():
                if rest := self._stream.send_now(self._stream.protect(output)):
                    self._queue_locked(rest, inline_bytes)
        else:
            self._queue_locked(output, inline_bytes)

    def _queue_locked(self, output: list[bytes] | bytes, inline_bytes: int) -> None:
        if not self.unsent:
            self._progress_at = time.monotonic()
        nbytes = _control_bytes(output, inline_bytes)
        if self._waiting_bytes + nbytes > _MOST_WAITING_BYTES:
            raise TransferError(
                f"the peer does not read what it causes: {self._waiting_bytes} bytes wait on the control stream"
            )
        self.inline_bytes += inline_bytes
        self._waiting_bytes += nbytes
        self.unsent += 1
        self._batches.put((output, inline_bytes))

    def wait_for_turn_locked(self) -> None:
        """Wait until a chunk may be queued: each is a copy, so there are no more of them than keep the thread busy."""
        self._room.wait_for(lambda: self.unsent < _DATA_AHEAD or self._closing())

    def check_locked(self, now: float, timeout: float) -> None:
        """Raise TransferError if something is queued and nothing was sent for `timeout` seconds."""
        if self.unsent > 0 and now - self._progress_at > timeout:
            raise TransferError(f"the peer has read nothing of the control stream for {timeout:g} s")

    def _run(self) -> None:
        with self._closing_broken_stream():
            while (batch := self._batches.get()) is not None:
                output, inline_bytes = batch
                self._stream.send(output if isinstance(output, bytes) else self._stream.protect(output))
                with self._room:
                    self.inline_bytes -= inline_bytes
                    self._waiting_bytes -= _control_bytes(output, inline_bytes)
                    self.unsent -= 1
                    self._progress_at = time.monotonic()
                    self._room.notify_all()
                del batch, output  # up to a chunk, which would stay while nothing is sent

    @contextlib.contextmanager
    def _closing_broken_stream(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, a part of a message may be gone
            if not self._closing():
                # The reader ends the link; wake it in case it does not see the same. It then sees a closed socket only.
                self.failure = self.failure or str(error)
                level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
                log.log(level, "%s: the control stream can't be written, and is closed: %r", self._name, error)
                with contextlib.suppress(OSError):
                    self._stream.close()


def _control_bytes(output: list[bytes] | bytes, inline_bytes: int) -> int:
    """How many bytes of a batch, or of what is left of it, are not this side's inline messages."""
    return max((len(output) if isinstance(output, bytes) else sum(map(len, output))) - inline_bytes, 0)
