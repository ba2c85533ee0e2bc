"""Moves bytes between two sockets, both ways, without looking at them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket

from nvflare_rdma.fabric import keep_alive

#: The most that is taken from one socket before it is given to the other.
_PIPE_BYTES = 256 * 1024
_BUFFER_BYTES = 64 * 1024
#: A pair in which nothing has moved for so long (milliseconds) keeps no memory and no pipes.
_IDLE_MS = 2000


def join(left: socket.socket, right: socket.socket, splice: bool = True) -> int:
    """Pass on what comes from each socket to the other, until both have ended or one has failed; close both. Returns
    how many bytes there were. The end of one direction is passed on, and the other goes on.

    The kernel moves them (splice(2)) where it can; `splice` is False where it is not to be tried.
    """
    flows = (_Flow(left, right, splice), _Flow(right, left, splice))
    try:
        for sock in (left, right):
            sock.setblocking(False)
            keep_alive(sock)
            with contextlib.suppress(OSError):  # no TCP
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # one of them is gone, and who waits for the other sees it end
            _run(flows)
        return sum(flow.moved for flow in flows)
    finally:
        for flow in flows:
            flow.close()
        left.close()
        right.close()


def _run(flows: tuple[_Flow, _Flow]) -> None:
    poll, watched = select.poll(), dict[int, int]()
    while True:
        wanted: dict[int, int] = {}
        for flow in flows:
            if (want := flow.wants()) is not None:
                wanted[want[0]] = wanted.get(want[0], 0) | want[1]
        if not wanted:
            return
        for number in watched.keys() - wanted.keys():  # else the end of one would be reported over and over
            poll.unregister(number)
        for number, events in wanted.items():
            if watched.get(number) != events:
                poll.register(number, events)
        watched = wanted
        ready = {number for number, _ in poll.poll(_IDLE_MS if any(flow.can_rest for flow in flows) else None)}
        for flow in flows:
            if (want := flow.wants()) is not None and want[0] in ready:
                flow.pump()
            elif not ready and flow.can_rest:
                flow.close()


class _Flow:
    """One direction. What was taken from the source is given to the target before more is taken, so a target that does
    not read holds up the source."""

    def __init__(self, source: socket.socket, target: socket.socket, splice: bool) -> None:
        self.moved = 0
        self._source, self._target = source, target
        self._splice = splice and hasattr(os, "splice")
        self._pipe: tuple[int, int] | None = None
        self._buffer: bytearray | None = None
        self._start = self._pending = 0
        self._ended = self._over = False

    @property
    def can_rest(self) -> bool:
        """Whether it has a pipe or a buffer and nothing in it."""
        return not self._pending and (self._pipe is not None or self._buffer is not None)

    def wants(self) -> tuple[int, int] | None:
        """The descriptor that it waits for, and what for; None when it is over."""
        if self._over:
            return None
        if self._pending:
            return self._target.fileno(), select.POLLOUT
        return self._source.fileno(), select.POLLIN

    def pump(self) -> None:
        """Move what can be moved now."""
        with contextlib.suppress(BlockingIOError, InterruptedError):
            if not self._pending and not self._over:
                self._take()
            while self._pending:
                self._give()
        if self._ended and not self._pending and not self._over:
            self._over = True
            with contextlib.suppress(OSError):  # it is gone already
                self._target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Give back pipe and buffer, with what is in them. It takes others when it needs them."""
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
        self._pipe = self._buffer = None

    def _take(self) -> None:
        if self._splice and self._pipe is None:
            self._open_pipe()
        if self._pipe is not None:
            try:
                flags = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
                self._pending = os.splice(self._source.fileno(), self._pipe[1], _PIPE_BYTES, flags=flags)
                self._ended = not self._pending
                return
            except (BlockingIOError, InterruptedError, ConnectionError, TimeoutError):
                raise
            except OSError:  # this kernel does not splice such sockets
                self._splice = False
                self.close()
        if self._buffer is None:
            self._buffer = bytearray(_BUFFER_BYTES)
        self._start, self._pending = 0, self._source.recv_into(self._buffer)
        self._ended = not self._pending

    def _give(self) -> None:
        if self._pipe is not None:
            flags = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
            sent = os.splice(self._pipe[0], self._target.fileno(), self._pending, flags=flags)
        else:
            assert self._buffer is not None
            with memoryview(self._buffer) as view:
                sent = self._target.send(view[self._start : self._start + self._pending])
        self._start += sent
        self._pending -= sent
        self.moved += sent

    def _open_pipe(self) -> None:
        try:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # too many descriptors: it goes without, this time
            return
        with contextlib.suppress(OSError, AttributeError):  # a user may have only so much memory in pipes
            fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
