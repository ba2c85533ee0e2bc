"""A machine on which nearly all ports that the kernel may choose from are in use."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

CHOSEN_FROM = Path("/proc/sys/net/ipv4/ip_local_port_range")
COUNT = 16


@contextlib.contextmanager
def crowded_ports(address: str) -> Iterator[contextlib.ExitStack]:
    """TCP sockets have all but one, at ``address``, of the ports that the kernel may choose from, until the stack or
    the block ends. It changes the machine."""
    before = CHOSEN_FROM.read_text()
    # Connections that are over keep their ports for a minute: each time a range in which there are none.
    sockets = next(found for first in range(20000, 30000, COUNT) if (found := _hold(address, first)))
    first = sockets[0].getsockname()[1]
    sockets.pop().close()
    with contextlib.ExitStack() as others:
        for each in sockets:
            others.enter_context(each)
        CHOSEN_FROM.write_text(f"{first} {first + COUNT - 1}")
        try:
            yield others
        finally:
            CHOSEN_FROM.write_text(before)


def _hold(address: str, first: int) -> list[socket.socket]:
    """A socket on each port from ``first`` on; none at all if one of them is in use."""
    sockets: list[socket.socket] = []
    try:
        for port in range(first, first + COUNT):
            sockets.append(socket.socket())
            sockets[-1].bind((address, port))
    except OSError:
        while sockets:
            sockets.pop().close()
    return sockets
