"""The way to another host that listens for this one: connections, TLS and links as a job's, and why there are none."""

from __future__ import annotations

import errno
import functools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from nvflare_rdma.channel import GREETING_TIMEOUT, ControlStream, LinkContext, Pending, dial
from nvflare_rdma.cli.output import ENVIRONMENT, CommandError
from nvflare_rdma.cli.peer_kit import Side
from nvflare_rdma.cli.peer_link import BUSY, Exchange, context_for
from nvflare_rdma.cli.peer_listen import name_of
from nvflare_rdma.errors import ConfigError, FabricUnavailable, ProtocolError, RdmaError, TlsError
from nvflare_rdma.fabric import Fabric, connect_tcp, join_address, plain_host
from nvflare_rdma.logs import escaped

#: To connect, TLS included: as long as a job gives an address of its peer.
_DIAL_SECONDS = 5.0
_MOST_TEXT = 400


class Way:
    """The way from this side to a host and port where `nvflare-rdma COMMAND --listen` is to be."""

    def __init__(self, side: Side, host: str, port: int, command: str) -> None:
        self.side = side
        self.where = join_address(host, port)
        self._host, self._port, self._command = host, port, command
        self._open_port = f"let TCP port {port} of {host} pass, for this host"

    def resolve(self) -> None:
        """Find out whether there is such a host. Raises CommandError: its name is unknown."""
        try:
            socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CommandError(
                "NAME_UNKNOWN",
                f"{self.where} can't be reached: the name {self._host!r} is unknown here ({reason})",
                "look at its spelling, at DNS and at /etc/hosts, or give the IP address",
                ENVIRONMENT,
            ) from error

    def open(
        self,
        order: tuple[str, ...],
        make: Callable[[ControlStream, Mapping[str, Fabric], LinkContext, str], Exchange] = Exchange,
        most_rails: int | None = None,
        chunk_bytes: int | None = None,
        most_seconds: float = float("inf"),
    ) -> tuple[Exchange, ControlStream, str]:
        """An open link, which is the caller's to run and to close; and the IP address that it leads to. It has at most
        so many tcp rails, and asks for chunks of so many bytes, or as this side's settings say. All of it takes
        no longer than `most_seconds`, or as a job's links have it.

        Raises:
            CommandError: there is no way, or no link.
        """
        runtime, deadline = self.side.runtime, time.monotonic() + most_seconds
        dial_seconds = min(_DIAL_SECONDS, most_seconds)
        try:
            sock, stream = dial((self._host, self._port), self.side.tls(False), Pending(), dial_seconds)
        except (OSError, RdmaError) as error:
            raise self._unreachable(error, dial_seconds) from error
        stream.site = name_of(stream)
        try:
            address = sock.getpeername()[:2]
            left = max(deadline - time.monotonic(), 0.001)
            tcp = runtime.tcp(functools.partial(connect_tcp, address, min(GREETING_TIMEOUT, left)), most_rails)
            context = context_for(runtime.context, order, chunk_bytes, left)
            exchange = make(stream, runtime.fabrics(tcp, sock), context, f"{self._command} {self.where}")
            exchange.link.open()
        except ConfigError:  # a setting of this side
            stream.close()
            raise
        except (OSError, RdmaError) as error:
            stream.close()
            raise self._not_opened(error) from error
        return exchange, stream, plain_host(str(address[0]))

    def _unreachable(self, error: Exception, dial_seconds: float) -> CommandError:
        """Why no connection, or no TLS, came about."""
        where, number = self.where, getattr(error, "errno", None)
        if isinstance(error, TlsError):
            return CommandError("TLS_FAILED", f"{where} is reached, but {error}", "see `--kit` on both sides")
        if isinstance(error, ConnectionRefusedError):
            text = f"{where} refuses the connection: its host answers, but nobody listens at the port"
            listen = f"nvflare-rdma {self._command} --listen {self._port}"
            hint = f"run `{listen}` there; if it runs, a firewall refuses: {self._open_port}"
            return CommandError("REFUSED", text, hint, ENVIRONMENT)
        if number in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            text = f"{where} can't be reached: {error.args[-1]}"
            return CommandError("NO_ROUTE", text, "look at `ip route get`, and whether the host is up", ENVIRONMENT)
        if isinstance(error, TimeoutError | FabricUnavailable):
            text = f"{where}: nothing answered within {dial_seconds:.3g} s: a firewall drops it, or the host is down"
            return CommandError("TIMED_OUT", text, self._open_port, ENVIRONMENT)
        if isinstance(error, ConnectionError):  # it was there, and is closed
            text = f"{where} is reached, but the connection ends before anything is agreed: {error}"
            return CommandError("NOT_A_PEER", text, self._what_listens())
        return CommandError("UNREACHABLE", f"{where} can't be reached: {error}", "", ENVIRONMENT)

    def _what_listens(self) -> str:
        if self.side.secure:
            return f"is it `nvflare-rdma {self._command} --listen` that listens there, and was it started with --kit?"
        return f"is it `nvflare-rdma {self._command} --listen` that listens there? With --kit? Then name yours, too"

    def _not_opened(self, error: Exception) -> CommandError:
        """Why a connection did not become a link."""
        if isinstance(error, ssl.SSLError | TlsError):
            return CommandError("TLS_FAILED", f"{self.where} is reached, but {error}", "see `--kit` on both sides")
        # The peer chooses, and says so when it leaves.
        if isinstance(error, FabricUnavailable) or "no fabric that both sides allow" in str(error):
            return CommandError("NO_FABRIC", f"{self.where}: {error}", "see rdma_fabrics on both sides")
        if isinstance(error, ProtocolError):
            text = f"{self.where} speaks another protocol: {error}"
            return CommandError("NOT_A_PEER", text, "install the same nvflare-rdma on both sides")
        return CommandError("NOT_A_PEER", f"{self.where} is reached, but no link opens: {error}", self._what_listens())

    def first_answer(self, exchange: Exchange, **fields: Any) -> dict[str, Any]:
        """What the peer says of itself. Raises CommandError: it says nothing, or that it has no time."""
        try:
            answer = exchange.ask("about", **fields)
        except (OSError, RdmaError) as error:
            text = f"{self.where} opens a link, but does not answer: {error}"
            raise CommandError("NOT_A_PEER", text, self._what_listens()) from error
        if isinstance(busy := answer.get(BUSY), str):
            text = f"{self.where} can't be checked now: {escaped(busy[:200])}"
            raise CommandError("BUSY", text, "try again when they are over", ENVIRONMENT)
        return answer

    def order_for(self, name: str, about: Mapping[str, Any]) -> tuple[str, ...] | str:
        """What a link is to try that is to have the fabric `name`; or the reason why none can have it, as this side
        knows it, or as the peer has told `about` itself."""
        if reason := self.side.runtime.context.unavailable.get(name, "not part of this process"):
            return reason
        order, theirs = as_list(about.get("order")), about.get("fabrics")
        if name not in self.side.settings.rdma_fabrics:
            return "left out by rdma_fabrics here"
        if name not in order or not isinstance(theirs, dict):
            return "left out by rdma_fabrics of the peer"
        if reason := as_told(theirs.get(name)):
            return f"peer: {reason}"
        # With tcp behind it the reason is told if it does not work; a peer that prefers tcp would choose that.
        alone = name == "tcp" or "tcp" not in order or order.index("tcp") < order.index(name)
        return (name,) if alone else (name, "tcp")

    def without(self, error: CommandError) -> str:
        """The reason in an error, without where it was."""
        return str(error).removeprefix(f"{self.where}: ")


class Running:
    """Has a thread receive for a link, and ends it."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __enter__(self) -> None:
        threading.Thread(target=self._exchange.receive, name="rdma-check", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._exchange.link.close(1.0)


def as_told(value: Any) -> str:
    """A text of the peer's, for people; "" if it is none."""
    return escaped(value)[:_MOST_TEXT] if isinstance(value, str) else ""


def as_list(value: Any) -> list[Any]:
    """A list of the peer's; [] if it is none."""
    return value if isinstance(value, list) else []
