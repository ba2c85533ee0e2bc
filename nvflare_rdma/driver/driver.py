"""The F3 driver for ``rdma://`` and ``srdma://`` (TLS): sockets and threads as FLARE's TCP driver has them
(`nvflare.fuel.f3.drivers.tcp_driver`), with a channel link behind each connection.

One listening port serves the control streams and the rails of all peers. What a connection is shows in its
first bytes: a TLS record, the control stream's magic, or a rail's magic and ticket.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nvflare.fuel.f3.comm_config_utils import requires_secure_connection
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.base_driver import BaseDriver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverCap, DriverParams
from nvflare.fuel.f3.drivers.net_utils import MAX_FRAME_SIZE, get_ssl_context, get_tcp_urls
from nvflare.fuel.hci.security import get_certificate_common_name

from nvflare_rdma.channel.context import LinkContext
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.limits import ChannelLimits
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.state import Role
from nvflare_rdma.channel.wire import CONTROL_MAGIC
from nvflare_rdma.driver.blob_memory import use_huge_pages
from nvflare_rdma.driver.connection import RdmaConnection
from nvflare_rdma.errors import (
    ConfigError,
    ProtocolError,
    RdmaError,
    TlsError,
    UnsupportedVersionError,
)
from nvflare_rdma.fabric.base import Fabric
from nvflare_rdma.fabric.memory import MemoryBudget, SlotPool
from nvflare_rdma.fabric.selection import host_identity, probe
from nvflare_rdma.fabric.shm import ShmFabric
from nvflare_rdma.fabric.tcp import RAIL_MAGIC, TICKET_BYTES, TcpFabric
from nvflare_rdma.fabric.verbs_memory import RegistrationCache
from nvflare_rdma.flare_compat import require_flare
from nvflare_rdma.settings import Settings, load_settings

log = logging.getLogger(__name__)

CLEAR_SCHEME, SECURE_SCHEME = "rdma", "srdma"
_GREETING_TIMEOUT = 10.0
MAX_GUESTS = 256  # connections that have not shown yet what they are
_TLS_HANDSHAKE_RECORD = b"\x16"


_contexts: dict[Settings, tuple[LinkContext, RegistrationCache]] = {}
_contexts_lock = threading.Lock()


def _process_context(settings: Settings) -> tuple[LinkContext, RegistrationCache]:
    """The budget, pool and limits that all drivers of a process share: one, also if two start at once."""
    with _contexts_lock:
        if settings not in _contexts:
            registrations = RegistrationCache(settings.rdma_memory_budget_bytes)
            _contexts[settings] = _make_context(settings), registrations
        return _contexts[settings]


def _make_context(settings: Settings) -> LinkContext:
    return LinkContext(
        limits=ChannelLimits(max_message_bytes=MAX_FRAME_SIZE),
        budget=MemoryBudget(settings.rdma_memory_budget_bytes),
        pool=SlotPool(),
        order=settings.rdma_fabrics,
        unavailable={
            name: state.reason for name, state in probe(settings.verbs, settings.rdma_memory_budget_bytes).items()
        },
        host=host_identity(),
        controller=settings.rdma_controller,
        chunk_bytes=settings.rdma_chunk_bytes,
        integrity=settings.rdma_integrity,
    )


@dataclass(frozen=True)
class _Prepared:
    """A connector's parameters and the process's settings, checked."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    settings: Settings
    context: LinkContext
    registrations: RegistrationCache

    def fabrics(self, tcp: TcpFabric, sock: socket.socket) -> dict[str, Fabric]:
        """What a link whose control stream is on ``sock`` can use."""
        found: dict[str, Fabric] = {tcp.name: tcp, ShmFabric.name: ShmFabric()}
        if self.context.unavailable["verbs"] == "":
            # Not at the top: it needs pyverbs.
            from nvflare_rdma.fabric.verbs import VerbsFabric, address_on

            near = address_on(sock.getsockname()[0])
            found["verbs"] = VerbsFabric(self.settings.rdma_rails, self.settings.verbs, self.registrations, near)
        return found


def _parse_port(params: dict[str, Any]) -> int:
    raw = params.get(DriverParams.PORT.value)
    try:
        port = int(str(raw))
        if 0 < port < 65536:
            return port
    except ValueError:
        pass
    url = params.get(DriverParams.URL.value) or "the connector's parameters"
    raise ConfigError(f"bad port {raw!r} in {url}: give a whole number from 1 to 65535, as in rdma://host:8002")


def _address(sock: socket.socket, peer: bool) -> str:
    try:
        host, port = (sock.getpeername() if peer else sock.getsockname())[:2]
    except OSError:
        return "N/A"
    return f"{host}:{port}"


class RdmaDriver(BaseDriver):
    """Registered by FLARE through `comm_driver_path` (`nvflare-rdma driver-path` prints it)."""

    def __init__(self) -> None:
        super().__init__()
        self._listener: socket.socket | None = None
        self._stopping = threading.Event()
        self._opening: set[socket.socket] = set()  # not known to FLARE yet; guarded by conn_lock
        self._guests = threading.BoundedSemaphore(MAX_GUESTS)

    @staticmethod
    def supported_transports() -> list[str]:
        return [CLEAR_SCHEME, SECURE_SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: True}

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        secure = requires_secure_connection(resources)
        return get_tcp_urls(SECURE_SCHEME if secure else scheme, resources)  # type: ignore[no-any-return]

    # -- the two ways to start -----------------------------------------------------------------------------

    def listen(self, connector: ConnectorInfo) -> None:
        self.connector = connector
        prepared = self._prepare(connector, ssl_server=True)
        fabric = TcpFabric(prepared.settings.rdma_rails, congestion=prepared.settings.rdma_tcp_congestion)
        listener = socket.create_server((prepared.host, prepared.port))
        self._listener = listener
        with listener:
            while not self._stopping.is_set():
                try:
                    sock, _ = listener.accept()
                except OSError as error:
                    if not self._stopping.is_set():
                        # Out of descriptors, or the peer has gone again: the port stays open.
                        log.error("can't accept a connection on %s: %s", connector, error)
                        self._stopping.wait(0.1)
                    continue
                if not self._guests.acquire(blocking=False):
                    log.error("refused a connection: %d others have not finished their greeting", MAX_GUESTS)
                    sock.close()
                    continue
                try:
                    threading.Thread(
                        target=self._serve,
                        args=(sock, connector, prepared, fabric),
                        name=f"rdma-conn-{sock.fileno()}",
                        daemon=True,
                    ).start()
                except RuntimeError as error:
                    log.error("can't serve a connection: %s", error)
                    self._guests.release()
                    sock.close()

    def connect(self, connector: ConnectorInfo) -> None:
        self.connector = connector
        prepared = self._prepare(connector, ssl_server=False)
        dial = functools.partial(socket.create_connection, (prepared.host, prepared.port), _GREETING_TIMEOUT)
        sock = dial()
        try:
            with self._opening_on(sock):
                if prepared.tls is None:
                    sock.sendall(CONTROL_MAGIC)
                stream = self._greet(sock, prepared.tls, server_side=False)
                fabric = TcpFabric(prepared.settings.rdma_rails, dial, prepared.settings.rdma_tcp_congestion)
                connection = self._make_connection(sock, stream, Role.ACTIVE, connector, fabric, prepared)
            self._run(connection)
        except (OSError, RdmaError) as error:
            sock.close()
            # A refused or dropped TCP connection is for FLARE's retry loop to report; what only we know is said here.
            if isinstance(error, RdmaError) and not self._stopping.is_set():
                log.error("can't connect to %s: %s", connector, error)
            raise

    def shutdown(self) -> None:
        self._stopping.set()
        if self._listener is not None:
            # Wakes accept(); close() alone would leave it waiting.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
        with self.conn_lock:
            opening, connections = list(self._opening), list(self.connections.values())
        for sock in opening:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
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
            settings = load_settings()
            return _Prepared(
                params.get(DriverParams.HOST.value) or "",
                _parse_port(params),
                get_ssl_context(params, ssl_server),
                settings,
                *_process_context(settings),
            )
        except (ConfigError, UnsupportedVersionError, CommError) as error:
            connector.stopped.set()
            log.error("can't start %s: %s", connector, error)
            raise CommError(CommError.BAD_CONFIG, str(error)) from error
        except (OSError, RuntimeError) as error:
            # A certificate that can't be read may be on its way (rotation): FLARE tries again.
            log.error("can't start %s: %s", connector, error)
            raise

    def _serve(self, sock: socket.socket, connector: ConnectorInfo, prepared: _Prepared, fabric: TcpFabric) -> None:
        peer = _address(sock, peer=True)
        try:
            with self._opening_on(sock):
                try:
                    stream = self._identify(sock, prepared.tls, fabric, peer)
                finally:
                    self._guests.release()
                if stream is None:
                    return
                connection = self._make_connection(sock, stream, Role.PASSIVE, connector, fabric, prepared)
            self._run(connection)
        except (OSError, RdmaError) as error:
            sock.close()
            if not self._stopping.is_set():
                log.error("refused the connection from %s: %s", peer, error)

    def _identify(
        self, sock: socket.socket, tls: ssl.SSLContext | None, fabric: TcpFabric, peer: str
    ) -> ControlStream | None:
        """The control stream that a new connection turns out to be; None if it was a rail, or nothing."""
        sock.settimeout(_GREETING_TIMEOUT)
        first = sock.recv(1, socket.MSG_PEEK)
        if not first:
            sock.close()
            log.debug("%s connected and left again", peer)
            return None
        is_tls = first == _TLS_HANDSHAKE_RECORD
        if is_tls and tls is None:
            raise ProtocolError("it speaks TLS (srdma://), but this listener is clear (rdma://)")
        if not is_tls:
            magic = _receive(sock, len(RAIL_MAGIC))
            if magic == RAIL_MAGIC:
                if not fabric.admit(sock, _receive(sock, TICKET_BYTES)):
                    log.warning("refused a rail from %s: its ticket is unknown, used or expired", peer)
                return None
            if tls is not None:
                raise ProtocolError("it does not speak TLS, which this listener requires (srdma://)")
            if magic != CONTROL_MAGIC:
                raise ProtocolError("it is no nvflare-rdma peer; check the scheme in its URL")
        return self._greet(sock, tls, server_side=True)

    @staticmethod
    def _greet(sock: socket.socket, tls: ssl.SSLContext | None, server_side: bool) -> ControlStream:
        stream = ControlStream(sock, tls, server_side)
        try:
            stream.handshake(_GREETING_TIMEOUT)
        except ssl.SSLError as error:
            stream.close()
            raise TlsError(_explain_tls(error, server_side)) from error
        return stream

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
            DriverParams.PEER_ADDR.value: _address(sock, peer=True),
            DriverParams.LOCAL_ADDR.value: _address(sock, peer=False),
        }
        if stream.secure:
            certificate = stream.peer_certificate()
            properties[DriverParams.PEER_CN.value] = get_certificate_common_name(certificate) if certificate else "N/A"
        connection = RdmaConnection(connector, properties)
        fabrics = prepared.fabrics(fabric, sock)
        connection.link = Link(stream, role, fabrics, prepared.context, connection.receive, connection.name)
        try:
            connection.link.open()
        except ssl.SSLError as error:
            # TLS 1.3: the server judges the client's certificate when the client's handshake is over already.
            raise TlsError(_explain_tls(error, role is Role.PASSIVE)) from error
        return connection

    @contextlib.contextmanager
    def _opening_on(self, sock: socket.socket) -> Iterator[None]:
        """While the connection on ``sock`` is not known to FLARE, `shutdown` ends it through its socket."""
        with self.conn_lock:
            self._opening.add(sock)
            if self._stopping.is_set():  # `shutdown` has been by already
                sock.close()
        try:
            yield
        finally:
            with self.conn_lock:
                self._opening.discard(sock)

    def _run(self, connection: RdmaConnection) -> None:
        assert connection.link is not None
        try:
            self.add_connection(connection)
            if self._stopping.is_set():  # shut down before `shutdown` could see it
                connection.close()
            connection.link.run()
        finally:
            connection.link.close(0.0)
            self.close_connection(connection)


def _receive(sock: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes, all within the greeting timeout."""
    deadline = time.monotonic() + _GREETING_TIMEOUT
    data = b""
    while len(data) < size:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("it closed the connection in the middle of its greeting")
        data += part
    return data


def _explain_tls(error: ssl.SSLError, server_side: bool) -> str:
    """A TLS failure in terms of what an operator can change."""
    other, files = ("client", "client.crt and rootCA.pem") if server_side else ("server", "server.crt and rootCA.pem")
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the {other}'s certificate is not trusted here ({error.verify_message}): its {files} must come from "
            "the same provisioning as this side's"
        )
    reason = (error.reason or str(error)).lower().replace("_", " ")
    if "alert unknown ca" in reason or "bad certificate" in reason or "certificate required" in reason:
        return f"the {other} does not trust this side's certificate ({reason}): both must come from one provisioning"
    if "peer did not return a certificate" in reason:
        return f"the {other} shows no certificate, but this connection requires mutual TLS (connection_security=mtls)"
    return f"TLS with the {other} failed: {reason}"
