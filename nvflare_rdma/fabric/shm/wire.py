"""The messages between two shm endpoints: 48 bytes each on a Unix socket of type SOCK_SEQPACKET.

That type keeps messages whole (unix(7)), so two threads can send without a lock around a send that blocks, and a
descriptor (SCM_RIGHTS) belongs to one message.

No deadlock through full sockets: who receives never waits to send. What it and `Wire.post` can't send at
once waits in a backlog, and who receives goes on receiving until the socket takes it. So the peer's
sends end, hence somebody there is never far from receiving, and so on. The backlog is bounded by what the
two sides may do: one acknowledgement per exposure, two messages per slot, and one per direct write.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from nvflare_rdma.errors import ProtocolError

WRITE, ACKNOWLEDGE, MAP, FORGET = 1, 2, 3, 4
_FORMAT = struct.Struct("=IIQQQQQ")  # one host: native byte order
_ONE_FD = socket.CMSG_SPACE(array.array("i").itemsize)


class Message(NamedTuple):
    """`WRITE` uses all fields; `source` is where the bytes are in the sender (0 if they are in place already).
    `ACKNOWLEDGE` says that `length` writes were read, the last of them being `notification`.
    `MAP` (with a descriptor) and `FORGET` name a slot by `key`; `MAP` gives its size as `length`."""

    op: int
    notification: int = 0
    key: int = 0
    address: int = 0
    length: int = 0
    source: int = 0
    digest: int = 0


def _nothing() -> None:
    pass


class Wake:
    """Ends another thread's poll. Takes no lock, so a finaliser may call it wherever it happens to run.

    The descriptor lives as long as the object: a finaliser that comes late must not write to a re-used number.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._process = os.getpid()

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._fd

    def set(self) -> None:
        """End the poll, or the next one. Not from a forked process, whose copies of what is finalised are its own."""
        if self._process == os.getpid():
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Take back what `set` did."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def __del__(self) -> None:
        os.close(self._fd)


class Wire:
    """The socket of a rail, for messages and descriptors. `idle` is called by the thread that receives whenever there
    is nothing more, and after `wake`; `greeting` is sent first."""

    def __init__(self, sock: socket.socket, idle: Callable[[], None], greeting: bytes = b"") -> None:
        sock.settimeout(None)
        self._sock = sock
        self._idle = idle
        self.wake = Wake()
        self._sending = threading.Lock()
        self._backlog_lock = threading.Lock()
        self._backlog: deque[tuple[bytes, int]] = deque([(greeting, -1)] if greeting else [])
        self._poll = select.poll()
        self._poll.register(self.wake, select.POLLIN)

    def send(self, message: Message) -> None:
        """Send from a thread that may wait while the socket is full. Raises OSError if the rail is down,
        struct.error if a field is out of range."""
        data = _FORMAT.pack(*message)
        with self._sending:
            self._sock.send(data)

    def post(self, message: Message, fd: int = -1) -> None:
        """Send now or soon; never waits. Takes `fd` over. A rail that is down is noticed by `receive`."""
        with self._backlog_lock:
            self._backlog.append((_FORMAT.pack(*message), fd))
            self._send_backlog()
            if self._backlog:
                self.wake.set()

    def share(self, key: int, nbytes: int, fd: int) -> None:
        """Give the peer a slot; closes `fd`."""
        self.post(Message(MAP, key=key, length=nbytes), fd)

    def forget(self, key: int) -> None:
        """Have the peer unmap a slot."""
        self.post(Message(FORGET, key=key))

    def receive(self) -> tuple[Message, int]:
        """The next message, with a descriptor or -1. One thread at a time calls it.

        Raises:
            ConnectionError: the peer is gone. ProtocolError: that was no message.
        """
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    _FORMAT.size, _ONE_FD, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                self._wait()
                continue
            fds = array.array("i")
            for _, _, content in ancillary:
                fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
            if not data:
                raise ConnectionError("the peer closed it or has ended")
            whole = len(data) == _FORMAT.size and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            message = Message(*_FORMAT.unpack(data)) if whole else Message(0)
            if not whole or len(fds) != (message.op == MAP):
                for fd in fds:
                    os.close(fd)
                raise ProtocolError(f"the peer sent a broken shm message ({len(data)} bytes, {len(fds)} descriptors)")
            return message, fds[0] if fds else -1

    def _wait(self) -> None:
        self._idle()
        with self._backlog_lock:
            self._send_backlog()
            self._poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._backlog else 0))
        if any(fd == self.wake.fileno() for fd, _ in self._poll.poll()):
            self.wake.clear()

    def _send_backlog(self) -> None:
        """Holds the backlog's lock."""
        while self._backlog:
            data, fd = self._backlog[0]
            try:
                if fd < 0:
                    self._sock.send(data, socket.MSG_DONTWAIT)
                else:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                    self._sock.sendmsg([data], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                # The peer is gone, or holds too many descriptors of ours (ETOOMANYREFS): the rail is of no use.
                self.shut_down()
            self._backlog.popleft()
            if fd >= 0:
                os.close(fd)

    def peer_has_left(self) -> bool:
        """Whether the peer has shut the rail down (it may free its memory then)."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def shut_down(self) -> None:
        """End the rail: `receive` and every `send` that waits raise. Callable from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the descriptors. Called when nobody receives any more."""
        self.shut_down()
        with self._sending, self._backlog_lock:  # a send that waits has been ended by the shutdown
            self._sock.close()
            for _, fd in self._backlog:
                if fd >= 0:
                    os.close(fd)
            self._backlog.clear()
        self._idle = _nothing  # no reference cycle: what it holds is freed without a garbage collection
