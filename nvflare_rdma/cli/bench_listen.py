"""`nvflare-rdma bench --listen [HOST:]PORT`: be the other end of a bench, for one run after the other."""

from __future__ import annotations

import functools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
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
#: How long a run may neither ask nor move anything, and how many links it has at once.
_IDLE_SECONDS, _MOST_MEMBERS = 60.0, 4
#: Of a run's key.
_RUN_BYTES = (16, 64)


def bench_listen_result(address: str, folder: Path | None, timeout: str, runs: int | None) -> Result:
    """Listen for other hosts' `bench --connect`. See `listen_result`."""
    if runs is not None and runs < 1:
        raise CommandError("INVALID_INPUT", f"--runs {runs} are none", "give 1 or more")
    return listen_result(address, folder, timeout, functools.partial(BenchListening, runs=runs))


@dataclass(eq=False)
class _Run:
    """One run. `moved_bytes` is what links have moved that are members no more; `raw_before` what plain connections had
    before it. `seen` is how far it was when it was looked at, and `moved_at` when that was last something new."""

    key: str
    lead: BenchExchange
    raw_before: int
    members: set[BenchExchange] = field(default_factory=set)
    moved_bytes: int = 0
    chunk: int = 0
    seen: object = None
    moved_at: float = field(default_factory=time.monotonic)


class BenchListening(Listening):
    """Serves one run at a time, and `runs` in all that move something, if that is given. `only` is the key of the one
    run that there may be."""

    counterpart = "bench --connect"

    def __init__(self, side: Side, host: str, port: int, runs: int | None = None, only: str = "") -> None:
        self._runs_left, self._only = runs, only
        self._measured = 0
        self._present: _Run | None = None
        self._run_lock = threading.Lock()
        self._closed = threading.Event()
        self._bounds = bounds_of(side.settings)
        # One for all runs: the links of one that is over may hold some for a moment, while the next one goes on.
        self._room = Room(self._bounds.message_bytes, self._bounds.at_once)
        self._raw = RawDoor(self._bounds.message_bytes * MOST_MESSAGES)
        super().__init__(side, host, port)
        threading.Thread(target=self._watch, name="rdma-bench-watch", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._raw.end()
        super().__exit__(*error)

    @property
    def was_of_use(self) -> bool:
        """See `Listening.was_of_use`: whether anything was measured."""
        return self._measured > 0

    @property
    def link_seconds(self) -> float:  # type: ignore[override]
        """See `Listening.link_seconds`: until nobody listens any more. A timer can't wait for ever."""
        return min(max(self.ending - time.monotonic(), 0.0), threading.TIMEOUT_MAX)

    def _takers(self) -> dict[bytes, Callable[[socket.socket, float, Callable[[], None]], None]]:
        return {MAGIC: self._raw.take}

    def _exchange(self, stream: ControlStream, sock: socket.socket, name: str) -> Exchange:
        runtime, present = self._side.runtime, self._present
        chunk = present.chunk if present is not None else 0
        context = context_for(runtime.context, runtime.settings.rdma_fabrics, chunk or None)
        fabrics = runtime.fabrics(self._fabric, sock)
        made = BenchExchange(stream, fabrics, context, name, self._about, self._bounds)
        made.host, made.room = self, self._room
        return made

    def _attend(self, exchange: Exchange, site: str, address: str, waits: ExitStack) -> None:
        """See `Listening._attend`. A link waits until it has joined the present run, so others can't take its places;
        one that does not join, or is told that it can't, is not there for long."""
        assert isinstance(exchange, BenchExchange)
        exchange.waits = waits
        link = exchange.link
        silent = threading.Timer(_JOIN_SECONDS, lambda: None if exchange.run is not None else link.close(0.0))
        silent.daemon = True
        silent.start()
        try:
            self._run(exchange, site, address)
        finally:
            silent.cancel()
            with self._run_lock:  # `join` may call it as well
                waits.close()

    # -- runs ----------------------------------------------------------------------------------------------

    def join(self, key: Any, exchange: BenchExchange) -> str:
        """See `Host.join`. The first link of a run leads it: when that ends, the run is over."""
        if not isinstance(key, str) or not _RUN_BYTES[0] <= len(key) <= _RUN_BYTES[1]:
            raise ProtocolError("it does not say of which run it is, as `nvflare-rdma bench` does")
        if self._only and key != self._only:
            return "it is there for its own process only"
        with self._run_lock:
            run = self._present
            if exchange.run is not None and exchange.run is not run:
                raise ProtocolError("it asks for something after its run is over")
            if run is not None and key != run.key:
                return "another run is going on there"
            if run is None:
                if self._runs_left == 0:
                    return "it has had as many runs as it was to have"
                run = self._present = _Run(key, exchange, self._raw.moved_bytes)
            if exchange.run is None:
                if len(run.members) >= _MOST_MEMBERS:
                    return f"this run has {_MOST_MEMBERS} links already, which is the most"
                run.members.add(exchange)
                exchange.run = run
                if exchange.waits is not None:
                    exchange.waits.close()
        return ""

    def is_member(self, exchange: BenchExchange) -> bool:
        """See `Host.is_member`."""
        with self._run_lock:
            return exchange.run is not None and exchange.run is self._present

    def use_chunk(self, nbytes: int) -> None:
        """See `Host.use_chunk`."""
        with self._run_lock:
            if self._present is not None:
                self._present.chunk = nbytes

    def raw_ticket(self, exchange: BenchExchange) -> str | None:
        """See `Host.raw_ticket`."""
        with self._run_lock:  # a run that is over has given back its tickets
            return self._raw.ticket() if exchange.run is self._present else None

    def _note(self, exchange: Exchange, site: str, address: str) -> None:
        assert isinstance(exchange, BenchExchange)
        with self._run_lock:  # for all of it: where a link is told of that led a run, another run may begin
            super()._note(exchange, site, address)
            run = self._present
            if run is None or exchange not in run.members:
                return
            run.members.discard(exchange)
            run.moved_bytes += exchange.received_bytes + exchange.sent_bytes
            if run.lead is not exchange:
                return
            self._end_locked(run)
        self._close_links(run)

    def _end_locked(self, run: _Run) -> None:
        """A run is over. It counts if it has moved anything."""
        moved = run.moved_bytes + self._raw.moved_bytes - run.raw_before
        moved += sum(each.received_bytes + each.sent_bytes for each in run.members)
        self._raw.end()
        if moved:
            self._measured += 1
            if self._runs_left is not None:
                self._runs_left -= 1
                if self._runs_left == 0:
                    self.over.set()
        self._present = None  # last: who sees that it is over finds it counted

    @staticmethod
    def _close_links(run: _Run) -> None:
        """Those of a run that is over, which gets no others."""
        for each in run.members:
            each.link.close(0.0)

    def _watch(self) -> None:
        """End runs that don't go on, which others would wait for."""
        while not self._closed.wait(_IDLE_SECONDS / 20):
            with self._run_lock:
                if (run := self._present) is None:
                    continue
                now = time.monotonic()
                seen = self._raw.moved_bytes, {each: each.progress() for each in run.members}
                if seen != run.seen:
                    run.seen, run.moved_at = seen, now
                if now - run.moved_at < _IDLE_SECONDS:
                    continue
            print(
                f"a run is ended, as nothing was asked and nothing was moved for {_IDLE_SECONDS:g} s",
                file=sys.stderr,
                flush=True,
            )
            with self._run_lock:
                if run is not self._present:
                    continue
                self._end_locked(run)
            self._close_links(run)

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
