"""One-sided writes between two processes of one user on one host.

A write is a 48-byte message on a Unix socket (the one rail), and one copy of the bytes. Who copies depends on how
the receiving side can receive, which the two find out by trying when they meet (`handshake.agree`):

`direct`  the message says where the bytes are in the sender, and the receiver copies them from there into the
            exposed slice (process_vm_readv(2)). Any memory can receive, and only its owner ever writes it.
`memfd`   the receiver's memory comes from `ShmEndpoint.allocate`, which the sender maps too, and the sender
            copies before it sends the message. Memory from elsewhere costs a second copy, in the receiver.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import deque
from collections.abc import Mapping

import numpy as np

from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric.base import CompletionHandler, Endpoint, RemoteSlice
from nvflare_rdma.fabric.shm import handshake
from nvflare_rdma.fabric.shm.exposures import Exposures, ShmRegion
from nvflare_rdma.fabric.shm.process_memory import address_of, read_into
from nvflare_rdma.fabric.shm.reads import LARGE_BYTES, Read, Reads
from nvflare_rdma.fabric.shm.slots import PeerSlots, SlotOwner
from nvflare_rdma.fabric.shm.wire import ACKNOWLEDGE, FORGET, MAP, WRITE, Message, Wire
from nvflare_rdma.fabric.threads import join_threads
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

#: How long a write waits for the memory it goes to: the exposure may arrive before the descriptor does.
SLOT_TIMEOUT = 10.0

#: One copies a large write while another receives.
_RECEIVERS = 2


class ShmEndpoint(Endpoint):
    """One peer on this host, over one rail: a Unix socket for messages, and memory of either process."""

    def __init__(self, handler: CompletionHandler) -> None:
        self._handler = handler
        self._exposures = Exposures()
        self._unread: deque[tuple[int, memoryview]] = deque()  # direct writes that the peer has not acknowledged
        self._state = threading.Lock()
        self._wire: Wire  # as soon as there is a peer
        self._reads: Reads
        self._peer: handshake.Peer | None = None
        self._up = False
        self._closed = False
        self._reason: Exception | None = None
        self._peer_slots = PeerSlots()
        #: One receiver at a time receives: it has the turn.
        self._turn = threading.Condition()
        self._taken = False
        self._receivers: list[threading.Thread] = []
        self._active = 0  # those that have not left
        self._broken: Exception | None = None  # why they leave
        self.listener: handshake.ShmListener | None = None

    def attach(self, peer: handshake.Peer, passive: bool) -> None:
        """Open the rail on a connection whose set-up is over. Raises FabricError: this process is out of means."""
        with self._state, contextlib.ExitStack() as undo:
            undo.callback(peer.sock.close)
            undo.callback(peer.release)
            if self._closed or self._peer is not None:
                return
            try:
                # A receiver sends the greeting: when the peer gets it, everything here is in place.
                wire = self._wire = Wire(peer.sock, self._idle, handshake.READY if passive else b"")
                self._reads = Reads(lambda count, last: wire.post(Message(ACKNOWLEDGE, last, length=count)))
                if peer.receive == "memfd":
                    self._exposures.slots = SlotOwner(self._wire.share, self._wire.forget, self._wire.wake.set)
                self._peer, self._up = peer, True
                self._add_receiver()
            except (OSError, RuntimeError) as error:
                self._peer, self._up = None, False
                raise FabricError(f"can't open the shm rail: {error}") from error
            undo.pop_all()
        log.debug("shm to process %d: receives by %s, sends by %s", peer.pid, peer.receive, peer.send)

    @property
    def rails(self) -> int:
        """See `Endpoint.rails`."""
        return int(self._peer is not None)

    @property
    def paths(self) -> Mapping[str, str]:
        """`{"receive": ..., "send": ...}`, each "direct" or "memfd"; empty until the peer is here."""
        return {} if self._peer is None else {"receive": self._peer.receive, "send": self._peer.send}

    @property
    def write_is_nonblocking(self) -> bool:
        """See `Endpoint.write_is_nonblocking`."""
        return self.paths.get("send") == "direct"

    # -- receiving ---------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> memoryview | None:
        """See `Endpoint.allocate`. Raises MemoryError, or FabricError if the descriptors are used up."""
        slots = self._exposures.slots
        return slots.take(nbytes)[1] if slots is not None and self._up else None

    def register(self, buffer: memoryview) -> ShmRegion:
        """See `Endpoint.register`."""
        return self._exposures.register(buffer)

    def _receive(self) -> tuple[Message, Read]:
        """Take what comes, up to a large write, which another receiver need not wait for: it is for `_land`."""
        while True:
            message, fd = self._wire.receive()
            if message.op == WRITE:
                read = None
                if self.paths["receive"] == "direct":
                    read = self._reads.begin(message.notification, message.length)
                    if message.length >= LARGE_BYTES:
                        return message, read
                self._land(message, read)
            elif message.op == ACKNOWLEDGE:
                self._acknowledged(message.length, message.notification)
            elif message.op == MAP:
                self._peer_slots.add(message.key, message.length, fd)
            elif message.op == FORGET:
                self._peer_slots.forget(message.key)
            else:
                raise ProtocolError(f"the peer sent an unknown shm message ({message.op})")

    def _land(self, message: Message, read: Read | None) -> None:
        self._exposures.land(message, self._read)
        if read is not None:
            self._reads.end(read)
        self._handler.landed(message.notification, message.length, message.digest)

    def _idle(self) -> None:
        """The thread that receives is about to wait."""
        self._reads.flush()
        if self._exposures.slots is not None:
            self._exposures.slots.settle()

    def _read(self, address: int, target: memoryview) -> None:
        assert self._peer is not None
        read_into(self._peer.pid, address, target)
        # A sender that gives up closes the rail before it frees the source: then the copy may be garbage.
        if self._wire.peer_has_left():
            raise ConnectionError("the peer left while its memory was read")

    # -- sending -----------------------------------------------------------------------------------------------

    def write(self, rail: int, source: memoryview, remote: RemoteSlice, notification: int, digest: int) -> None:
        """See `Endpoint.write`."""
        if rail != 0:
            raise ValueError(f"shm has one rail, 0, not {rail}")
        if len(source) > remote.length:
            raise ValueError(f"a write of {len(source)} bytes does not fit a slice of {remote.length}")
        message = Message(WRITE, notification, remote.key, remote.address, len(source), 0, digest)
        if self.paths.get("send") == "direct":
            if len(source):
                message = message._replace(source=address_of(source))
            if self._tell(message, source):
                return
        elif self._up and self._place(source, remote):
            self._send(message)
        self._handler.written(notification)

    def _tell(self, message: Message, source: memoryview) -> bool:
        """Have the peer copy `source`; False if the rail is down. Any thread calls it, so it never waits."""
        try:
            with self._state:  # the peer acknowledges in the order in which it was told
                if self._up:
                    self._unread.append((message.notification, source))  # a receiver reports it
                    self._wire.post(message)
                return self._up
        except struct.error:
            self._stop(ProtocolError(f"the peer exposed a slice that can't be: {message}"))
            return True

    def _place(self, source: memoryview, remote: RemoteSlice) -> bool:
        if not len(source):
            return True
        try:
            slot = self._peer_slots.get(remote.key, SLOT_TIMEOUT)
            if not 0 <= remote.address <= slot.size - len(source):
                raise ProtocolError(f"the peer exposed a slice at {remote.address} of a slot of {slot.size} bytes")
        except (FabricError, ProtocolError) as error:
            self._stop(error)
            return False
        np.copyto(slot[remote.address : remote.address + len(source)], np.frombuffer(source, np.uint8))
        return True

    def _send(self, message: Message) -> None:
        try:
            self._wire.send(message)
        except struct.error:
            self._stop(ProtocolError(f"the peer exposed a slice that can't be: {message}"))
        except OSError as error:
            self._stop(FabricError(f"can't send: {error}"))

    def _acknowledged(self, count: int, last: int) -> None:
        if not 0 < count <= len(self._unread) or self._unread[count - 1][0] != last:
            raise ProtocolError(f"the peer acknowledged {count} writes up to {last}, which is not what was written")
        for _ in range(count):
            self._handler.written(self._unread.popleft()[0])

    # -- life --------------------------------------------------------------------------------------------------

    def _add_receiver(self) -> None:
        """Holds the state's lock. Raises RuntimeError: there are too many threads."""
        assert self._peer is not None
        thread = threading.Thread(target=self._run, name=f"rdma-shm-rx-{self._peer.pid}", daemon=True)
        thread.start()
        self._receivers.append(thread)
        self._active += 1

    def _share_work(self) -> None:
        """Have another thread receive while this one copies."""
        with self._state:
            if self._up and self._reason is None and not self._closed and len(self._receivers) < _RECEIVERS:
                try:
                    self._add_receiver()
                except RuntimeError as error:
                    log.debug("shm: one thread receives all: %s", error)

    def _run(self) -> None:
        try:
            while self._take_turn():
                try:
                    message, read = self._receive()
                finally:
                    self._pass_turn()
                self._share_work()
                self._land(message, read)
        except Exception as error:  # noqa: BLE001 - all of them end the rail, and are reported
            with self._state:
                self._up = False
                if self._broken is None or isinstance(error, ProtocolError):  # the other one may just have seen its end
                    self._broken = error
            self._wire.shut_down()
            with self._turn:
                self._turn.notify_all()
        with self._state:
            self._active -= 1
            last = not self._active
        if last:
            self._end()

    def _take_turn(self) -> bool:
        """False if the rail ends: whoever has the turn then may wait for the others' end."""
        with self._turn:
            self._turn.wait_for(lambda: not self._taken or self._ends)
            self._taken = self._taken or not self._ends
            return not self._ends

    def _pass_turn(self) -> None:
        with self._turn:
            self._taken = False
            self._turn.notify_all()

    @property
    def _ends(self) -> bool:
        return self._reason is not None or self._broken is not None

    def _end(self) -> None:
        """The last receiver's last act."""
        # Not where the error's traceback leads to, and no longer in this: it would not be freed.
        error, self._broken = self._reason or self._broken, None
        assert self._peer is not None
        assert error is not None
        try:
            self._wire.close()
            self._peer_slots.close()
            self._exposures.close()
            self._peer.release()
            while self._unread:
                self._handler.written(self._unread.popleft()[0])
        except Exception:
            log.exception("the shm rail to process %d did not end in order", self._peer.pid)  # but it ends
        if self._closed:
            return
        if isinstance(error, ProtocolError):
            self._handler.failed(error)
        else:
            self._handler.rail_down(0, FabricError(f"the shm rail to process {self._peer.pid} broke: {error}"))

    def _stop(self, reason: Exception) -> None:
        with self._state:
            if self._peer is None:
                return
            self._reason = self._reason or reason
        self._wire.shut_down()
        with self._turn:
            self._turn.notify_all()

    def drop(self, rail: int) -> None:
        """See `Endpoint.drop`."""
        if rail != 0:
            raise ValueError(f"shm has one rail, 0, not {rail}")
        self._stop(FabricError("the peer gave it up"))

    def close(self) -> None:
        """See `Endpoint.close`."""
        with self._state:
            self._closed = True
            receivers = list(self._receivers)
        if self.listener is not None:
            self.listener.close()
        self._stop(FabricError("closed"))
        join_threads(receivers, 5.0)
        self._exposures.close()
