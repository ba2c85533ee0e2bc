"""`nvflare-rdma bench`: what links carry between two processes of this host, or between two hosts, beside plain TCP."""

from __future__ import annotations

import functools
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare_rdma.cli.bench_link import EXACT, MOST_MESSAGES, BenchExchange, Used, bounds_of, used
from nvflare_rdma.cli.bench_process import own_process
from nvflare_rdma.cli.bench_raw import MOST_CONNECTIONS, RawPeer
from nvflare_rdma.cli.bench_report import MIB, RAW, Asked, BenchReport, Figure, Steps
from nvflare_rdma.cli.output import ENVIRONMENT, CommandError
from nvflare_rdma.cli.peer_kit import Side, this_side
from nvflare_rdma.cli.peer_link import ANSWER_SECONDS, BUSY, Exchange
from nvflare_rdma.cli.peer_listen import name_of, parse_peer, versions
from nvflare_rdma.cli.peer_reach import Running, Way, as_told
from nvflare_rdma.errors import RdmaError
from nvflare_rdma.logs import escaped


def bench(address: str | None, folder: Path | None, asked: Asked, seconds: float, steps: Steps) -> BenchReport:
    """Measure the way to `address`, where `bench --listen` runs; or between two processes of this host if it is None.

    Raises:
        CommandError: the peer can't be reached, or does not let this side in.
    """
    ending = time.monotonic() + seconds
    side = this_side(folder)
    _check(asked, side)
    run = secrets.token_hex(16)
    if address is not None:
        host, port = parse_peer(address, "--connect")
        return _Bench(Way(side, host, port, "bench"), port, run, asked, ending, steps).run()
    with own_process(folder, run, ending) as port:
        return _Bench(Way(side, "127.0.0.1", port, "bench"), port, run, asked, ending, steps).run()


def _check(asked: Asked, side: Side) -> None:
    """Raises CommandError: this side can't do what was asked for."""
    unavailable = side.runtime.context.unavailable
    for name in asked.fabrics:
        if reason := unavailable.get(name, "") or ("" if name in side.settings.rdma_fabrics else "not in rdma_fabrics"):
            raise CommandError("NO_FABRIC", f"--fabrics {name} can't be used here: {reason}", "leave it out")
    most = bounds_of(side.settings).message_bytes * MOST_MESSAGES
    if max(asked.sizes) > most:
        text = f"--sizes {max(asked.sizes) // MIB}: {most // MIB} MiB are the most with this side's memory budget"
        raise CommandError("INVALID_INPUT", text, "name a smaller size, or raise rdma_memory_budget_bytes")


class _OutOfTimeError(CommandError):
    """The next measurement would not be over in time."""

    def __init__(self, text: str) -> None:
        super().__init__("TIMED_OUT", text, "give it a longer --timeout", ENVIRONMENT)


class _LeadGoneError(Exception):
    """The link that leads the run has ended, and the run with it."""


class _Bench:
    def __init__(self, way: Way, port: int, run: str, asked: Asked, ending: float, steps: Steps) -> None:
        self._run, self._asked, self._ending, self._steps = run, asked, ending, steps
        self._way, self._side, self._port = way, way.side, port
        self._bounds = bounds_of(way.side.settings)

    def run(self) -> BenchReport:
        self._way.resolve()
        lead, stream, address = self._open(self._side.settings.rdma_fabrics)
        with Running(lead):
            about = self._about(lead)
            self._lead, self._address = lead, (address, self._port)
            self._report = report = BenchReport(
                peer=self._way.where,
                same_host=bool(lead.link.fabric == "shm" or address.startswith("127.") or address == "::1"),
                secure=stream.secure,
                site=self._side.name,
                peer_site=name_of(stream),
                versions=versions(),
                peer_versions=_texts(about.get("versions")),
            )
            try:
                report.round_trip_seconds = lead.round_trip(self._most(ANSWER_SECONDS))
                self._measure(about)
            except (OSError, RdmaError, _LeadGoneError) as error:
                if not report.figures:
                    text = f"{self._way.where}: the bench broke off: {error}"
                    raise CommandError("BENCH_BROKE_OFF", text, "see what the listener says, and try again") from error
                report.broke_off = str(error)
        return report

    def _measure(self, about: dict[str, Any]) -> None:
        cases = list(self._cases(about))
        sizes, codecs = len(self._asked.sizes), len(self._asked.codecs)
        self._steps.begin(2 * self._asked.repeat * sizes * (1 + len(cases) * codecs))
        self._measure_raw(1)
        for fabric, order, rails, chunk in cases:
            self._measure_link(fabric, order, rails, chunk)
        most = max((each.rails for each in self._report.figures if each.fabric == "tcp"), default=1)
        if most > 1:
            self._steps.begin(2 * self._asked.repeat * sizes)
            self._measure_raw(min(most, MOST_CONNECTIONS))

    def _most(self, seconds: float) -> float:
        """So many seconds, or those that are left. Raises _OutOfTimeError: there are none."""
        if (left := self._ending - time.monotonic()) <= 0:
            raise _OutOfTimeError("0 s of --timeout are left")
        return min(seconds, left)

    def _open(
        self, order: tuple[str, ...], rails: int | None = None, chunk: int | None = None
    ) -> tuple[BenchExchange, Any, str]:
        make = functools.partial(BenchExchange, bounds=self._bounds)
        exchange, stream, address = self._way.open(order, make, rails, chunk, self._most(float("inf")))
        assert isinstance(exchange, BenchExchange)
        return exchange, stream, address

    def _about(self, exchange: Exchange) -> dict[str, Any]:
        about = self._way.first_answer(exchange, most_seconds=self._most(ANSWER_SECONDS), run=self._run)
        match about.get("bench"):
            case {"message_bytes": int(most), "codecs": list(codecs)} if most >= 4:
                self._bounds = replace(self._bounds, message_bytes=min(self._bounds.message_bytes, most))
                exchange.bounds = self._bounds
            case _:
                text = f"{self._way.where} listens for `doctor --peer`, and not for `bench --connect`"
                raise CommandError("NOT_A_PEER", text, "run `nvflare-rdma bench --listen` there")
        if unknown := [name for name in self._asked.codecs if name != EXACT and name not in codecs]:
            text = f"{self._way.where} has no codec {unknown[0]!r}"
            raise CommandError("NO_CODEC", text, "install the same nvflare-rdma on both sides")
        if max(self._asked.sizes) > (most := self._bounds.message_bytes * MOST_MESSAGES):
            text = f"{self._way.where} moves no more than {most // MIB} MiB at once, by its memory budget"
            raise CommandError("TOO_MUCH", text, "name smaller --sizes, or raise rdma_memory_budget_bytes there")
        return about

    def _cases(self, about: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], int | None, int | None]]:
        for name in self._asked.fabrics or self._side.settings.rdma_fabrics:
            order = self._way.order_for(name, about)
            if isinstance(order, str):
                self._report.left_out.append(f"{name}: {order}")
                continue
            for rails in self._asked.rails if name == "tcp" else (None,):
                for chunk in self._asked.chunks:
                    yield name, order, rails, chunk

    # -- one kind of link ----------------------------------------------------------------------------------

    def _measure_link(self, fabric: str, order: tuple[str, ...], rails: int | None, chunk: int | None) -> None:
        codecs = self._asked.codecs
        while codecs:
            codecs = self._measure_codecs(fabric, order, rails, chunk, codecs)

    def _measure_codecs(
        self, fabric: str, order: tuple[str, ...], rails: int | None, chunk: int | None, codecs: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Measure codecs over one link. Where one breaks off, those after it are returned, which need another link:
        over this one something may still be on its way."""
        what = f"{fabric}{f', {rails} rails' if rails else ''}{f', chunks of {chunk // 1024} KiB' if chunk else ''}"
        rest = what if codecs == self._asked.codecs else f"{what}, {', '.join(codecs)}"
        try:
            self._ask_lead("use", chunk=chunk or 0)
            exchange, _, _ = self._open(order, rails, chunk)
        except CommandError as error:
            self._leave_out(rest, self._way.without(error))
            return ()
        with Running(exchange):
            if exchange.link.fabric != fabric:
                reason = escaped(exchange.link.passed_over).removeprefix(f"{fabric}: ")
                self._leave_out(rest, reason)
                return ()
            try:
                self._way.first_answer(exchange, most_seconds=self._most(ANSWER_SECONDS), run=self._run)
            except CommandError as error:
                self._leave_out(rest, self._way.without(error))
                return ()
            for number, codec in enumerate(codecs):
                name = "" if codec == EXACT else codec

                def move(to_peer: bool, size: int, left: float, name: str = name) -> float:
                    return exchange.move(to_peer, size, name, left)

                def add(found: dict[str, Any], codec: str = codec) -> None:
                    kind: dict[str, Any] = {"fabric": fabric, "most_rails": rails, "chunk_bytes": chunk, "codec": codec}
                    self._report.figures.append(Figure(**kind, rails=exchange.link.rails, **found))

                if not self._sizes(f"{what}, {codec}", move, add):
                    return codecs[number + 1 :]
        return ()

    def _measure_raw(self, connections: int) -> None:
        try:
            tickets = [self._ticket() for _ in range(connections)]
            raw = RawPeer(self._address, tickets, self._most(float("inf")))
        except (CommandError, OSError, ValueError) as error:
            self._leave_out(RAW, self._way.without(error) if isinstance(error, CommandError) else str(error))
            return

        def add(found: dict[str, Any]) -> None:
            kind: dict[str, Any] = {"fabric": RAW, "most_rails": connections, "chunk_bytes": None, "codec": EXACT}
            self._report.figures.append(Figure(**kind, rails=connections, **found))

        try:
            self._sizes(f"{RAW}, {connections} connections", raw.move, add)
        finally:
            raw.close()

    def _ticket(self) -> str:
        answer = self._ask_lead("raw")
        if reason := as_told(answer.get(BUSY)):
            raise CommandError("BUSY", reason)
        return as_told(answer.get("ticket"))

    def _sizes(self, what: str, move: Any, add: Callable[[dict[str, Any]], None]) -> bool:
        """Add the figures of all sizes, the smallest first. What would not be over in time is left out, and what comes
        after something that fails. Returns whether `move` can be used any further."""
        rates: dict[bool, float] = {}
        sizes = sorted(self._asked.sizes)
        for number, size in enumerate(sizes):
            rest = f"{what}, {', '.join(str(each // MIB) for each in sizes[number:])} MiB"
            try:
                if not number:  # once for slow starts, and for what is compiled
                    for to_peer in (True, False):
                        self._one(move, to_peer, min(size, self._bounds.message_bytes), rates)
                add(self._one_size(what, move, size, rates))
            except CommandError as error:  # it would take too long, or the peer does not say what it has used
                self._leave_out(rest, self._way.without(error))
                return True
            except (OSError, RdmaError) as error:
                self._leave_out(rest, str(error))
                return False
        return True

    def _one_size(self, what: str, move: Any, size: int, rates: dict[bool, float]) -> dict[str, Any]:
        took: dict[bool, list[float]] = {True: [], False: []}
        before, peer_before = used(), self._peer_used()
        for _ in range(self._asked.repeat):
            for to_peer in (True, False):
                self._steps.step(f"{what}, {size // MIB} MiB {'to' if to_peer else 'from'} the peer")
                took[to_peer].append(self._one(move, to_peer, size, rates))
        after, peer_after = used(), self._peer_used()
        giga = 2 * self._asked.repeat * size / 1e9
        return {
            "size_bytes": size,
            "repeat": self._asked.repeat,
            "to_peer": size / statistics.median(took[True]),
            "from_peer": size / statistics.median(took[False]),
            "cpu_seconds": (after.cpu_seconds - before.cpu_seconds) / giga,
            "peer_cpu_seconds": (peer_after.cpu_seconds - peer_before.cpu_seconds) / giga,
            "peak_bytes": after.peak_bytes,
            "peer_peak_bytes": peer_after.peak_bytes,
        }

    def _one(self, move: Any, to_peer: bool, size: int, rates: dict[bool, float]) -> float:
        left = self._ending - time.monotonic()
        if left <= 0 or size / rates.get(to_peer, float("inf")) > left:
            takes = f"it would take {size / rates[to_peer]:.3g} s, and " if to_peer in rates else ""
            raise _OutOfTimeError(f"{takes}{max(left, 0):.0f} s of --timeout are left")
        seconds = float(move(to_peer, size, left))
        rates[to_peer] = size / seconds
        return seconds

    def _peer_used(self) -> Used:
        match self._ask_lead("used"):
            case {"cpu_seconds": float(cpu), "peak_bytes": int(peak)} if 0 <= cpu < 1e9 and 0 <= peak < 1 << 50:
                return Used(cpu, peak)
        raise CommandError(
            "NOT_A_PEER", f"{self._way.where} does not say what it has used", "install the same on both sides"
        )

    def _ask_lead(self, what: str, **fields: Any) -> dict[str, Any]:
        """The answer of the peer over the link that leads the run.

        Raises:
            CommandError: there is none in time. _LeadGoneError: there will be none any more.
        """
        try:
            return self._lead.ask(what, self._most(ANSWER_SECONDS), **fields)
        except (OSError, RdmaError) as error:
            if not self._lead.link.usable:
                raise _LeadGoneError(f"{self._way.where}: {error}") from error
            text = f"{self._way.where}: the peer does not answer: {error}"
            raise CommandError("BENCH_BROKE_OFF", text, "see what the listener says") from error

    def _leave_out(self, what: str, why: str) -> None:
        self._report.left_out.append(f"{what}: {why}")


def _texts(told: Any) -> dict[str, str]:
    return {as_told(key): as_told(value) for key, value in list(told.items())[:10]} if isinstance(told, dict) else {}
