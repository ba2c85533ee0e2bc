"""What two processes say to a parent that joins their connections, and what each needs for it.

A route leads through a parent's port to one process. That process has the route's key, which the parent made for it.
It waits: it keeps connections to the parent open, each of which began with `RouteKey.waiting`. Whoever got a token of
the route in an invitation connects to the same port, and begins with `dialling`. The parent says `joined` to who waits,
and nothing to who dials: what that one reads is the other one's. A connection that can't be joined is closed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import struct
from dataclasses import dataclass

from nvflare_rdma.errors import ProtocolError

WAIT_MAGIC, ROUTE_MAGIC = b"NVFWAIT1", b"NVFROUT1"
_ID_BYTES, _SECRET_BYTES, _SITE_BYTES, _MAC_BYTES = 16, 32, 16, 32
TOKEN_BYTES = _ID_BYTES + _SITE_BYTES + _MAC_BYTES
#: What follows the magic: a token in hexadecimal digits.
DIALLING_BYTES = 2 * TOKEN_BYTES
_DIGITS = frozenset(b"0123456789abcdef")
_NUMBER = struct.Struct("!Q")
WAITING_BYTES = _ID_BYTES + _NUMBER.size + _MAC_BYTES
_JOINED = struct.Struct("!c16sH")
JOINED_BYTES = _JOINED.size
_YES = b"\x01"


@dataclass(frozen=True)
class RouteKey:
    """What a process needs to be reached by a route, and to tell others how."""

    id: bytes
    secret: bytes

    def __post_init__(self) -> None:
        if len(self.id) != _ID_BYTES or len(self.secret) != _SECRET_BYTES:
            raise ProtocolError("malformed key of a route")

    @classmethod
    def make(cls) -> RouteKey:
        """A new one, which nobody else can know."""
        return cls(secrets.token_bytes(_ID_BYTES), secrets.token_bytes(_SECRET_BYTES))

    def token(self, site: str) -> bytes:
        """What lets processes of `site` dial, as long as there is the route. The parent counts them as that site's."""
        whose = hashlib.sha256(site.encode()).digest()[:_SITE_BYTES]
        return self.id + whose + self._mac(b"dial" + whose)

    def waiting(self, number: int) -> bytes:
        """What a connection that waits begins with. The number is higher for each: what somebody has overheard is of no
        use to him."""
        packed = _NUMBER.pack(number)
        return WAIT_MAGIC + self.id + packed + self._mac(b"wait" + packed)

    def number_of(self, waiting: bytes) -> int:
        """The number in what a waiting connection began with, without the magic.

        Raises:
            ProtocolError: it does not have this key.
        """
        packed, mac = waiting[_ID_BYTES:-_MAC_BYTES], waiting[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(b"wait" + packed)):
            raise ProtocolError("it waits at a route that is another's")
        return int(_NUMBER.unpack(packed)[0])

    def dialler_of(self, token: bytes) -> bytes:
        """Whose token it is: a digest of the site.

        Raises:
            ProtocolError: it was not made with this key.
        """
        whose, mac = token[_ID_BYTES:-_MAC_BYTES], token[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(b"dial" + whose)):
            raise ProtocolError("its token was not made by who waits at the route")
        return whose

    def _mac(self, message: bytes) -> bytes:
        return hmac.digest(self.secret, message, "sha256")


def id_of(said: bytes) -> bytes:
    """The route that a token, or what a waiting connection has said, is for."""
    return said[:_ID_BYTES]


def dialling(token: bytes) -> bytes:
    """What a connection that is to be joined to a waiting one begins with. A peer has chosen the token, and the port
    where it is said: in hexadecimal digits it can be no command of another protocol."""
    return ROUTE_MAGIC + token.hex().encode()


def parse_dialling(said: bytes) -> bytes:
    """The token in what follows the magic.

    Raises:
        ProtocolError: it is none.
    """
    if len(said) != DIALLING_BYTES or not _DIGITS.issuperset(said):
        raise ProtocolError("its token is not in hexadecimal digits")
    return bytes.fromhex(said.decode())


def joined(address: tuple[str, int]) -> bytes:
    """What a waiting connection is told: it was joined with one from `address`."""
    ip = ipaddress.ip_address(address[0].split("%")[0])
    packed = ip.packed if ip.version == 6 else ipaddress.IPv6Address(f"::ffff:{ip}").packed
    return _JOINED.pack(_YES, packed, address[1])


def parse_joined(data: bytes) -> tuple[str, int]:
    """The address in what `joined` made.

    Raises:
        ProtocolError: it is something else.
    """
    yes, packed, port = _JOINED.unpack(data)
    if yes != _YES:
        raise ProtocolError("it joins no connections")
    ip = ipaddress.IPv6Address(packed)
    return str(ip.ipv4_mapped or ip), port
