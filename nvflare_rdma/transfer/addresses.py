"""Where a peer listens for data, and how it tells others to get there."""

from __future__ import annotations

import socket
from typing import Any

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import addresses_of, listen_tcp

TICKET_BYTES = 32
MAX_ADDRESSES = 16


def parse_invitation(invitation: Any) -> tuple[list[str], int, bytes]:
    """Take apart what a peer's `PeerLinks.invite` made: hosts, port and ticket.

    Raises:
        ProtocolError: it is malformed.
    """
    match invitation:
        case {"hosts": [*hosts], "port": port, "ticket": bytes(ticket)} if (
            len(hosts) <= MAX_ADDRESSES
            and all(type(host) is str for host in hosts)
            and type(port) is int
            and 0 < port < 65536
            and len(ticket) == TICKET_BYTES
        ):
            return hosts, port, ticket
    raise ProtocolError("malformed invitation to a link")


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
    """Names that others may reach this host by: the addresses of its interfaces that are up, and its own name."""
    known = [address for _, name in socket.if_nameindex() for address in addresses_of(name)]
    found = [str(address) for address in known if not (address.is_loopback or address.is_link_local)]
    return [*dict.fromkeys([*found, socket.gethostname()])][:MAX_ADDRESSES]


def loopback(server_host: str) -> str:
    """Return the address at which processes of this host find each other, one by which they find FLARE's server if that
    is on this host, too."""
    return "::1" if server_host == "::1" else "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether `host` is a name or an address of the loopback device."""
    return host == "localhost" or host.startswith("127.") or host == "::1"
