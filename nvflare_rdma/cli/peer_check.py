"""`nvflare-rdma doctor --peer HOST:PORT`: whether and how well another host is reached, which runs `doctor --listen`.

What goes between the two is a job's: the door, TLS with the sites' certificates, links, fabrics and rails of
`nvflare_rdma.channel`. `peer_text` prints what is found.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare_rdma.cli.output import CommandError
from nvflare_rdma.cli.peer_kit import Side, this_side
from nvflare_rdma.cli.peer_link import Exchange, Goodput
from nvflare_rdma.cli.peer_listen import MOST_PORTS, name_of, parse_peer, versions
from nvflare_rdma.cli.peer_reach import Running, Way, as_list, as_told
from nvflare_rdma.errors import RdmaError
from nvflare_rdma.fabric import connect_tcp
from nvflare_rdma.logs import escaped

REACHED, REFUSED, SILENT = "reached", "refused", "no answer"
_PORT_SECONDS, _PORTS_AT_ONCE = 3.0, 16


@dataclass(frozen=True)
class FabricCheck:
    """What one fabric carries between the two hosts, in both directions; the reason if nothing."""

    usable: bool
    reason: str
    to_peer: Goodput | None = None
    from_peer: Goodput | None = None


@dataclass(frozen=True)
class PortCheck:
    """A port of the peer, and whether this host gets there.

    Attributes:
        what: what it is for.
        open: whether the peer's check listens there; if not, FLARE does, or nobody.
        state: `REACHED`, `REFUSED`, `SILENT`, or an error.
    """

    port: int
    what: str
    open: bool
    state: str


@dataclass(kw_only=True)
class PeerReport:
    """What a check has found.

    Attributes:
        peer: as it was named.
        address: where it was reached.
        secure: whether both sides have shown certificates.
        site, peer_site: the names in them.
        connect_seconds: what it took to connect, TLS included.
        round_trip_seconds: from a small message to its answer, the median.
        fabric: which one a job's link would have; "control" for none.
        way: the same, with what protects it.
        passed_over: why there is none better, as this side sees it; and as the peer does.
        fabrics: what each carries.
        ports: what the firewall lets through.
        peer_data_ports: its `rdma_data_ports`.
        versions, peer_versions: what runs on both sides.
        problems: what keeps a job's link from working well, each with what to do.
    """

    peer: str
    address: str
    secure: bool
    site: str
    peer_site: str
    connect_seconds: float
    round_trip_seconds: float = 0.0
    fabric: str = ""
    way: str = ""
    passed_over: str = ""
    peer_passed_over: str = ""
    fabrics: dict[str, FabricCheck] = field(default_factory=dict)
    ports: list[PortCheck] = field(default_factory=list)
    peer_data_ports: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    peer_versions: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def examine_peer(address: str, folder: Path | None) -> PeerReport:
    """Look at the way to another host. It takes a few seconds for each fabric.

    Raises:
        CommandError: the peer can't be reached, or does not let this side in.
    """
    host, port = parse_peer(address)
    return _Check(this_side(folder), host, port).run()


class _Check:
    def __init__(self, side: Side, host: str, port: int) -> None:
        self._side = side
        self._way = Way(side, host, port, "doctor")

    def run(self) -> PeerReport:
        began = time.monotonic()
        self._way.resolve()
        exchange, stream, address = self._way.open(self._side.settings.rdma_fabrics)
        report = PeerReport(
            peer=self._way.where,
            address=address,
            secure=stream.secure,
            site=self._side.name,
            peer_site=name_of(stream),
            connect_seconds=time.monotonic() - began,
            versions=versions(),
        )
        with Running(exchange):
            about = self._way.first_answer(exchange)
            report.fabric, report.way = exchange.link.fabric, exchange.link.way
            report.passed_over = escaped(exchange.link.passed_over)
            _read_about(report, about)
            report.round_trip_seconds = self._told(exchange.round_trip)
            if exchange.link.fabric == "control":
                text = f"no rail could be opened, so data would go over the control stream: {report.passed_over}"
                report.problems.append(text)
            measured = _measure(exchange)
            if not measured.usable:
                report.problems.append(f"{report.fabric}, which a job's link would take: {measured.reason}")
        for name in self._side.runtime.context.unavailable:
            if name == report.fabric:
                report.fabrics[name] = measured
            else:
                report.fabrics[name] = self._look_at(name, about)
        report.ports = _try_ports(report.address, _ports(about))
        report.problems += _port_problems(report.ports, report.address)
        return report

    def _told(self, what: Any) -> Any:
        """What a call gives; if it fails, say so as a command does."""
        try:
            return what()
        except (OSError, RdmaError) as error:
            raise CommandError("CHECK_BROKE_OFF", f"{self._way.where}: the check broke off: {error}", "") from error

    def _look_at(self, name: str, about: dict[str, Any]) -> FabricCheck:
        """What another fabric than the chosen one carries."""
        order = self._way.order_for(name, about)
        if isinstance(order, str):
            return FabricCheck(False, order)
        try:
            exchange, _, _ = self._way.open(order)
        except CommandError as error:
            return FabricCheck(False, self._way.without(error))
        with Running(exchange):
            if exchange.link.fabric != name:
                return FabricCheck(False, escaped(exchange.link.passed_over).removeprefix(f"{name}: "))
            return _measure(exchange)


def _measure(exchange: Exchange) -> FabricCheck:
    found: list[Goodput] = []
    try:
        for to_peer in (True, False):
            found.append(exchange.goodput(to_peer))
    except (OSError, RdmaError) as error:
        direction = "from it" if found else "to the peer"
        return FabricCheck(False, f"it opens, but data does not get {direction}: {error}", *found)
    return FabricCheck(True, "", *found)


# -- what the peer says ------------------------------------------------------------------------------------


def _read_about(report: PeerReport, about: dict[str, Any]) -> None:
    told = about.get("versions")
    if isinstance(told, dict):
        report.peer_versions = {as_told(k): as_told(v) for k, v in list(told.items())[:10]}
    report.peer_passed_over = as_told(about.get("passed_over"))
    report.peer_data_ports = as_told(about.get("data_ports"))
    for package in ("nvflare-rdma", "nvflare"):
        ours, theirs = report.versions.get(package, ""), report.peer_versions.get(package, "")
        if ours != theirs:
            report.problems.append(
                f"{package} is {ours or 'missing'} here and {theirs or 'missing'} there: install the same on both sides"
            )


def _ports(about: dict[str, Any]) -> Iterable[tuple[int, str, bool]]:
    for entry in as_list(about.get("ports"))[: MOST_PORTS + 8]:
        match entry:
            case {"port": int(port), "what": str(what), "open": bool(is_open)} if 0 < port < 65536:
                yield port, as_told(what), is_open


# -- ports -------------------------------------------------------------------------------------------------


def _try_ports(host: str, ports: Iterable[tuple[int, str, bool]]) -> list[PortCheck]:
    with concurrent.futures.ThreadPoolExecutor(_PORTS_AT_ONCE) as pool:
        tried = [(entry, pool.submit(_try_port, host, entry[0])) for entry in ports]
    return [PortCheck(port, what, is_open, state.result()) for (port, what, is_open), state in tried]


def _try_port(host: str, port: int) -> str:
    try:
        connect_tcp((host, port), _PORT_SECONDS).close()
    except ConnectionRefusedError:
        return REFUSED
    except TimeoutError:
        return SILENT
    except OSError as error:
        return error.strerror or str(error)
    return REACHED


def _port_problems(ports: list[PortCheck], address: str) -> Iterable[str]:
    """What keeps a job from the peer's ports. Where the peer does not listen now, a refusal says nothing."""
    closed = [each for each in ports if each.state != REACHED and (each.open or each.state != REFUSED)]
    for state in dict.fromkeys(each.state for each in closed):
        which = as_ranges([each.port for each in closed if each.state == state])
        why = "a firewall drops what is sent there" if state == SILENT else "a firewall refuses it"
        yield f"TCP {which} of {address}: {state}: {why}; let this host through to it"


def as_ranges(ports: list[int]) -> str:
    """Numbers for people: "8002, 20000-20010"."""
    runs: list[list[int]] = []
    for port in sorted(set(ports)):
        if runs and port == runs[-1][-1] + 1:
            runs[-1].append(port)
        else:
            runs.append([port])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
