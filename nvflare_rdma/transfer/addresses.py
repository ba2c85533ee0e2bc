"""Where a side listens for data, and what it tells others about how they get there."""

from __future__ import annotations

import socket
from typing import Any

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric import addresses_of

TICKET_BYTES = 32
MAX_ADDRESSES = 16


def parse_invitation(invitation: Any) -> tuple[list[str], int, bytes]:
    """Hosts, port and ticket of what a peer's `PeerLinks.invite` made. Raises ProtocolError."""
    match invitation:
        case {"hosts": [*hosts], "port": port, "ticket": bytes(ticket)} if (
            len(hosts) <= MAX_ADDRESSES
            and all(type(host) is str for host in hosts)
            and type(port) is int
            and 0 < port < 65536
            and len(ticket) == TICKET_BYTES
        ):
            return hosts, port, ticket
    raise ProtocolError("malformed invitation to a data channel")


def listen(host: str, ports: tuple[int, int]) -> socket.socket:
    """On the first port of the range (both ends included) that is free. Raises OSError."""
    for port in range(ports[0], ports[1] + 1):
        try:
            return socket.create_server((host, port))
        except OSError as error:
            failure = error
    raise OSError(f"no port of {ports[0]} to {ports[1]} can be listened on (rdma_data_ports): {failure}") from failure


def own_hosts() -> list[str]:
    """What others may reach this host by: its name, and the addresses of its interfaces that are up."""
    known = [address for _, name in socket.if_nameindex() for address in addresses_of(name)]
    found = [str(address) for address in known if not (address.is_loopback or address.is_link_local)]
    return [*dict.fromkeys([*found, socket.gethostname()])][:MAX_ADDRESSES]


def is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"
