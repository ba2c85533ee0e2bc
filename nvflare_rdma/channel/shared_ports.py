"""Ports that FLARE's connections come to and that other connections of this package may use, too."""

from __future__ import annotations

import socket
from collections import ChainMap
from collections.abc import Callable
from typing import TypeAlias

from nvflare_rdma.channel.door import MAGIC_BYTES, Door
from nvflare_rdma.channel.protocol import CONTROL_MAGIC
from nvflare_rdma.fabric import RAIL_MAGIC

#: As `Door.takers` has them: called with the socket, the seconds that are left for its greeting, and what frees its
#: place among the guests.
Taker: TypeAlias = Callable[[socket.socket, float, Callable[[], None]], None]


class SharedPorts:
    """The doors of a process that take more than what they were opened for.

    A taker is for connections that begin with its magic, in the clear, at every door that is shared or will be.
    """

    def __init__(self) -> None:
        self._takers: dict[bytes, Taker] = {}  # doors' threads look things up in it: no change has two steps

    def add_taker(self, magic: bytes, taker: Taker) -> None:
        """From now on `taker` gets what begins with `magic`, in place of whoever got it before.

        Raises:
            ValueError: no connection can begin with this magic, or it is the door's own.
        """
        if len(magic) != MAGIC_BYTES or magic in (CONTROL_MAGIC, RAIL_MAGIC):
            raise ValueError(
                f"{magic!r} can't be a taker's magic: it has {MAGIC_BYTES} bytes and is not the door's own"
            )
        self._takers[magic] = taker

    def remove_taker(self, magic: bytes) -> None:
        """From now on nobody gets what begins with `magic`. Idempotent."""
        self._takers.pop(magic, None)

    def share(self, door: Door) -> None:
        """From now on `door`, which does not serve yet, has the takers besides its own."""
        door.takers = ChainMap(door.takers, self._takers)
