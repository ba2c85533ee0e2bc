"""`nvflare-rdma doctor --peer HOST:PORT`: whether and how well another host is reached, which runs `doctor --listen`.

What goes between the two is a job's: the door, TLS with the sites' certificates, links, fabrics and rails of
`nvflare_rdma.channel`. `peer_text` prints what is found.
"""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare_rdma.channel import GREETING_TIMEOUT, ControlStream, Pending, dial
from nvflare_rdma.cli.output import ENVIRONMENT, CommandError
from nvflare_rdma.cli.peer_kit import Side, this_side
from nvflare_rdma.cli.peer_link import BUSY, Exchange, Goodput, context_for
from nvflare_rdma.cli.peer_listen import MOST_PORTS, name_of, parse_peer, versions
from nvflare_rdma.errors import ConfigError, FabricUnavailable, ProtocolError, RdmaError, TlsError
from nvflare_rdma.fabric import connect_tcp, join_address, plain_host
from nvflare_rdma.logs import escaped

REACHED, REFUSED, SILENT = "reached", "refused", "no answer"
#: To connect, TLS included: as long as a job gives an address of its peer.
_DIAL_SECONDS = 5.0
_PORT_SECONDS, _PORTS_AT_ONCE = 3.0, 16
_MOST_TEXT = 400


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
        self._side, self._host, self._port = side, host, port
        self._where = join_address(host, port)
        self._open_port = f"let TCP port {port} of {host} pass, for this host"

    def run(self) -> PeerReport:
        began = time.monotonic()
        self._resolve()
        exchange, stream, address = self._open(self._side.settings.rdma_fabrics)
        report = PeerReport(
            peer=self._where,
            address=address,
            secure=stream.secure,
            site=self._side.name,
            peer_site=name_of(stream),
            connect_seconds=time.monotonic() - began,
            versions=versions(),
        )
        with _Running(exchange):
            about = self._first_answer(exchange)
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
        for name, reason in self._side.runtime.context.unavailable.items():
            if name == report.fabric:
                report.fabrics[name] = measured
            else:
                report.fabrics[name] = FabricCheck(False, reason) if reason else self._look_at(name, about)
        report.ports = _try_ports(report.address, _ports(about))
        report.problems += _port_problems(report.ports, report.address)
        return report

    def _told(self, what: Any) -> Any:
        """What a call gives; if it fails, say so as a command does."""
        try:
            return what()
        except (OSError, RdmaError) as error:
            raise CommandError("CHECK_BROKE_OFF", f"{self._where}: the check broke off: {error}", "") from error

    # -- reaching it ---------------------------------------------------------------------------------------

    def _resolve(self) -> None:
        try:
            socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CommandError(
                "NAME_UNKNOWN",
                f"{self._where} can't be reached: the name {self._host!r} is unknown here ({reason})",
                "look at its spelling, at DNS and at /etc/hosts, or give the IP address",
                ENVIRONMENT,
            ) from error

    def _open(self, order: tuple[str, ...]) -> tuple[Exchange, ControlStream, str]:
        """An open link, which is the caller's to run and to close; and the IP address that it leads to."""
        runtime = self._side.runtime
        try:
            sock, stream = dial((self._host, self._port), self._side.tls(False), Pending(), _DIAL_SECONDS)
        except (OSError, RdmaError) as error:
            raise self._unreachable(error) from error
        stream.site = name_of(stream)
        try:
            address = sock.getpeername()[:2]
            tcp = runtime.tcp(functools.partial(connect_tcp, address, GREETING_TIMEOUT))
            exchange = Exchange(
                stream, runtime.fabrics(tcp, sock), context_for(runtime.context, order), f"check {self._where}"
            )
            exchange.link.open()
        except ConfigError:  # a setting of this side
            stream.close()
            raise
        except (OSError, RdmaError) as error:
            stream.close()
            raise self._not_opened(error) from error
        return exchange, stream, plain_host(str(address[0]))

    def _unreachable(self, error: Exception) -> CommandError:
        """Why no connection, or no TLS, came about."""
        where, number = self._where, getattr(error, "errno", None)
        if isinstance(error, TlsError):
            return CommandError("TLS_FAILED", f"{where} is reached, but {error}", "see `--kit` on both sides")
        if isinstance(error, ConnectionRefusedError):
            text = f"{where} refuses the connection: its host answers, but nobody listens at the port"
            listen = f"nvflare-rdma doctor --listen {self._port}"
            hint = f"run `{listen}` there; if it runs, a firewall refuses: {self._open_port}"
            return CommandError("REFUSED", text, hint, ENVIRONMENT)
        if number in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            text = f"{where} can't be reached: {error.args[-1]}"
            return CommandError("NO_ROUTE", text, "look at `ip route get`, and whether the host is up", ENVIRONMENT)
        if isinstance(error, TimeoutError | FabricUnavailable):
            text = f"{where}: nothing answered within {_DIAL_SECONDS:g} s: a firewall drops it, or the host is down"
            return CommandError("TIMED_OUT", text, self._open_port, ENVIRONMENT)
        if isinstance(error, ConnectionError):  # it was there, and is closed
            text = f"{where} is reached, but the connection ends before anything is agreed: {error}"
            return CommandError("NOT_A_PEER", text, self._what_listens())
        return CommandError("UNREACHABLE", f"{where} can't be reached: {error}", "", ENVIRONMENT)

    def _what_listens(self) -> str:
        if self._side.secure:
            return "is it `nvflare-rdma doctor --listen` that listens there, and was it started with --kit?"
        return "is it `nvflare-rdma doctor --listen` that listens there? If it was started with --kit, name yours, too"

    def _not_opened(self, error: Exception) -> CommandError:
        """Why a connection did not become a link."""
        if isinstance(error, ssl.SSLError | TlsError):
            return CommandError("TLS_FAILED", f"{self._where} is reached, but {error}", "see `--kit` on both sides")
        # The peer chooses, and says so when it leaves.
        if isinstance(error, FabricUnavailable) or "no fabric that both sides allow" in str(error):
            return CommandError("NO_FABRIC", f"{self._where}: {error}", "see rdma_fabrics on both sides")
        if isinstance(error, ProtocolError):
            text = f"{self._where} speaks another protocol: {error}"
            return CommandError("NOT_A_PEER", text, "install the same nvflare-rdma on both sides")
        return CommandError("NOT_A_PEER", f"{self._where} is reached, but no link opens: {error}", self._what_listens())

    def _first_answer(self, exchange: Exchange) -> dict[str, Any]:
        try:
            answer = exchange.ask("about")
        except (OSError, RdmaError) as error:
            text = f"{self._where} opens a link, but does not answer: {error}"
            raise CommandError("NOT_A_PEER", text, self._what_listens()) from error
        if isinstance(busy := answer.get(BUSY), str):
            text = f"{self._where} can't be checked now: {escaped(busy[:200])}"
            raise CommandError("BUSY", text, "try again when they are over", ENVIRONMENT)
        return answer

    # -- fabrics -------------------------------------------------------------------------------------------

    def _look_at(self, name: str, about: dict[str, Any]) -> FabricCheck:
        """What another fabric than the chosen one carries."""
        order = [each for each in _list(about.get("order")) if isinstance(each, str)]
        theirs = about.get("fabrics")
        if name not in self._side.settings.rdma_fabrics:
            return FabricCheck(False, "left out by rdma_fabrics here")
        if name not in order or not isinstance(theirs, dict):
            return FabricCheck(False, "left out by rdma_fabrics of the peer")
        if reason := _text(theirs.get(name)):
            return FabricCheck(False, f"peer: {reason}")
        # With tcp behind it the reason is told if it does not work; a peer that prefers tcp would choose that.
        alone = name == "tcp" or "tcp" not in order or order.index("tcp") < order.index(name)
        wanted = (name,) if alone else (name, "tcp")
        try:
            exchange, _, _ = self._open(wanted)
        except CommandError as error:
            return FabricCheck(False, str(error).removeprefix(f"{self._where}: "))
        with _Running(exchange):
            if exchange.link.fabric != name:
                return FabricCheck(False, escaped(exchange.link.passed_over).removeprefix(f"{name}: "))
            return _measure(exchange)


class _Running:
    """Has a thread receive for a link, and ends it."""

    def __init__(self, exchange: Exchange) -> None:
        self._link = exchange.link

    def __enter__(self) -> None:
        threading.Thread(target=self._link.run, name="rdma-check", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._link.close(1.0)


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
    report.peer_versions = {_text(k): _text(v) for k, v in list(told.items())[:10]} if isinstance(told, dict) else {}
    report.peer_passed_over = _text(about.get("passed_over"))
    report.peer_data_ports = _text(about.get("data_ports"))
    for package in ("nvflare-rdma", "nvflare"):
        ours, theirs = report.versions.get(package, ""), report.peer_versions.get(package, "")
        if ours != theirs:
            report.problems.append(
                f"{package} is {ours or 'missing'} here and {theirs or 'missing'} there: install the same on both sides"
            )


def _text(value: Any) -> str:
    return escaped(value)[:_MOST_TEXT] if isinstance(value, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ports(about: dict[str, Any]) -> Iterable[tuple[int, str, bool]]:
    for entry in _list(about.get("ports"))[: MOST_PORTS + 8]:
        match entry:
            case {"port": int(port), "what": str(what), "open": bool(is_open)} if 0 < port < 65536:
                yield port, _text(what), is_open


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
