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
    explain_tls,
)
from nvflare_rdma.driver.blob_memory import use_huge_pages
from nvflare_rdma.driver.connection import RdmaConnection
from nvflare_rdma.errors import ConfigError, RdmaError, TlsError, UnsupportedVersionError
from nvflare_rdma.fabric import TcpFabric, connect_tcp, listen_tcp
from nvflare_rdma.flare_compat import require_flare
from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import Runtime, this_runtime

log = get_logger(__name__)

MAX_CONNECTIONS_OF_SITE = 64
CLEAR_SCHEME, SECURE_SCHEME = "rdma", "srdma"
#: A URL with an IPv6 address: that, and the port.
_IPV6 = re.compile(r"[^/]*//\[([^\]]*)\]:?([^/?#]*)")


@dataclass(frozen=True)
class _Prepared:
    """A connector's parameters and the process's runtime, checked."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    runtime: Runtime


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


def _site(properties: dict[str, Any]) -> str:
    """Who is at the other end, as far as that is known: the name in the certificate, else the host, which on this host
    is nobody in particular ("")."""
    common_name = properties.get(DriverParams.PEER_CN.value)
    if common_name and common_name != "N/A":
        return str(common_name)
    host = str(properties[DriverParams.PEER_ADDR.value]).rpartition(":")[0]
    own = str(properties[DriverParams.LOCAL_ADDR.value]).rpartition(":")[0]
    return "" if host == own else host


class RdmaDriver(BaseDriver):
    """The driver that FLARE finds in `comm_driver_path` (`nvflare-rdma driver-path` prints it)."""

    def __init__(self) -> None:
        super().__init__()
        self._door: Door | None = None
        self._stopping = threading.Event()
        self._process = os.getpid()
        self._sites_lock = threading.Lock()
        #: Site -> its links, the oldest first; "" has those that are nobody's in particular.
        self._sites: dict[str, list[Link]] = {}
        self._opening = Pending()  # what FLARE does not know yet, and has left the door

    @staticmethod
    def supported_transports() -> list[str]:
        """FLARE's hook: the schemes of URLs that are this driver's."""
        return [CLEAR_SCHEME, SECURE_SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """FLARE's hook: FLARE has to send heartbeats, and TLS is supported."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: True}

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """FLARE's hook: the URLs to connect to and to listen at."""
        secure = requires_secure_connection(resources)
        hosts = (DriverParams.HOST.value, DriverParams.LISTEN_HOST.value)
        ipv6 = {key: f"[{resources[key]}]" for key in hosts if _is_ipv6(resources.get(key))} if resources else {}
        return get_tcp_urls(SECURE_SCHEME if secure else scheme, {**resources, **ipv6})  # type: ignore[no-any-return]

    # -- the two ways to start -----------------------------------------------------------------------------

    def listen(self, connector: ConnectorInfo) -> None:
        """FLARE's hook: take connections until `shutdown`."""
        self.connector = connector
        prepared = self._prepare(connector, ssl_server=True)
        fabric = prepared.runtime.tcp()

        def on_connection(sock: socket.socket, stream: ControlStream, admitted: Callable[[], None]) -> None:
            self._run(sock, stream, Role.PASSIVE, connector, fabric, prepared, admitted)

        def tls() -> ssl.SSLContext:
            # Made for each guest: certificates may be renewed.
            try:
                return cast(ssl.SSLContext, get_ssl_context(connector.params, True))
            except Exception as error:  # FLARE's code, which raises what it likes about a wrong file
                raise TlsError(f"this side can't use its certificates: {error}") from error

        listener = listen_tcp(prepared.host, prepared.port)
        self._door = Door(listener, tls if prepared.tls else None, fabric, on_connection, str(connector))
        if self._stopping.is_set():  # shut down before `shutdown` could see the door
            self._door.close()
        with prepared.runtime.shared.ports.shared(self._door):
            self._door.serve()

    def connect(self, connector: ConnectorInfo) -> None:
        """FLARE's hook: connect to the peer, and return when the connection has ended."""
        self.connector = connector
        prepared = self._prepare(connector, ssl_server=False)
        address = prepared.host, prepared.port
        try:
            sock, stream = dial(address, prepared.tls, self._opening)
            with sock:
                # To where the control stream came through: a name may have several addresses, and hosts.
                dial_rail = functools.partial(connect_tcp, sock.getpeername()[:2], GREETING_TIMEOUT)
                fabric = prepared.runtime.tcp(dial_rail)
                self._run(sock, stream, Role.ACTIVE, connector, fabric, prepared)
        except (OSError, RdmaError) as error:
            # A refused or dropped TCP connection is for FLARE's retry loop to report; what only we know is said here.
            if isinstance(error, RdmaError) and not self._stopping.is_set():
                log.error("can't connect to %s: %s", connector, error)
            raise

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

    def _prepare(self, connector: ConnectorInfo, ssl_server: bool) -> _Prepared:
        """What a connector's parameters and the settings say.

        A mistake in them is logged here and ends FLARE's retries, which would log it at debug level and go on.
        """
        params = connector.params
        try:
            require_flare("The rdma driver")
            use_huge_pages()
            if params.get(DriverParams.SCHEME.value) == SECURE_SCHEME:
                # FLARE knows its own secure schemes only; this is how a connection says the same.
                params[DriverParams.SECURE.value] = True
            return _Prepared(
                *_parse_address(params),
                get_ssl_context(params, ssl_server),
                this_runtime(),
            )
        except (ConfigError, UnsupportedVersionError, CommError) as error:
            connector.stopped.set()
            log.error("can't start %s: %s", connector, error)
            raise CommError(CommError.BAD_CONFIG, str(error)) from error
        except (OSError, RuntimeError) as error:
            # A certificate that can't be read may be on its way (rotation): FLARE tries again.
            log.error("can't start %s: %s", connector, error)
            raise

    def _run(
        self,
        sock: socket.socket,
        stream: ControlStream,
        role: Role,
        connector: ConnectorInfo,
        fabric: TcpFabric,
        prepared: _Prepared,
        admitted: Callable[[], None] = lambda: None,
    ) -> None:
        """Open a link on a control stream, make it known to FLARE, and receive until it ends."""
        with self._opening.track(sock):
            connection = self._make_connection(sock, stream, role, connector, fabric, prepared)
        assert connection.link is not None
        admitted()
        site = stream.site
        self._make_room(site, connection.link)
        try:
            self.add_connection(connection)
            if self._stopping.is_set():  # shut down before `shutdown` could see it
                connection.close()
            connection.link.run()
        finally:
            connection.link.close(0.0)
            self.close_connection(connection)
            with self._sites_lock:
                self._sites[site].remove(connection.link)
                if not self._sites[site]:
                    del self._sites[site]

    def _make_room(self, site: str, link: Link) -> None:
        """Count a connection of a site, and close the oldest if there are too many: one that is idle first."""
        with self._sites_lock:
            others = [other for other in self._sites.setdefault(site, []) if other.usable]
            self._sites[site].append(link)
        while site and len(others) >= MAX_CONNECTIONS_OF_SITE:
            oldest = next((other for other in others if other.idle), others[0])
            text = "%s has %d connections, which are the most for one site; the oldest is closed"
            log.warning(text, site, len(others))
            others.remove(oldest)
            oldest.close(0.0)

    def _make_connection(
        self,
        sock: socket.socket,
        stream: ControlStream,
        role: Role,
        connector: ConnectorInfo,
        fabric: TcpFabric,
        prepared: _Prepared,
    ) -> RdmaConnection:
        """A connection whose link is open."""
        properties = {
            DriverParams.PEER_ADDR.value: address_of(sock, peer=True),
            DriverParams.LOCAL_ADDR.value: address_of(sock, peer=False),
        }
        if stream.secure:
            certificate = stream.peer_certificate()
            properties[DriverParams.PEER_CN.value] = get_certificate_common_name(certificate) if certificate else "N/A"
        connection = RdmaConnection(connector, properties)
        fabrics = prepared.runtime.fabrics(fabric, sock)
        stream.site = _site(properties)
        connection.link = Link(stream, role, fabrics, prepared.runtime.context, connection.receive, connection.name)
        try:
            connection.link.open()
        except ssl.SSLError as error:
            # TLS 1.3: the server judges the client's certificate when the client's handshake is over already.
            raise TlsError(explain_tls(error, role is Role.PASSIVE)) from error
        return connection
