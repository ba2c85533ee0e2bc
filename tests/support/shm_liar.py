"""The far end of an shm rail, held by a test that says what it likes over it."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from nvflare_rdma.fabric.shm import handshake
from nvflare_rdma.fabric.shm.endpoint import ShmEndpoint
from tests.support.recorder import Recorder
from tests.support.shm_peer import DEADLINE


@contextlib.contextmanager
def liar(receive, send):
    """An endpoint that has agreed on the paths with this test, which holds the other end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    events = Recorder()
    endpoint = ShmEndpoint(events)
    endpoint.attach(handshake.Peer(theirs, os.getpid(), receive, send, False), passive=False)
    ours.settimeout(DEADLINE)
    with ours:
        try:
            yield ours, endpoint, events
        finally:
            endpoint.close()


def message(op, notification=0, key=0, address=0, length=0, source=0, digest=0):
    return struct.pack("=IIQQQQQ", op, notification, key, address, length, source, digest)
