"""The F3 driver for `rdma://` and `srdma://` (TLS): sockets and threads as FLARE's TCP driver has them
(`nvflare.fuel.f3.drivers.tcp_driver`), with a link behind each connection. Peers come to one by `channel.door`.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from nvflare.fuel.f3.comm_config_utils import requires_secure_connection
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.base_driver import BaseDriver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverCap, DriverParams
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context, get_tcp_urls
from nvflare.fuel.hci.security import get_certificate_common_name

from nvflare_rdma.channel import (
    GREETING_TIMEOUT,
    ControlStream,
    Door,
    Link,
    Pending,
    Role,
    address_of,
    dial,
)
from nvflare_rdma.driver.blob_memory import use_huge_pages
from nvflare_rdma.driver.connection import RdmaConnection
from nvflare_rdma.driver.sites import SiteConnections, site_of
from nvflare_rdma.errors import ConfigError, RdmaError, TlsError, UnsupportedVersionError
from nvflare_rdma.fabric import TcpFabric, connect_tcp, listen_tcp
from nvflare_rdma.flare_compat import require_flare
from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import Runtime, this_runtime

log = get_logger(__name__)

CLEAR_SCHEME, SECURE_SCHEME = "rdma", "srdma"
#: A URL with an IPv6 address: that, and the port.
_IPV6 = re.compile(r"[^/]*//\[([^\]]*)\]:?([^/?#]*)")


@dataclass(frozen=True)
class Prepared:
    """A connector, its parameters and the process's runtime, checked."""

    connector: ConnectorInfo
    host: str
    port: int
    tls: ssl.SSLContext | None
    runtime: Runtime


def name_of(connector: ConnectorInfo) -> str:
    """A connector's name for log lines. FLARE's has brackets, from which its formatter for the log takes what is in
    them for a context of its own."""
    return str(connector)[1:-1]


def _parse_address(params: dict[str, Any]) -> tuple[str, int]:
    """Host and port of a connector."""
    host, raw = params.get(DriverParams.HOST.value) or "", params.get(DriverParams.PORT.value)
    # FLARE takes a URL apart at its colons, of which an IPv6 address has more.
    if (bracketed := _IPV6.match(str(params.get(DriverParams.URL.value)))) is not None:
        host, raw = bracketed.groups()
    try:
        port = int(str(raw))
        if 0 < port < 65536:
            return host, port
    except ValueError:
        pass
    url = params.get(DriverParams.URL.value) or "the connector's parameters"
    raise ConfigError(f"bad port {raw!r} in {url}: give a whole number from 1 to 65535, as in rdma://host:8002")


def _is_ipv6(host: Any) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


class RdmaDriver(BaseDriver):
    """The driver that FLARE finds in `comm_driver_path` (`nvflare-rdma driver-path` prints it)."""

    secure_scheme = SECURE_SCHEME
    feature = "The rdma driver"
    #: Whether connections that are not FLARE's come to its listener's port, too (`SharedPorts`).
    shares_its_port = True

    def __init__(self) -> None:
        super().__init__()
        self._door: Door | None = None
        self._stopping = threading.Event()
        self._process = os.getpid()
        self._sites = SiteConnections()
        self._opening = Pending()  # what FLARE does not know yet, and has left the door

    @staticmethod
    def supported_transports() -> list[str]:
        """FLARE's hook: the schemes of URLs that are this driver's."""
        return [CLEAR_SCHEME, SECURE_SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """FLARE's hook: FLARE has to send heartbeats, and TLS is supported."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: True}

    @classmethod
    def get_urls(cls, scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """FLARE's hook: the URLs to connect to and to listen at."""
        secure = requires_secure_connection(resources)
        hosts = (DriverParams.HOST.value, DriverParams.LISTEN_HOST.value)
        ipv6 = {key: f"[{resources[key]}]" for key in hosts if _is_ipv6(resources.get(key))} if resources else {}
        return get_tcp_urls(cls.secure_scheme if secure else scheme, {**resources, **ipv6})  # type: ignore[no-any-return]

    # -- the two ways to start -----------------------------------------------------------------------------

    def listen(self, connector: ConnectorInfo) -> None:
        """FLARE's hook: take connections until `shutdown`."""
        self.connector = connector
        prepared = self._prepare(connector, ssl_server=True)
        self._door = self._make_door(prepared, prepared.runtime.tcp())
        if self._stopping.is_set():  # shut down before `shutdown` could see the door
            self._door.close()
        prepared.runtime.shared.ports.share(self._door)
        self._door.serve()

    def _make_door(self, prepared: Prepared, fabric: TcpFabric) -> Door:
        """A door that does not serve yet; rails come to `fabric`."""

        def tls() -> ssl.SSLContext:
            # Made for each guest: certificates may be renewed.
            try:
                return cast(ssl.SSLContext, self._tls_context(prepared.connector.params, True))
            except Exception as error:  # FLARE's code, which raises what it likes about a wrong file
                raise TlsError(f"this side can't use its certificates: {error}") from error

        def on_connection(sock: socket.socket, stream: ControlStream, admitted: Callable[[], None]) -> None:
            self._welcome(sock, stream, fabric, prepared, admitted)

        listener = listen_tcp(prepared.host, prepared.port)
        return Door(listener, tls if prepared.tls else None, fabric, on_connection, name_of(prepared.connector))

    def _welcome(
        self,
        sock: socket.socket,
        stream: ControlStream,
        fabric: TcpFabric,
        prepared: Prepared,
        admitted: Callable[[], None],
    ) -> None:
        """Serve a connection that has come to the door."""
        self._run_link(sock, stream, Role.PASSIVE, fabric, prepared, admitted)

    def connect(self, connector: ConnectorInfo) -> None:
        """FLARE's hook: connect to the peer, and return when the connection has ended."""
        self.connector = connector
        prepared = self._prepare(connector, ssl_server=False)
        try:
            self._dial(prepared)
        except (OSError, RdmaError) as error:
            # A refused or dropped TCP connection is for FLARE's retry loop to report; what only we know is said here.
            if isinstance(error, RdmaError) and not self._stopping.is_set():
                log.error("can't connect to %s: %s", name_of(connector), error)
            raise

    def _dial(self, prepared: Prepared) -> None:
        """Connect, and serve the connection."""
        sock, stream = dial((prepared.host, prepared.port), prepared.tls, self._opening)
        with sock:
            self._run_dialled(sock, stream, prepared)

    def _run_dialled(self, sock: socket.socket, stream: ControlStream, prepared: Prepared) -> None:
        """Open and serve a link to whom this side has dialled."""
        # To where the control stream came through: a name may have several addresses, and hosts.
        dial_rail = functools.partial(connect_tcp, sock.getpeername()[:2], GREETING_TIMEOUT)
        self._run_link(sock, stream, Role.ACTIVE, prepared.runtime.tcp(dial_rail), prepared)

    def shutdown(self) -> None:
        """FLARE's hook: end all connections, and take no more. FLARE also calls it when a forked process exits, where
        they are the parent's and stay."""
        if self._process != os.getpid():
            return
        self._stopping.set()
        if self._door is not None:
            self._door.close()
        self._opening.close()
        with self.conn_lock:
            connections = list(self.connections.values())
        # Each may wait for its peer a little: all at once, and outside the lock that their ends need.
        closers = [threading.Thread(target=connection.close, daemon=True) for connection in connections]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()

    # -- one connection ------------------------------------------------------------------------------------

    def _tls_context(self, params: dict[str, Any], ssl_server: bool) -> ssl.SSLContext | None:
        """FLARE's context for TLS as a connector's parameters say; None for no TLS."""
        context = cast("ssl.SSLContext | None", get_ssl_context(params, ssl_server))
        if context is not None and ssl_server:
            # No session is taken up again here. FLARE's own client reads and writes its `SSLSocket` in two threads, and
            # may lose its first frame where it meets a ticket meanwhile.
            context.num_tickets = 0
        return context

    def _prepare(self, connector: ConnectorInfo, ssl_server: bool) -> Prepared:
        """What a connector's parameters and the settings say.

        A mistake in them is logged here and ends FLARE's retries, which would log it at debug level and go on.
        """
        params = connector.params
        try:
            require_flare(self.feature)
            use_huge_pages()
            if params.get(DriverParams.SCHEME.value) == SECURE_SCHEME:
                # FLARE knows its own secure schemes only; this is how a connection says the same.
                params[DriverParams.SECURE.value] = True
            return Prepared(
                connector,
                *_parse_address(params),
                self._tls_context(params, ssl_server),
                this_runtime(),
            )
        except (ConfigError, UnsupportedVersionError, CommError) as error:
            connector.stopped.set()
            log.error("can't start %s: %s", name_of(connector), error)
            raise CommError(CommError.BAD_CONFIG, str(error)) from error
        except (OSError, RuntimeError) as error:
            # A certificate that can't be read may be on its way (rotation): FLARE tries again.
            log.error("can't start %s: %s", name_of(connector), error)
            raise

    def _run_link(
        self,
        sock: socket.socket,
        stream: ControlStream,
        role: Role,
        fabric: TcpFabric,
        prepared: Prepared,
        admitted: Callable[[], None] = lambda: None,
    ) -> None:
        """Open a link on a control stream, make it known to FLARE, and receive until it ends."""
        with self._opening.track(sock):
            connection = self._make_connection(sock, stream, role, fabric, prepared)
        link = connection.link
        assert link is not None
        admitted()
        with self._sites.counted(stream.site, link):
            try:
                self._introduce(connection)
                link.run()
            finally:
                link.close(0.0)
                self.close_connection(connection)

    def _introduce(self, connection: Any) -> None:
        """Make a connection known to FLARE."""
        self.add_connection(connection)
        if self._stopping.is_set():  # shut down before `shutdown` could see it
            connection.close()

    def _make_connection(
        self, sock: socket.socket, stream: ControlStream, role: Role, fabric: TcpFabric, prepared: Prepared
    ) -> RdmaConnection:
        """A connection whose link is open."""
        properties = {
            DriverParams.PEER_ADDR.value: address_of(sock, peer=True),
            DriverParams.LOCAL_ADDR.value: address_of(sock, peer=False),
        }
        if stream.secure:
            certificate = stream.peer_certificate()
            properties[DriverParams.PEER_CN.value] = get_certificate_common_name(certificate) if certificate else "N/A"
        connection = RdmaConnection(prepared.connector, properties)
        fabrics = prepared.runtime.fabrics(fabric, sock)
        stream.site = site_of(properties)
        connection.link = Link(stream, role, fabrics, prepared.runtime.context, connection.receive, connection.name)
        connection.link.open()
        return connection
