"""`nvflare-rdma doctor --listen [HOST:]PORT`: be there for the checks of other hosts, for a while."""

from __future__ import annotations

import contextlib
import errno
import platform
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nvflare_rdma.channel import ControlStream, Door, Link, address_of
from nvflare_rdma.cli.doctor import PACKAGES, installed
from nvflare_rdma.cli.output import ENVIRONMENT, CommandError, Result
from nvflare_rdma.cli.peer_kit import Side, this_side
from nvflare_rdma.cli.peer_link import LINK_SECONDS, Exchange, context_for
from nvflare_rdma.cli.port_use import who_listens
from nvflare_rdma.cli.units import parse_time
from nvflare_rdma.errors import ConfigError, ProtocolError
from nvflare_rdma.fabric import TcpFabric, join_address, listen_tcp
from nvflare_rdma.logs import escaped
from nvflare_rdma.settings import as_time
from nvflare_rdma.version import __version__

#: Links at once; others wait so long for one of them to end.
_MOST_LINKS, _WAIT_SECONDS = 4, 5.0
#: So many links wait for their turn, or are told that it will not come; others are closed at once.
_MOST_WAITING = 16
#: So many links are told of, the last ones.
_MOST_TOLD = 1000
_MOST_SECONDS = 24 * 3600.0
_LOOK_SECONDS, _END_SECONDS = 0.5, 2.0
#: Of a range of data ports, so many are opened.
MOST_PORTS = 64
#: How a link ends whose peer had no more to ask.
_LEFT = "the peer closed the connection"
_CLEAR = (
    "CLEAR: without certificates nothing is encrypted and nobody is known: whoever reaches this port may use the "
    "check, and whoever is on the way can read and change what is sent. Name the site's start-up kit: --kit FOLDER"
)


def parse_timeout(timeout: str) -> float:
    """Seconds, from a text such as "10m".

    Raises:
        CommandError: it is no time, or out of range.
    """
    try:
        seconds = parse_time(timeout, "--timeout")
    except ConfigError as error:
        raise CommandError("INVALID_INPUT", str(error), "it has a number and a unit") from error
    if not 0 < seconds <= _MOST_SECONDS:
        text = f"--timeout {timeout} is out of range: more than 0, and {as_time(_MOST_SECONDS)} at most"
        raise CommandError("INVALID_INPUT", text, "write it as 10m or 1h")
    return seconds


def listen_result(
    address: str, folder: Path | None, timeout: str, make: Callable[[Side, str, int], Listening] | None = None
) -> Result:
    """Listen until the time (a text such as "10m") is over, or the user ends it. The exit code is 1 if nobody came,
    as `Listening.was_of_use` has it.

    Raises:
        CommandError: the address is wrong or its port in use, or the kit can't be used.
    """
    seconds = parse_timeout(timeout)
    side = this_side(folder)
    host, port = parse_listen(address)
    if not side.secure:
        host = host or "127.0.0.1"  # anybody who gets there is let in, so that has to be asked for by its address
        print(_CLEAR, file=sys.stderr)
    with (make or Listening)(side, host, port) as listening:
        listening.ending = time.monotonic() + seconds
        where = join_address(host or platform.node(), listening.port)
        kit = " --kit FOLDER" if side.secure else ""
        others = f" and {len(listening.data_ports)} data ports" if listening.data_ports else ""
        said = (
            f"{side.name or 'this host'} listens at {where}{others} for {as_time(round(seconds))}; end it with Ctrl-C. "
            f"On the other host: nvflare-rdma {listening.counterpart} {where}{kit}"
        )
        with _interrupted():  # who reads the line may end it at once
            print(said, file=sys.stderr, flush=True)
            _wait(listening)
    data = {"site": side.name, "secure": side.secure, "port": listening.port, "peers": list(listening.served)}
    lines = [
        f"{peer['site'] or 'somebody'} from {peer['address']} over {peer['fabric']}: {peer['received_bytes']} bytes "
        f"came, {peer['sent_bytes']} went" + (f"; {peer['failure']}" if peer["failure"] else "")
        for peer in listening.served
    ]
    return Result(data, "\n".join(lines) or "nobody came", 0 if listening.was_of_use else 1)


def _wait(listening: Listening) -> None:
    """A signal that another thread gets does not wake this one up, which has to run its handler: look now and then."""
    while (left := listening.ending - time.monotonic()) > 0:
        if listening.over.wait(min(left, _LOOK_SECONDS)):
            return


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    """Ctrl-C, or SIGTERM, ends what is in it, and nothing else."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_listen(address: str) -> tuple[str, int]:
    """Host ("" for all addresses) and port of [HOST:]PORT.

    Raises:
        CommandError: it is none.
    """
    return _parse(address, "--listen [HOST:]PORT", 0)


def parse_peer(address: str, option: str = "--peer") -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        CommandError: it is none.
    """
    host, port = _parse(address, f"{option} HOST:PORT", 1)
    if not host:
        raise CommandError(
            "INVALID_INPUT", f"{option} {address!r} names no host", "write it as host:8004 or [::1]:8004"
        )
    return host, port


def _parse(address: str, option: str, least: int) -> tuple[str, int]:
    host, colon, text = address.rpartition(":")
    if not colon and least:  # the host may not be left out
        text = ""
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if (":" in host and not bracketed) or not text.isascii() or not text.isdigit() or not least <= int(text) < 65536:
        name, _, form = option.partition(" ")
        hint = "an IPv6 address has brackets: [::1]:8004" if ":" in host else f"a port is a number of {least} to 65535"
        raise CommandError("INVALID_INPUT", f"{name} {address!r} is not {form}", hint)
    return host, int(text)


class Listening:
    """Doors for checks: at the port that was asked for, and at this side's data ports, so that a peer sees which of
    them it can reach. All lead to the same."""

    counterpart = "doctor --peer"
    """What is run on the other host."""
    link_seconds = LINK_SECONDS
    """How long a link may last."""

    def __init__(self, side: Side, host: str, port: int) -> None:
        self.served: deque[dict[str, Any]] = deque(maxlen=_MOST_TOLD)
        """Who came, link by link."""
        self.data_ports: list[int] = []
        """Where it listens besides."""
        self.ending = float("inf")
        """When it is to end, as `time.monotonic` has it."""
        self.over = threading.Event()
        """Whether there is nothing more to listen for."""
        self._side = side
        self._fabric: TcpFabric = side.runtime.tcp()
        self._places = threading.BoundedSemaphore(_MOST_LINKS)
        self._waiting = threading.BoundedSemaphore(_MOST_WAITING)
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        self._links: set[Link] = set()
        self._ends = ExitStack()
        listener = _listen(host, port)
        self.port = int(listener.getsockname()[1])
        self._serve(listener)
        self._ports = [{"port": self.port, "what": "the check", "open": True}, *self._open_data_ports(host)]
        self._ports += [{"port": number, "what": "FLARE", "open": False} for number in side.ports]

    def _open_data_ports(self, host: str) -> list[dict[str, Any]]:
        ports = self._side.settings.rdma_data_ports
        told = []
        if isinstance(ports, tuple):
            for number in range(ports[0], min(ports[1], ports[0] + MOST_PORTS - 1) + 1):
                if number == self.port:
                    continue
                opened = False
                with contextlib.suppress(OSError):  # somebody else has it: the peer sees whether it gets there
                    self._serve(listen_tcp(host, number))
                    self.data_ports.append(number)
                    opened = True
                told.append({"port": number, "what": "rdma_data_ports", "open": opened})
        elif ports == "auto" and self._side.server:
            with contextlib.suppress(OSError):
                listener = listen_tcp(host, 0)
                self._serve(listener)
                self.data_ports.append(number := int(listener.getsockname()[1]))
                told.append({"port": number, "what": "rdma_data_ports=auto, any port", "open": True})
        return told

    def _serve(self, listener: socket.socket) -> None:
        tls = self._server_context if self._side.secure else None
        door = Door(listener, tls, self._fabric, self._on_connection, "the check")
        door.takers = self._takers()
        thread = threading.Thread(target=door.serve, name="rdma-check-door", daemon=True)
        thread.start()
        self._ends.callback(thread.join, _END_SECONDS)
        self._ends.callback(door.close)  # before it, as the last comes first

    def _takers(self) -> dict[bytes, Callable[[socket.socket, float, Callable[[], None]], None]]:
        """See `Door.takers`."""
        return {}

    def _exchange(self, stream: ControlStream, sock: socket.socket, name: str) -> Exchange:
        runtime = self._side.runtime
        context = context_for(runtime.context, runtime.settings.rdma_fabrics)
        return Exchange(stream, runtime.fabrics(self._fabric, sock), context, name, self._about)

    def _server_context(self) -> Any:
        return self._side.tls(True)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.close()
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close(0.0)
        with self._gone:  # each is told of before
            self._gone.wait_for(lambda: not self._links, _END_SECONDS)

    def _on_connection(self, sock: socket.socket, stream: ControlStream, admitted: Callable[[], None]) -> None:
        """Serve one link until the peer goes."""
        stream.site = name_of(stream)
        address = address_of(sock, peer=True)
        exchange = self._exchange(stream, sock, f"check {address}")
        exchange.link.open()  # as a guest, whose place others may get: the handshake may be put off
        if not self._waiting.acquire(blocking=False):
            exchange.link.close(0.0)
            raise ProtocolError(f"{_MOST_WAITING} links wait for their turn already, which is the most")
        with ExitStack() as waits:
            waits.callback(self._waiting.release)
            admitted()
            with self._lock:
                self._links.add(exchange.link)
            try:
                self._attend(exchange, stream.site, address, waits)
            finally:
                with self._gone:
                    self._links.discard(exchange.link)
                    self._gone.notify_all()

    def _attend(self, exchange: Exchange, site: str, address: str, waits: ExitStack) -> None:
        """Serve a link when its turn has come, which ends `waits`; or say why it does not come."""
        if not self._places.acquire(timeout=_WAIT_SECONDS):
            exchange.refuse(f"{_MOST_LINKS} checks are going on there, which is the most")
            return
        try:
            waits.close()
            self._run(exchange, site, address)
        finally:
            self._places.release()

    def _run(self, exchange: Exchange, site: str, address: str) -> None:
        ending = threading.Timer(self.link_seconds, exchange.link.close, (0.0,))
        ending.daemon = True
        ending.start()
        try:
            if len(self.served) < _MOST_TOLD:
                print(f"{site or 'somebody'} from {address}: {exchange.link.way}", file=sys.stderr, flush=True)
            exchange.receive()
        finally:
            ending.cancel()
            self._note(exchange, site, address)

    @property
    def was_of_use(self) -> bool:
        """Whether anybody came."""
        return bool(self.served)

    def _note(self, exchange: Exchange, site: str, address: str) -> None:
        link, told = exchange.link, exchange.link.failure
        with self._lock:
            self.served.append(
                {
                    "site": site,
                    "address": address,
                    "fabric": link.fabric,
                    "received_bytes": exchange.received_bytes,
                    "sent_bytes": exchange.sent_bytes,
                    "failure": "" if told == _LEFT else told,
                }
            )

    def _about(self, link: Link) -> dict[str, Any]:
        context = self._side.runtime.context
        return {
            "site": self._side.name,
            "versions": versions(),
            "order": list(context.order),
            "fabrics": {name: context.unavailable.get(name, "") for name in context.order},
            "fabric": link.fabric,
            "passed_over": link.passed_over,
            "ports": self._ports,
            "data_ports": _as_text(self._side.settings.rdma_data_ports),
        }


def _as_text(ports: str | tuple[int, int]) -> str:
    return ports if isinstance(ports, str) else "-".join(str(port) for port in dict.fromkeys(ports))


def versions() -> dict[str, str]:
    """What runs on this side."""
    packages = {name: found for name in PACKAGES if (found := installed(name))}
    return {
        "nvflare-rdma": __version__,
        **packages,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def name_of(stream: ControlStream) -> str:
    """Who is at the other end, by the certificate; "" without one."""
    from nvflare.fuel.hci.security import get_certificate_common_name

    certificate = stream.peer_certificate()
    return escaped(get_certificate_common_name(certificate) or "") if certificate else ""


def _listen(host: str, port: int) -> socket.socket:
    where = join_address(host or "*", port)
    try:
        return listen_tcp(host, port)
    except socket.gaierror as error:
        text = f"--listen {where}: the name {host!r} is unknown here ({error.strerror})"
        raise CommandError(
            "NAME_UNKNOWN", text, "leave HOST out, for all addresses of this host", ENVIRONMENT
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            user = who_listens(port)
            text = f"port {port} is in use{f' by {user}' if user else ''}, so nothing can listen at {where}"
            hint = "end that process, or name another port that the firewall lets through"
            raise CommandError("PORT_IN_USE", text, hint, ENVIRONMENT) from error
        if error.errno == errno.EADDRNOTAVAIL:
            text = f"--listen {where}: {host} is no address of this host"
            raise CommandError("INVALID_INPUT", text, "leave HOST out, for all addresses of this host") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            text = f"this user may not listen at {where}: {error.strerror}"
            raise CommandError("NO_ACCESS", text, "name a port of 1024 or above", ENVIRONMENT) from error
        text = f"nothing can listen at {where}: {error.strerror or error}"
        raise CommandError("CANT_LISTEN", text, "", ENVIRONMENT) from error
