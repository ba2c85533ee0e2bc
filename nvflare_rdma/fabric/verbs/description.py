"""How the two sides of the verbs fabric tell each other where their queue pairs are, over the control stream.

The passive side's offer and the active side's answer have the same form (msgpack types):

    {"ports": [{"transport", "kind", "gid", "lid", "mtu", "max_message", "service"}, ...],
     "rails": [{"port", "number", "packet", "ticket"}, ...]}

`port` counts in `ports`; rail i of one side is connected to rail i of the other. InfiniBand and RoCE need the
queue pairs' `number` and `packet`. On iWARP rdma_cm connects them: the offer says on which TCP port (`service`)
it listens and gives each rail a `ticket` to come with, and the answer repeats the tickets of the rails that came.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.fabric.base import MAX_RAILS
from nvflare_rdma.fabric.verbs.devices import INFINIBAND, IWARP, ROCE, Gid

_KINDS = {INFINIBAND: ("IB",), ROCE: ("RoCE v1", "RoCE v2"), IWARP: ("iWARP",)}
MIN_MESSAGE = 64 * 1024
TICKET_BYTES = 32


@dataclass(frozen=True, slots=True)
class RemotePort:
    """A port of the peer. `mtu` is as ibv_mtu numbers them, 1 (256 bytes) to 5 (4096). A request has up to
    `max_message` bytes. `service` is where an iWARP port listens, else 0."""

    transport: str
    gid: Gid
    lid: int
    mtu: int
    max_message: int
    service: int = 0


@dataclass(frozen=True, slots=True)
class RemoteRail:
    """A rail of the peer: the `number` of its queue pair, and that of the first `packet` that it sends (PSN). `ticket`
    is empty but on iWARP."""

    port: RemotePort
    number: int
    packet: int
    ticket: bytes = b""


def describe(ports: Sequence[RemotePort], rails: Sequence[tuple[int, int, int, bytes]]) -> Mapping[str, Any]:
    """Describe this side. Each of the `rails` is (index of the port, number, packet, ticket)."""
    return {
        "ports": [
            {
                "transport": port.transport,
                "kind": port.gid.kind,
                "gid": port.gid.value.packed,
                "lid": port.lid,
                "mtu": port.mtu,
                "max_message": port.max_message,
                "service": port.service,
            }
            for port in ports
        ],
        "rails": [
            {"port": port, "number": number, "packet": packet, "ticket": ticket}
            for port, number, packet, ticket in rails
        ],
    }


def parse(description: Mapping[str, Any]) -> list[RemoteRail]:
    """Raises ProtocolError: it is malformed."""
    try:
        ports = [_parse_port(port) for port in _list(description, "ports")]
        rails = [_parse_rail(rail, ports) for rail in _list(description, "rails")]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        # Shortened: it may quote what the peer has sent.
        raise ProtocolError(f"the peer describes its verbs rails in a way that can't be: {error!r:.200}") from error
    return rails


def _parse_port(port: Mapping[str, Any]) -> RemotePort:
    transport, kind, packed = port["transport"], port["kind"], port["gid"]
    if kind not in _KINDS[transport]:
        raise ValueError(f"GID of kind {kind!r} with {transport}")
    if not isinstance(packed, bytes) or len(packed) != 16:
        raise ValueError("a GID has 16 bytes")
    gid = Gid(0, ipaddress.IPv6Address(packed), kind, "")
    return RemotePort(
        transport,
        gid,
        _integer(port, "lid", 0, 0xFFFF),
        _integer(port, "mtu", 1, 5),
        _integer(port, "max_message", MIN_MESSAGE, 1 << 31),
        _integer(port, "service", 0, 0xFFFF if transport == IWARP else 0),
    )


def _parse_rail(rail: Mapping[str, Any], ports: Sequence[RemotePort]) -> RemoteRail:
    port, ticket = ports[_integer(rail, "port", 0, len(ports) - 1)], rail["ticket"]
    if not isinstance(ticket, bytes) or len(ticket) != (TICKET_BYTES if port.transport == IWARP else 0):
        raise ValueError(f"no ticket for {port.transport}")
    return RemoteRail(
        port, _integer(rail, "number", 0, (1 << 24) - 1), _integer(rail, "packet", 0, (1 << 24) - 1), ticket
    )


def _list(description: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = description[key]
    if not isinstance(found, list) or not 0 < len(found) <= MAX_RAILS:
        raise ValueError(f"{key} is no list of 1 to {MAX_RAILS}")
    return found


def _integer(mapping: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = mapping[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{key}={value!r} is not from {low} to {high}")
    return value
