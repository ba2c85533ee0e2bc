"""How two processes of one user on one host meet: the offer, the checks, and what each direction can use.

The passive side listens on an abstract Unix socket (unix(7): a name, no file, gone with its process) and gives out
the name with a ticket that works once. Then both sides find out, by trying, how each can receive: see `agree`.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import logging
import os
import re
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.shm.process_memory import (
    TRACER,
    address_of,
    check_sealed,
    map_shared,
    read_into,
    sealed_memory,
)
from nvflare_rdma.fabric.shm.wire import Wake
from nvflare_rdma.logs import Seldom, get_logger

log = get_logger(__name__)
#: Of all listeners of the process: there is a new one for each link that opens.
_strangers = Seldom()

MAGIC = b"NVFSHM1\n"
TICKET_BYTES = 32
OFFER_LIFETIME = 30.0
SETUP_TIMEOUT = 10.0
"""Seconds that all messages of the set-up may take: a peer that is slow with each of them gains nothing."""
#: How a side may receive, best first.
PATHS = ("direct", "memfd")

#: Of abstract sockets, with a secret of 16 bytes behind it. An offer with another name would send this side to a
#: socket of another program.
_NAME_PREFIX, _NAME = "nvflare-rdma-", re.compile(r"nvflare-rdma-[0-9a-f]{32}")
_TOKEN_BYTES = 32
_HELLO = struct.Struct(f"=Q{_TOKEN_BYTES}s")
_ADMITTED, _REFUSED = b"admitted", b"refused"
#: The passive side's last word in the set-up: from now on it takes messages.
READY = b"ready"
_YES, _NO, _FORBIDDEN = b"yes", b"no", b"forbidden"
_CREDENTIALS = struct.Struct("=iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that has been let in. `receive` and `send` name this side's paths."""

    sock: socket.socket
    pid: int
    receive: str
    send: str
    traced: bool
    """The peer was declared this process's tracer."""

    def release(self) -> None:
        """At the end of the connection."""
        if self.traced:
            TRACER.release()


def peer_pid(sock: socket.socket) -> int:
    """The process at the other end, as the kernel reports it (SO_PEERCRED). FabricError if it is a stranger."""
    size = _CREDENTIALS.size
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid != os.geteuid():
        raise FabricError(
            f"the shm peer runs as user {uid}, this process as {os.geteuid()}: run both as one user, or use tcp"
        )
    if pid == 0:
        raise FabricError(
            "the shm peer is in another PID namespace: let the containers share one (docker run --pid), or use tcp"
        )
    return int(pid)


class _Steps:
    """The messages of a set-up on `sock`. Who waits for one of them waits until the deadline for all."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._deadline = time.monotonic() + SETUP_TIMEOUT

    def next(self) -> socket.socket:
        """The socket, for one message.

        Raises:
            TimeoutError: the time is up.
        """
        if (left := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)
        return self.sock


def _receive(steps: _Steps) -> bytes:
    data = steps.next().recv(64)
    if not data:
        raise ConnectionError("the peer closed the connection")
    return data


def agree(steps: _Steps, pid: int, paths: Sequence[str]) -> Peer:
    """Both sides call it at once; in each step both send one message, then take the other's.

    1. The address and the contents of a token; the peer tries to read it.
    2. Whether that worked. If it was forbidden, Yama may be the reason, so:
    3. a side that may not be read declares the peer its tracer, if it can; the peer tries again.
    4. The path that this side wants to receive by, with a memfd if it is that; the peer writes into it.
    5. Whether that worked.

    Raises:
        FabricError: a side can receive by none of the paths it allows. OSError: the peer left, or took too long.
    """

    def exchange(message: bytes) -> bytes:
        steps.next().send(message)
        return _receive(steps)

    token = secrets.token_bytes(_TOKEN_BYTES)
    try:
        address, expected = _HELLO.unpack(exchange(_HELLO.pack(address_of(memoryview(token)), token)))
    except struct.error as error:
        raise ProtocolError("the shm peer's greeting is malformed") from error
    readable, reason = _NO, "not wanted"
    if "direct" in paths:
        readable, reason = _try_reading(pid, address, expected)
    traced = exchange(readable) == _FORBIDDEN and TRACER.allow(pid)
    peer = None
    try:
        declared = exchange(_YES if traced else _NO) == _YES
        if readable == _FORBIDDEN and declared:
            readable, reason = _try_reading(pid, address, expected)
        receive = "direct" if readable == _YES else "memfd" if "memfd" in paths else "none"
        send, worked = _try_memory(steps, receive, token, expected)
        if receive == "none":
            raise FabricError(f"this side allows only {', '.join(paths)} over shm, and that fails: {reason}")
        if worked != _YES:
            raise FabricError("the shm peer has no way to receive that works; its log says why. Use tcp.")
        peer = Peer(steps.sock, pid, receive, send, traced and send == "direct")
        return peer
    finally:
        if traced and not (peer and peer.traced):
            TRACER.release()


def _try_reading(pid: int, address: int, expected: bytes) -> tuple[bytes, str]:
    copy = bytearray(len(expected))
    try:
        read_into(pid, address, memoryview(copy))
    except PermissionError as error:
        return _FORBIDDEN, f"{error} (Yama's ptrace_scope, the container's seccomp profile or capabilities)"
    except OSError as error:
        return _NO, str(error)
    return (_YES, "") if copy == expected else (_NO, f"process {pid} is not the peer: another PID namespace")


def _try_memory(steps: _Steps, receive: str, token: bytes, expected: bytes) -> tuple[str, bytes]:
    """Steps 4 and 5: give the peer a memfd if this side needs one, and write into the peer's; its wish, and
    whether that worked. This side's memfd worked if its own token is in it afterwards."""
    sample = None
    rights: list[tuple[int, int, array.array[int]]] = []
    fd = -1
    try:
        if receive == "memfd":
            try:
                fd = sealed_memory(_TOKEN_BYTES)
                sample = map_shared(fd, _TOKEN_BYTES)
            except (OSError, MemoryError) as error:
                raise FabricError(f"this process can't share memory (memfd_create): {error}. Use tcp.") from error
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        steps.next().sendmsg([receive.encode()], rights)
    finally:
        if fd >= 0:
            os.close(fd)
    data, fds, _, _ = socket.recv_fds(steps.next(), 64, 1, socket.MSG_CMSG_CLOEXEC)
    worked = _YES if data == b"direct" else _NO
    try:
        if data == b"memfd" and fds:
            check_sealed(fds[0], _TOKEN_BYTES)
            map_shared(fds[0], _TOKEN_BYTES)[:] = np.frombuffer(expected, np.uint8)
            worked = _YES
    except (ValueError, MemoryError) as error:
        log.warning("the memory that the shm peer shares can't be written: %s", error)
    finally:
        for number in fds:
            os.close(number)
    steps.next().send(worked)
    answer = _receive(steps)
    if sample is not None and (answer != _YES or sample.tobytes() != token):
        raise FabricError("the shm peer can't write into a memfd of this process; its log says why. Use tcp.")
    return data.decode("ascii", "replace"), worked


class ShmListener:
    """Waits on an abstract socket, in a thread of its own, until one peer has shown the ticket or time is up."""

    def __init__(self, paths: Sequence[str], arrived: Callable[[Peer], None], lifetime: float) -> None:
        self._paths = paths
        self._arrived = arrived
        self._deadline = time.monotonic() + lifetime
        self._name = f"{_NAME_PREFIX}{secrets.token_hex(16)}"
        self._ticket = secrets.token_bytes(TICKET_BYTES)
        self._lock = threading.Lock()
        self._closed = False
        self._wake = Wake()
        self._guest: socket.socket | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind(f"\0{self._name}")
            self._socket.listen(4)
            self._socket.setblocking(False)
        except OSError as error:
            self._socket.close()
            raise FabricError(f"can't listen on an abstract Unix socket: {error}") from error
        self._thread = threading.Thread(target=self._run, name="rdma-shm-accept", daemon=True)
        self._thread.start()

    @property
    def offer(self) -> Mapping[str, Any]:
        """What the peer needs to connect (msgpack types)."""
        return {"name": self._name, "ticket": self._ticket}

    def close(self) -> None:
        """Stop waiting. Idempotent."""
        with self._lock:
            self._closed = True
            self._wake.set()
            if self._guest is not None:
                with contextlib.suppress(OSError):
                    self._guest.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=SETUP_TIMEOUT)

    def _run(self) -> None:
        try:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            while not self._closed and (remaining := self._deadline - time.monotonic()) > 0:
                if not poll.poll(remaining * 1000) or self._closed:
                    return
                with self._lock:
                    try:
                        self._guest, _ = self._socket.accept()
                    except BlockingIOError:
                        continue  # it has gone again
                if self._receive_guest(self._guest):
                    return
        except Exception as error:  # noqa: BLE001 - the peer hears of it by the socket that is closed
            log.warning("the shm listener broke, and the peer will find nobody there: %r", error)
        finally:
            self._socket.close()
            with self._lock:
                self._guest = None
            del self._arrived  # no reference cycle with the endpoint

    def _receive_guest(self, sock: socket.socket) -> bool:
        """Let a connection in; False: it was not the peer, go on waiting."""
        knew_ticket, steps = False, _Steps(sock)
        try:
            pid = peer_pid(sock)  # abstract sockets have no permissions: before anything is read
            if not hmac.compare_digest(steps.next().recv(256), MAGIC + self._ticket):
                sock.send(_REFUSED)
                raise FabricError(f"process {pid} presented a wrong ticket")
            knew_ticket = True
            self._socket.close()  # the ticket is used up
            sock.send(_ADMITTED)
            self._arrived(agree(steps, pid, self._paths))
        except Exception as error:  # noqa: BLE001 - whatever it is, the guest is not to wait
            # Any process of this host can come, and again and again: it is to be seen, and not to fill the log.
            level = logging.WARNING if knew_ticket else _strangers.level(logging.WARNING)
            log.log(level, "a shm connection was refused: %s", str(error) or repr(error))
            sock.close()
        return knew_ticket


def dial(offer: Mapping[str, Any], paths: Sequence[str]) -> Peer:
    """Connect to a `ShmListener`. The peer takes messages when this returns.

    Raises:
        ProtocolError: `offer` is malformed. FabricError: nobody listens there, it refuses, or no path works.
    """
    name, ticket = offer.get("name"), offer.get("ticket")
    named = isinstance(name, str) and _NAME.fullmatch(name)
    if not named or not isinstance(ticket, bytes) or len(ticket) != TICKET_BYTES:
        raise ProtocolError("the peer's shm offer has no socket name and ticket")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    steps = _Steps(sock)
    try:
        try:
            steps.next().connect(f"\0{name}")
        except OSError as error:
            raise FabricError(
                f"nobody listens on the peer's socket @{name} ({error}): the offer was used or has expired, or the "
                "peer is on another host or in a container with another network. Use tcp, or share the network."
            ) from error
        pid = peer_pid(sock)
        try:
            sock.send(MAGIC + ticket)
            if _receive(steps) != _ADMITTED:
                raise FabricError("the shm peer refused the ticket (it is used up or has expired)")
            peer = agree(steps, pid, paths)
            try:
                if _receive(steps) != READY:
                    raise ProtocolError("the shm peer's set-up ended with something else than it should")
            except BaseException:
                peer.release()
                raise
        except TimeoutError as error:
            raise FabricError(f"the shm peer (process {pid}) did not answer within {SETUP_TIMEOUT:g} s") from error
        except ConnectionError as error:
            raise FabricError(f"the shm peer (process {pid}) left during the set-up: {error}; see its log") from error
        return peer
    except BaseException:
        sock.close()
        raise
