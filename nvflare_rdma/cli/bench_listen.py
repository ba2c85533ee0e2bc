"""`nvflare-rdma bench --listen [HOST:]PORT`: be the other end of a bench, for one run after the other."""

from __future__ import annotations

import functools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare_rdma.channel import ControlStream, Link
from nvflare_rdma.cli.bench_link import MOST_MESSAGES, BenchExchange, bounds_of, usable_codecs
from nvflare_rdma.cli.bench_raw import MAGIC, RawDoor
from nvflare_rdma.cli.output import CommandError, Result
from nvflare_rdma.cli.peer_bodies import Room
from nvflare_rdma.cli.peer_kit import Side, this_side
from nvflare_rdma.cli.peer_link import Exchange, context_for
from nvflare_rdma.cli.peer_listen import Listening, listen_result
from nvflare_rdma.errors import ProtocolError

#: How long a link may take to say of which run it is.
_JOIN_SECONDS = 10.0
#: Of a run's key.
_RUN_BYTES = (16, 64)


def bench_listen_result(address: str, folder: Path | None, timeout: str, runs: int | None) -> Result:
    """Listen for other hosts' `bench --connect`. See `listen_result`."""
    if runs is not None and runs < 1:
        raise CommandError("INVALID_INPUT", f"--runs {runs} are none", "give 1 or more")
    return listen_result(address, folder, timeout, functools.partial(BenchListening, runs=runs))


class BenchListening(Listening):
    """Serves one run at a time, and `runs` in all if that is given. `only` is the key of the one run that there may
    be."""

    counterpart = "bench --connect"

    def __init__(self, side: Side, host: str, port: int, runs: int | None = None, only: str = "") -> None:
        self._runs_left, self._only = runs, only
        self._run: str = ""
        self._lead: Link | None = None
        self._run_lock = threading.Lock()
        self._chunk = 0
        self._bounds = bounds_of(side.settings)
        self.room = self._new_room()
        """See `Host.room`."""
        self._raw = RawDoor(self._bounds.message_bytes * MOST_MESSAGES)
        super().__init__(side, host, port)

    def __exit__(self, *error: object) -> None:
        self._raw.end()
        super().__exit__(*error)

    def _new_room(self) -> Room:
        return Room(self._bounds.message_bytes, self._bounds.at_once)

    @property
    def link_seconds(self) -> float:  # type: ignore[override]
        """See `Listening.link_seconds`: until nobody listens any more. A timer can't wait for ever."""
        return min(max(self.ending - time.monotonic(), 0.0), threading.TIMEOUT_MAX)

    def _takers(self) -> dict[bytes, Callable[[socket.socket, float, Callable[[], None]], None]]:
        return {MAGIC: self._raw.take}

    def _exchange(self, stream: ControlStream, sock: socket.socket, name: str) -> Exchange:
        runtime = self._side.runtime
        context = context_for(runtime.context, runtime.settings.rdma_fabrics, self._chunk or None)
        fabrics = runtime.fabrics(self._fabric, sock)
        made = BenchExchange(stream, fabrics, context, name, self._about, self._bounds)
        made.host = self
        # Who says nothing has no link for long.
        silent = threading.Timer(_JOIN_SECONDS, lambda: None if made.joined else made.link.close(0.0))
        silent.daemon = True
        silent.start()
        return made

    # -- runs ----------------------------------------------------------------------------------------------

    def join(self, run: Any, link: Link) -> str:
        """See `Host.join`. The first link of a run leads it: when that ends, the run is over."""
        if not isinstance(run, str) or not _RUN_BYTES[0] <= len(run) <= _RUN_BYTES[1]:
            raise ProtocolError("it does not say of which run it is, as `nvflare-rdma bench` does")
        if self._only and run != self._only:
            return "it is there for its own process only"
        with self._run_lock:
            if self._run and run != self._run:
                return "another run is going on there"
            if not self._run:
                if self._runs_left == 0:
                    return "it has had as many runs as it was to have"
                self._run, self._lead = run, link
                self.room = self._new_room()  # what another run has left half done may still be written
        return ""

    def use_chunk(self, nbytes: int) -> None:
        """See `Host.use_chunk`."""
        self._chunk = nbytes

    def raw_ticket(self) -> str:
        """See `Host.raw_ticket`."""
        return self._raw.ticket()

    def _note(self, exchange: Exchange, site: str, address: str) -> None:
        super()._note(exchange, site, address)
        with self._run_lock:
            if exchange.link is not self._lead:
                return
            self._run, self._lead, self._chunk = "", None, 0
            self._raw.end()
            if self._runs_left is not None:
                self._runs_left -= 1
                if self._runs_left == 0:
                    self.over.set()

    def _about(self, link: Link) -> dict[str, Any]:
        bench = {"message_bytes": self._bounds.message_bytes, "codecs": usable_codecs()}
        return {**super()._about(link), "bench": bench}


def serve_own_process() -> None:
    """Be the other end for the process that has started this one: it says what it wants as JSON on stdin, gets the port
    on stdout, and closes stdin when it is done."""
    asked = json.loads(sys.stdin.readline())
    side = this_side(None if asked["kit"] is None else Path(asked["kit"]))
    with BenchListening(side, "127.0.0.1", 0, only=asked["run"]) as listening:
        listening.ending = time.monotonic() + asked["seconds"]
        print(json.dumps({"port": listening.port}), flush=True)
        sys.stdin.read()
