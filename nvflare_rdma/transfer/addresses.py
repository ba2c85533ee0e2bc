"""Where a peer listens for data, how it tells others to get there, and which of that is dialled."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import addresses_of, listen_tcp
from nvflare_rdma.transfer.routes import TOKEN_BYTES

SERVER = "server"  # the root of its cells' names
TICKET_BYTES = 32
MAX_ADDRESSES = 16
#: Through the server's port and that of the peer's own parent.
_MAX_WAYS_THROUGH = 2
_NAT64, _COMPATIBLE = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96")


class Reach(Enum):
    """From where an address is the same host's. The value is what people call it."""

    HOST = "loopback"
    SEGMENT = "link-local"
    SITE = "private"
    WORLD = "global"


def site_of(cell: str) -> str:
    """The site whose cell it is, by the cell's name (FQCN)."""
    return cell.split(".", 1)[0]


def reach_of(address: str) -> Reach:
    """What an IP address is. One that stands for any address of this host is a loopback address.

    Raises:
        ValueError: it is no IP address.
    """
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if isinstance(ip, ipaddress.IPv6Address) and (inner := _embedded(ip)) is not None:
        ip = inner
    if ip.is_loopback or ip.is_unspecified:
        return Reach.HOST
    if ip.is_link_local:
        return Reach.SEGMENT
    special = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    return Reach.WORLD if ip.is_global and not special else Reach.SITE


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to: by 6to4 (RFC 3056), Teredo (RFC 4380), NAT64 (RFC 6052), or as an
    IPv4-compatible one (RFC 4291)."""
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip.teredo is not None:
        return ip.teredo[1]
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def resolve(host: str) -> list[str]:
    """The IP addresses of a host, in the order in which they are to be tried.

    Raises:
        OSError: the name is unknown. ValueError: it can't be a name.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [*dict.fromkeys(str(address[0]) for *_, address in found)]


def reach_of_host(host: str) -> Reach:
    """How far the most public address of a host reaches; `WORLD` if there is no host.

    Raises:
        OSError, ValueError: see `resolve`.
    """
    reaches = {reach_of(address) for address in resolve(host)} if host else set()
    return next(
        (reach for reach in (Reach.WORLD, Reach.SITE, Reach.SEGMENT, Reach.HOST) if reach in reaches), Reach.WORLD
    )


def may_be_named(address: str, server: Reach) -> bool:
    """Whether an address of this federation's hosts means the same host to its peers and may be told them, or be
    dialled if a peer names it. `server` is how far the federation's server can be reached: inside of one host or one
    private network, the addresses there are everybody's; else they are somebody else's in the network of a peer."""
    reach = reach_of(address)
    return reach is Reach.WORLD or reach is server or (server is Reach.HOST and reach is Reach.SITE)


class WayThrough(NamedTuple):
    """A way to a peer through a parent's port. The server's parent is where the dialling side finds the server, and
    `hosts` is for others; port 0 is the one in its server's URL."""

    at_server: bool
    hosts: Sequence[str]
    port: int
    token: bytes


class Invitation(NamedTuple):
    """What `PeerLinks.invite` says. Port 0 says that there is no straight way."""

    hosts: Sequence[str]
    port: int
    ticket: bytes
    through: Sequence[WayThrough] = ()

    def pack(self) -> dict[str, Any]:
        """For a message (msgpack types). Who does not know ways through a parent finds none in it."""
        packed: dict[str, Any] = {"hosts": list(self.hosts), "port": self.port, "ticket": self.ticket}
        if self.through:
            packed["through"] = [{**way._asdict(), "hosts": list(way.hosts)} for way in self.through]
        return packed


def parse_invitation(invitation: Any) -> Invitation:
    """Take apart what a peer's `PeerLinks.invite` made.

    Raises:
        ProtocolError: it is malformed.
    """
    match invitation:
        case {"hosts": hosts, "port": port, "ticket": bytes(ticket)} if (
            are_hosts(hosts) and type(port) is int and len(ticket) == TICKET_BYTES
        ):
            through = invitation.get("through", ())
            if isinstance(through, list | tuple) and len(through) <= _MAX_WAYS_THROUGH:
                ways = [_parse_way(way) for way in through]
                if (0 if ways else 1) <= port < 65536:
                    return Invitation(hosts, port, ticket, ways)
    raise ProtocolError("malformed invitation to a link")


def _parse_way(way: Any) -> WayThrough:
    match way:
        case {"at_server": bool(at_server), "hosts": hosts, "port": port, "token": bytes(token)} if (
            are_hosts(hosts)
            and type(port) is int
            and (0 if at_server else 1) <= port < 65536
            and len(token) == TOKEN_BYTES
        ):
            return WayThrough(at_server, hosts, port, token)
    raise ProtocolError("malformed invitation to a link: a way through a parent")


def are_hosts(hosts: Any) -> bool:
    """Whether it is a list of IP addresses that is not too long."""
    return (
        isinstance(hosts, list | tuple)
        and len(hosts) <= MAX_ADDRESSES
        and all(type(host) is str and _is_address(host) for host in hosts)
    )


def _is_address(host: str) -> bool:
    """Whether it is an IP address. A name would have this side ask name servers for what a peer wants, for as long as
    these take."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def listen(host: str, ports: tuple[int, int]) -> socket.socket:
    """Listen on the first free port of a range, both ends included. See `listen_tcp` for `host`.

    Raises:
        OSError: no port of it is free.
    """
    for port in range(ports[0], ports[1] + 1):
        try:
            return listen_tcp(host, port)
        except OSError as error:
            failure = error
    raise OSError(f"no port of {ports[0]} to {ports[1]} can be listened on (rdma_data_ports): {failure}") from failure


def own_hosts() -> list[str]:
    """The addresses of this host's interfaces that are up, without loopback and link-local ones."""
    known = [address for _, name in socket.if_nameindex() for address in addresses_of(name)]
    found = [str(address) for address in known if not (address.is_loopback or address.is_link_local)]
    return [*dict.fromkeys(found)][:MAX_ADDRESSES]


def loopback(server_host: str) -> str:
    """Return the address at which processes of this host find each other, one by which they find FLARE's server if that
    is on this host, too."""
    return "::1" if server_host == "::1" else "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether `host` is a name or an address of the loopback device."""
    return host == "localhost" or host.startswith("127.") or host == "::1"
