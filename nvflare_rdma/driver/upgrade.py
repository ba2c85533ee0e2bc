"""The driver that takes over FLARE's schemes `tcp` and `stcp` where `rdma_upgrade` is set.

It speaks this package's protocol with peers that have it in the same version, and FLARE's own tcp protocol with all
others, on the same port. Over TLS, peers agree by ALPN (RFC 7301). In the clear, whoever dials begins with `preface`
and waits for `ANSWER`. For FLARE's own driver the preface is a frame that is too long, which makes it close the
connection at once; the dialling side then dials again, in FLARE's words.
"""

from __future__ import annotations

import functools
import logging
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any

from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver

from nvflare_rdma.channel import (
    GREETING_TIMEOUT,
    ControlStream,
    Door,
    address_of,
    dial,
)
from nvflare_rdma.channel.protocol import VERSION
from nvflare_rdma.driver.driver import Prepared, RdmaDriver, name_of
from nvflare_rdma.driver.flare_words import FlareConnection, receive_hello
from nvflare_rdma.driver.sites import certified_site_of
from nvflare_rdma.errors import (
    ConfigError,
    RdmaError,
    TlsError,
    UnreachableError,
    UnsupportedVersionError,
)
from nvflare_rdma.fabric import TcpFabric, connect_tcp
from nvflare_rdma.flare_compat import take_over_schemes
from nvflare_rdma.logs import get_logger
from nvflare_rdma.settings import wants_upgrade

log = get_logger(__name__)

#: What a connection begins with that asks for this package's protocol; the version follows. As the prefix of a frame of
#: FLARE's, it has a length above FLARE's limit.
MAGIC = b"\xff\xff\xff\xffNVFU"
_VERSION = struct.Struct("!8sQ")
ANSWER = b"NVFUPGR1"
#: For log lines.
OURS, FLARES = "nvflare-rdma's protocol", "FLARE's tcp"
#: So long a peer that has refused is not asked again, unless it may have been replaced meanwhile.
SPEAKS_FLARES_SECONDS = 60.0
_NO_PROTOCOL = "no application protocol"


def preface(version: int) -> bytes:
    """What asks for a version of this package's protocol, in the clear. It is as long as the prefix of FLARE's frames:
    FLARE's own driver waits for nothing more."""
    return _VERSION.pack(MAGIC, version)


def alpn(version: int) -> str:
    """The same in TLS."""
    return f"nvflare-rdma/{version}"


def take_over_where_asked() -> None:
    """Where the setting `rdma_upgrade` says so, take over FLARE's schemes in this process."""
    try:
        if wants_upgrade():
            take_over_schemes(UpgradedTcpDriver)
            log.info("rdma_upgrade is set: the schemes tcp and stcp are nvflare-rdma's in this process")
    except (ConfigError, UnsupportedVersionError) as error:
        log.error("%s FLARE's own driver keeps the schemes tcp and stcp.", error)


class UpgradedTcpDriver(RdmaDriver):
    """FLARE's schemes `tcp` and `stcp`, for peers that have this package and for those that have not."""

    secure_scheme = "stcp"
    feature = "rdma_upgrade"
    version = VERSION

    def __init__(self) -> None:
        super().__init__()
        #: Why the peer of this connector is spoken to in FLARE's words, and since when.
        self._known: tuple[str, float] | None = None

    @staticmethod
    def supported_transports() -> list[str]:
        """FLARE's hook: the schemes of URLs that are this driver's."""
        return list(TcpDriver.supported_transports())

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """FLARE's hook: what FLARE's own driver can do."""
        return dict(TcpDriver.capabilities())

    def _tls_context(self, params: dict[str, Any], ssl_server: bool) -> ssl.SSLContext | None:
        context = super()._tls_context(params, ssl_server)
        if context is not None and (ssl_server or not self._known_reason()):
            context.set_alpn_protocols([alpn(self.version)])
        return context

    # -- listening -----------------------------------------------------------------------------------------

    def _make_door(self, prepared: Prepared, fabric: TcpFabric) -> Door:
        door = super()._make_door(prepared, fabric)
        if prepared.tls is None:
            door.takers[MAGIC] = functools.partial(self._answer, prepared, fabric, door.complain)
            door.stranger = functools.partial(self._welcome_stranger, prepared)
        return door

    def _welcome(
        self,
        sock: socket.socket,
        stream: ControlStream,
        fabric: TcpFabric,
        prepared: Prepared,
        admitted: Callable[[], None],
    ) -> None:
        if stream.alpn or not stream.secure:
            reason = f"it offers {stream.alpn} in TLS" if stream.secure else "it begins with it"
            self._welcome_ours(sock, stream, fabric, reason, prepared, admitted)
        else:
            self._welcome_flares(
                sock, stream, b"", f"it does not offer {alpn(self.version)} in TLS", prepared, admitted
            )

    def _welcome_ours(
        self,
        sock: socket.socket,
        stream: ControlStream,
        fabric: TcpFabric,
        reason: str,
        prepared: Prepared,
        admitted: Callable[[], None],
    ) -> None:
        def let_in() -> None:
            admitted()
            _say(prepared, sock, OURS, reason)  # not before: guests may come by the thousand

        super()._welcome(sock, stream, fabric, prepared, let_in)

    def _answer(
        self,
        prepared: Prepared,
        fabric: TcpFabric,
        complain: Callable[..., None],
        sock: socket.socket,
        seconds: float,
        admitted: Callable[[], None],
    ) -> None:
        """Serve a guest that has begun with the preface."""
        with self._opening.track(sock):
            _, version = _VERSION.unpack(MAGIC + _receive(sock, _VERSION.size - len(MAGIC), seconds))
            if version != self.version:
                # For its driver that is an answer, after which it comes again.
                text = "%s: %s asks for version %d of %s, which is not this side's (%d), and has to speak %s"
                name, peer = name_of(prepared.connector), address_of(sock, peer=True)
                complain(logging.INFO, text, name, peer, version, OURS, self.version, FLARES)
                sock.close()
                return
            sock.sendall(ANSWER)
            sock.settimeout(None)
        self._welcome_ours(sock, ControlStream(sock), fabric, "it asks for it", prepared, admitted)

    def _welcome_stranger(
        self, prepared: Prepared, sock: socket.socket, first: bytes, admitted: Callable[[], None]
    ) -> None:
        self._welcome_flares(sock, ControlStream(sock), first, "it begins with that", prepared, admitted)

    def _welcome_flares(
        self,
        sock: socket.socket,
        stream: ControlStream,
        first: bytes,
        reason: str,
        prepared: Prepared,
        admitted: Callable[[], None],
    ) -> None:
        with self._opening.track(sock):
            hello = receive_hello(stream, first, GREETING_TIMEOUT)
        admitted()
        _say(prepared, sock, FLARES, reason)
        self._run_flares(FlareConnection(sock, stream, prepared.connector, hello))

    # -- dialling ------------------------------------------------------------------------------------------

    def connect(self, connector: ConnectorInfo) -> None:
        """FLARE's hook: connect to the peer, and return when the connection has ended."""
        try:
            super().connect(connector)
        except (OSError, RdmaError):
            self._known = None  # who is there next time may be another one
            raise

    def _dial(self, prepared: Prepared) -> None:
        sock, stream, reason = self._dial_clear(prepared) if prepared.tls is None else self._dial_tls(prepared)
        with sock:
            if not reason:
                self._run_dialled(sock, stream, prepared)
                return
            _say(prepared, sock, FLARES, reason)
            connection = FlareConnection(sock, stream, prepared.connector)
            self._run_flares(connection)
            if connection.heard:
                self._known = None  # it has ended, and who comes back may be another one

    def _dial_clear(self, prepared: Prepared) -> tuple[socket.socket, ControlStream, str]:
        """The socket, the stream, and why FLARE's words are to be spoken on it; "" for this package's own."""
        address = prepared.host, prepared.port
        if not (reason := self._known_reason()):
            sock = _connect(address)
            try:
                with self._opening.track(sock):
                    reason = _ask(sock, self.version)
            except BaseException:
                sock.close()
                raise
            if not reason:
                _say(prepared, sock, OURS, "it has it, too")
                return sock, ControlStream(sock), ""
            sock.close()
            if self._stopping.is_set():
                raise ConnectionAbortedError("this side shuts down")
            self._known = reason, time.monotonic()
        sock = _connect(address)
        return sock, ControlStream(sock), reason

    def _dial_tls(self, prepared: Prepared) -> tuple[socket.socket, ControlStream, str]:
        """As `_dial_clear`."""
        address, reason = (prepared.host, prepared.port), self._known_reason()
        try:
            sock, stream = dial(address, prepared.tls, self._opening)
        except TlsError as error:
            if reason or _NO_PROTOCOL not in str(error.__cause__).lower().replace("_", " "):
                raise
            reason = f"it refuses a TLS handshake that offers {alpn(self.version)}"
            self._known = reason, time.monotonic()
            sock, stream = dial(address, self._tls_context(prepared.connector.params, False), self._opening)
        if stream.alpn:
            _say(prepared, sock, OURS, f"it takes {stream.alpn} in TLS")
            return sock, stream, ""
        return sock, stream, reason or f"it does not take {alpn(self.version)} in TLS"

    def _known_reason(self) -> str:
        """Why the peer is spoken to in FLARE's words without asking it; "" if it is to be asked."""
        if self._known is None:
            return ""
        reason, since = self._known
        ago = time.monotonic() - since
        return f"{reason}, {ago:.0f} s ago" if ago < SPEAKS_FLARES_SECONDS else ""

    # -- both ----------------------------------------------------------------------------------------------

    def _run_flares(self, connection: FlareConnection) -> None:
        """Make a connection that speaks FLARE's words known to FLARE, and receive until it ends."""
        # An address says nothing here: many sites may be behind one, and FLARE's own driver takes them all.
        with self._sites.counted(certified_site_of(connection.get_conn_properties()), connection):
            try:
                self._introduce(connection)
                connection.read_loop()
            finally:
                connection.close()
                self.close_connection(connection)


def _say(prepared: Prepared, sock: socket.socket, protocol: str, reason: str) -> None:
    log.info(
        "%s: %s is spoken with %s, as %s", name_of(prepared.connector), protocol, address_of(sock, peer=True), reason
    )


def _connect(address: tuple[str, int]) -> socket.socket:
    try:
        sock = connect_tcp(address, GREETING_TIMEOUT)
    except TimeoutError as error:
        raise UnreachableError(f"timed out: nothing answered within {GREETING_TIMEOUT:g} s") from error
    sock.settimeout(None)
    return sock


def _ask(sock: socket.socket, version: int) -> str:
    """Ask whether the peer speaks this package's protocol. Returns why not; "" if it does."""
    try:
        sock.sendall(preface(version))
        answer = _receive(sock, len(ANSWER), GREETING_TIMEOUT)
        sock.settimeout(None)
    except TimeoutError:
        return f"it did not answer for {GREETING_TIMEOUT:g} s when it was asked for more"
    except OSError:
        return "it closed the connection when it was asked for more"
    return "" if answer == ANSWER else "it gave another answer when it was asked for more"


def _receive(sock: socket.socket, size: int, seconds: float) -> bytes:
    """Exactly `size` bytes, within so many seconds."""
    deadline, data = time.monotonic() + seconds, b""
    while len(data) < size:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("it closed the connection in the middle of its greeting")
        data += part
    return data
