"""The control stream: one socket, clear or TLS, written by one thread while another reads.

TLS runs over memory BIOs: an OpenSSL connection must not be used by two threads at once, so its state is
locked for the moment of an encryption or decryption, while the socket itself is read and written freely.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any, cast

from nvflare_rdma.channel.sealing import Sealer, derive_key
from nvflare_rdma.errors import RdmaError, TlsError
from nvflare_rdma.fabric import keep_alive

_RECEIVE_BYTES = 256 * 1024
_SEND_BYTES = 256 * 1024
#: What OpenSSL says of a certificate by its dates (X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED).
_DATES = {9: "is not valid yet", 10: "has expired"}
NO_GOODBYE = "the peer closed the connection without a goodbye, as when its process ends"


class ControlStream:
    """Sends and receives bytes on one socket. TLS is used with `context`, and none if that is None; `server_side` says
    which side of TLS this is."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None = None, server_side: bool = False) -> None:
        self._sock = sock
        self._process = os.getpid()
        self.site = ""
        """Who is at the other end, as far as that was checked; "" for whoever it is."""
        self.ticket = b""
        """What opened the door; b"" where there was none."""
        self.through = ""
        """Whose port joins it with its peer's, for people; "" if it comes straight from there."""
        self._tls: ssl.SSLObject | None = None
        self._server_side = server_side
        self._tls_lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        if context is not None:
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)

    @property
    def secure(self) -> bool:
        """Whether the stream speaks TLS."""
        return self._tls is not None

    @property
    def alpn(self) -> str:
        """The protocol that both sides agreed on in the TLS handshake (ALPN); "" if they agreed on none."""
        return (self._tls.selected_alpn_protocol() or "") if self._tls is not None else ""

    def way(self, dialled: bool) -> str:
        """For people: whether there is TLS, and the port of the side that was dialled, or whose port leads there."""
        if self.through:
            return f"{'TLS' if self.secure else 'no TLS'}, through {self.through}"
        port: object = "unknown"
        with contextlib.suppress(OSError, IndexError):
            port = (self._sock.getpeername() if dialled else self._sock.getsockname())[1]
        return f"{'TLS' if self.secure else 'no TLS'}, port {port}"

    def peer_certificate(self) -> dict[str, Any] | None:
        """The peer's certificate as `ssl.SSLSocket.getpeercert` gives it, or None."""
        return dict(self._tls.getpeercert() or {}) if self._tls is not None else None

    def binding(self) -> bytes:
        """What only the two ends of this TLS connection have in common; b"" in clear mode.

        It is the client's Finished message (RFC 8446, section 4.4.4), a keyed digest of the whole handshake, with both
        certificates. Somebody in between who speaks TLS with each end has another one with each.
        """
        return (self._tls.get_channel_binding("tls-unique") or b"") if self._tls is not None else b""

    def sealer(self, key: bytes) -> Sealer:
        """What seals, or opens, chunks with the key that one side has given the other."""
        return Sealer(derive_key(key, self.ticket, self.binding()))

    def handshake(self, timeout: float) -> None:
        """Do the TLS handshake (nothing in clear mode).

        Raises:
            ssl.SSLError: the peers don't trust each other. OSError: the socket failed or timed out.
        """
        deadline = time.monotonic() + timeout
        if self._tls is not None:
            while True:
                # One deadline for all of it: a peer that sends a byte now and then would hold a thread for ever.
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError("the TLS handshake was not finished in time")
                self._sock.settimeout(remaining)
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._flush()
                    data = self._sock.recv(_RECEIVE_BYTES)
                    if not data:
                        raise ConnectionError("the peer closed the connection during the TLS handshake") from None
                    self._incoming.write(data)
                except ssl.SSLError:
                    # The alert that tells the peer why.
                    with contextlib.suppress(OSError):
                        self._flush()
                    raise
            self._flush()
        self._sock.settimeout(None)

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self._sock.sendall(data)

    def protect(self, messages: Iterable[bytes | memoryview]) -> bytes:
        """Return the bytes to send for `messages`, encrypted if the stream is secure. They must be sent in the order of
        these calls."""
        data = b"".join(messages)
        if self._tls is None:
            return data
        with self._tls_lock:
            view = memoryview(data)
            while view:
                view = view[self._tls.write(view) :]
            return self._outgoing.read()

    def send(self, data: bytes) -> None:
        """Send all of `data` (see `protect`). One thread at a time calls this, and not while `send_now` is called."""
        self._sock.sendall(data)

    def send_now(self, data: bytes) -> bytes:
        """Send what the socket takes at once, and return the rest, which is for `send`."""
        try:
            return data[self._sock.send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return data

    def receive(self, timeout: float) -> bytes | None:
        """Return what has come, waiting up to `timeout` seconds for it: b"" when the peer has closed the stream, None
        if nothing came (parts of a TLS record do not put that off). Raises OSError if the stream is broken, or was
        closed here: a TlsError if the peer refuses TLS, as it may do when the handshake of this side is over (TLS 1.3).

        One thread at a time. Unlike a socket's timeout, this one leaves `send` alone.
        """
        deadline, over = time.monotonic() + timeout, False
        while True:
            if self._tls is not None:
                # First what is there already: the peer's first message may have come with the end of its handshake.
                with self._tls_lock:
                    plain, ended = self._decrypt(self._tls)
                if plain or ended:
                    return plain
            if over:
                return None
            if self._sock.fileno() < 0:  # its number may be another socket's by now
                raise ConnectionError("the control stream was closed on this side")
            if not self._readable.poll(max(deadline - time.monotonic(), 0.0) * 1000):
                return None
            data = self._sock.recv(_RECEIVE_BYTES)
            if self._tls is None or not data:
                return data
            with self._tls_lock:
                self._incoming.write(data)
            over = time.monotonic() >= deadline

    # -- for bytes without messages ------------------------------------------------------------------------

    def receive_into(self, buffer: memoryview) -> int:
        """Put what has come into `buffer`, and return how much that is; wait for it if there is nothing. 0 when the
        peer has closed the stream. Raises OSError if it is broken. One thread at a time, and not one in `receive`."""
        if self._tls is None:
            return self._sock.recv_into(buffer)
        while True:
            with self._tls_lock:
                got, ended = self._decrypt_into(self._tls, buffer)
            if got or ended:
                return got
            data = self._sock.recv(_RECEIVE_BYTES)
            if not data:
                return 0
            with self._tls_lock:
                self._incoming.write(data)

    def send_part(self, data: memoryview, timeout: float) -> int:
        """Send a first part of `data`, and return how much that is. One thread at a time, as with `send`.

        Raises:
            TimeoutError: the socket did not take it within `timeout` seconds, and may have taken a part of it. OSError:
                the stream is broken.
        """
        part = data[:_SEND_BYTES]
        deadline, left = time.monotonic() + timeout, memoryview(self.protect([part]))
        while left:
            try:
                left = left[self._sock.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                if not self._writable.poll(max(deadline - time.monotonic(), 0.0) * 1000):
                    raise TimeoutError(f"the peer took nothing for {timeout:g} s") from None
        return len(part)

    def _decrypt_into(self, tls: ssl.SSLObject, buffer: memoryview) -> tuple[int, bool]:
        """How much could be decrypted, and whether the peer has ended the stream."""
        got = 0
        try:
            while got < len(buffer):
                # It is an int where there is a buffer, which the types of the standard library don't know.
                part = cast(int, tls.read(len(buffer) - got, cast(bytearray, buffer[got:])))
                if not part:
                    return got, True
                got += part
        except ssl.SSLWantReadError:
            return got, False
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return got, True
        except ssl.SSLError as error:
            raise TlsError(explain_tls(error, self._server_side)) from error
        return got, False

    def _decrypt(self, tls: ssl.SSLObject) -> tuple[bytes, bool]:
        """Everything that can be decrypted now, and whether the peer has ended the stream."""
        plain = bytearray()
        try:
            while part := tls.read(_RECEIVE_BYTES):
                plain += part
        except ssl.SSLWantReadError:
            return bytes(plain), False
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            pass
        except ssl.SSLError as error:
            raise TlsError(explain_tls(error, self._server_side)) from error
        return bytes(plain), True

    def close(self) -> None:
        """Close at once; a blocked `send` or `receive` fails. Callable from any thread, any number of times. A forked
        process closes its own descriptor only."""
        if self._process == os.getpid():
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def explain_loss(error: Exception, written: str) -> str:
    """What an error of the control stream means. `written` is what writing it has brought, if it failed: whoever reads
    it then only sees that it is closed."""
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return f"{NO_GOODBYE} ({error.strerror})"
    ours = isinstance(error, RdmaError) or not isinstance(error, OSError)
    return str(error) if ours or not written else f"{NO_GOODBYE} ({written})"


def explain_tls(error: ssl.SSLError, server_side: bool) -> str:
    """Say what an operator can change about a TLS failure."""
    this, other = ("server", "client") if server_side else ("client", "server")
    if isinstance(error, ssl.SSLCertVerificationError):
        if date := _DATES.get(error.verify_code):
            return (
                f"the {other}'s certificate {date}, by this side's clock: it needs a {other}.crt of now (`nvflare "
                "provision` issues one), or one of the two clocks is wrong"
            )
        return (
            f"the {other}'s certificate is not trusted here ({error.verify_message}): its {other}.crt and rootCA.pem "
            "must come from the same provisioning as this side's"
        )
    reason = (error.reason or str(error)).lower().replace("_", " ")
    if "alert certificate expired" in reason:
        return (
            f"the {other} does not take this side's certificate ({reason}): it has expired by the {other}'s clock; "
            f"this side needs a {this}.crt of now (`nvflare provision` issues one), or one of the two clocks is wrong"
        )
    if "alert unknown ca" in reason or "bad certificate" in reason or "certificate required" in reason:
        return (
            f"the {other} does not trust this side's certificate ({reason}): both must come from one provisioning, and "
            "be valid now"
        )
    if "peer did not return a certificate" in reason:
        return f"the {other} shows no certificate, but this connection requires mutual TLS (connection_security=mtls)"
    return f"TLS with the {other} failed: {reason}"
