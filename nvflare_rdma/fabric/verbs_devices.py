"""RDMA devices as the kernel shows them (sysfs, Documentation/ABI/stable/sysfs-class-infiniband), and the choice of a
port and a GID. Needs no pyverbs, so that a machine without it can still be told what it has.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.fabric.interfaces import IPAddress, addresses_of

SYSFS = Path("/sys/class/infiniband")
INFINIBAND, ROCE, IWARP = "InfiniBand", "RoCE", "iWARP"
_ROCE_V2 = "RoCE v2"


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's GID table. ``kind``: "IB", "RoCE v1" or "RoCE v2"; ``netdev``: the interface it is for.
    "iWARP": an address of the port's interface, numbered in the kernel's order."""

    index: int
    value: ipaddress.IPv6Address
    kind: str
    netdev: str

    @property
    def address(self) -> IPAddress:
        """The IP address that a RoCE GID stands for (RoCE v2 annex A17)."""
        return self.value.ipv4_mapped or self.value

    @property
    def family(self) -> str:
        """Two GIDs reach each other only within a family."""
        return f"{self.kind} over IPv{self.address.version}" if self.kind != "IB" else "InfiniBand"

    def __str__(self) -> str:
        where = f" on {self.netdev}" if self.netdev else ""
        return f"GID {self.index} ({self.kind}, {self.address}{where})"


@dataclass(frozen=True, slots=True)
class PortInfo:
    """``transport``: `INFINIBAND`, `ROCE` or `IWARP`. ``software``: the kernel emulates it (rxe, siw)."""

    device: str
    number: int
    transport: str
    software: bool
    state: str
    rate: str
    gids: tuple[Gid, ...]

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"

    def __str__(self) -> str:
        kind = f"software {self.transport}" if self.software else self.transport
        return f"{self.device} port {self.number} ({kind}, {self.rate})"


@dataclass(frozen=True, slots=True)
class VerbsOptions:
    """``devices``: names, or name:port, that rails are spread over; () for the best one. ``software``: it may be one
    that the kernel emulates. ``ack_timeout``: 4.096 us * 2^n without an answer, then a queue pair sends again (a device
    may wait up to four times as long); it has to be longer than the round trip. ``retries``: so often before it fails;
    7 is without end for some devices."""

    devices: tuple[str, ...] = ()
    gid_index: int | None = None
    software: bool = False
    ack_timeout: int = 16
    retries: int = 6


def list_ports(sysfs: Path = SYSFS) -> list[PortInfo]:
    """All ports of all RDMA devices, by name. Empty where the kernel has none."""
    found = []
    for device in sorted(sysfs.iterdir()) if sysfs.is_dir() else []:
        for port in sorted(device.glob("ports/*"), key=lambda path: int(path.name)):
            found.append(_read_port(device, port))
    return found


def _read_port(device: Path, port: Path) -> PortInfo:
    if "RNIC" in _read(device / "node_type"):
        transport = IWARP
    else:
        transport = INFINIBAND if _read(port / "link_layer") == INFINIBAND else ROCE
    # rxe and siw have no hardware behind them; before Linux 6.11 they said that of their network interface.
    software = "/virtual/" in str(device.resolve()) or (device / "parent").exists()
    state = _read(port / "state").partition(": ")[2] or "unknown"
    gids = tuple(_read_gids(port, transport))
    if transport == IWARP:
        gids = tuple(_read_addresses(device, gids))
    return PortInfo(device.name, int(port.name), transport, software, state, _read(port / "rate"), gids)


def _read_gids(port: Path, transport: str) -> list[Gid]:
    gids: list[Gid] = []
    for entry in sorted((port / "gids").glob("*"), key=lambda path: int(path.name)):
        text = _read(entry)
        if not text.strip("0:"):
            # Tables have up to 1024 entries, nearly all empty; the kernel fills them from the start, but leaves
            # holes where an address was removed.
            if len(gids) + 16 < int(entry.name):
                break
            continue
        try:
            value = ipaddress.IPv6Address(text)
        except ValueError:
            continue
        kind = _read(port / "gid_attrs" / "types" / entry.name).replace("IB/RoCE v1", "RoCE v1")
        if transport == INFINIBAND:
            kind = "IB"
        gids.append(Gid(int(entry.name), value, kind, _read(port / "gid_attrs" / "ndevs" / entry.name)))
    return gids


def _read_addresses(device: Path, gids: Sequence[Gid]) -> list[Gid]:
    """An iWARP port's own GID is a MAC address: it is reached by the addresses of its interface. An address of one
    link only does not do: it needs the name of the interface, which the peer can't know."""
    netdevs = {gid.netdev: 0 for gid in gids if gid.netdev} or [path.name for path in device.glob("device/net/*")]
    found = [(address, netdev) for netdev in netdevs for address in addresses_of(netdev) if not address.is_link_local]
    values = (ipaddress.IPv6Address(f"::ffff:{a}") if a.version == 4 else a for a, _ in found)
    return [Gid(n, value, IWARP, found[n][1]) for n, value in enumerate(values)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""  # the kernel answers EINVAL for what an entry does not have


def choose_ports(ports: Sequence[PortInfo], options: VerbsOptions) -> list[PortInfo]:
    """The ports to use: those that ``options`` name, else the best one.

    Raises:
        FabricUnavailable: there is none, or not the one that was asked for; says why and what to do.
    """
    if not ports:
        raise FabricUnavailable(
            "no RDMA device: the kernel shows none in /sys/class/infiniband (an adapter's driver may not be loaded; "
            "see `rdma link` and `lspci`)"
        )
    if options.devices:
        return [_find(ports, name) for name in options.devices]
    usable = [port for port in ports if port.active and (options.software or not port.software)]
    if not usable:
        down = [port for port in ports if options.software or not port.software]
        if down:
            states = ", ".join(f"{port.device}:{port.number} is {port.state}" for port in down)
            raise FabricUnavailable(f"no RDMA port is active: {states} (cable, `ip link set ... up`, subnet manager)")
        names = ", ".join(port.device for port in ports)
        raise FabricUnavailable(
            f"only software RDMA here ({names}), which is slower than tcp: it is used only when asked for by name "
            f"(rdma_device={ports[0].device}) or by rdma_fabrics=verbs"
        )
    usable.sort(key=lambda port: (port.software, -_gigabits(port.rate)))
    return usable[:1]


def _find(ports: Sequence[PortInfo], wanted: str) -> PortInfo:
    device, _, number = wanted.partition(":")
    same = [port for port in ports if port.device == device]
    found = [port for port in same if number in ("", str(port.number))]
    if not found:
        have = ", ".join(f"{port.device}:{port.number}" for port in ports)
        raise FabricUnavailable(f"rdma_device={wanted}: there is no such device or port here. There is: {have}.")
    best = max(found, key=lambda port: port.active)
    if not best.active:
        raise FabricUnavailable(
            f"rdma_device={wanted}: port {best.number} is {best.state}, not ACTIVE (cable, `ip link set ... up`, "
            "subnet manager)"
        )
    return best


def _gigabits(rate: str) -> float:
    try:
        return float(rate.split()[0])
    except (IndexError, ValueError):
        return 0.0


def choose_gid(
    port: PortInfo, options: VerbsOptions, near: IPAddress | None = None, family: str = ""
) -> tuple[Gid, str]:
    """The GID to use on a port, and why.

    ``near``: this side's address on the control stream; the network that reaches the peer already is the best guess.
    ``family``: what the peer's GID is, see `Gid.family`; "" if it is not known yet.

    Raises:
        FabricUnavailable: the port has none, or none of that family, or not the one that was asked for.
    """
    wanted = options.gid_index
    if wanted is not None:
        for gid in port.gids:
            if gid.index == wanted:
                if family and gid.family != family:
                    raise FabricUnavailable(f"{port}: the peer uses {family}, rdma_gid_index={wanted} is {gid.family}")
                return gid, "rdma_gid_index"
        have = ", ".join(map(str, port.gids)) or "none"
        raise FabricUnavailable(f"{port} has no GID of rdma_gid_index={wanted}. There is: {have}.")
    gids = [gid for gid in port.gids if not family or gid.family == family]
    if not gids:
        have = ", ".join(sorted({gid.family for gid in port.gids})) or "none"
        what = f"GID for {family}, which the peer uses" if family else "GID (its interface needs an IP address)"
        raise FabricUnavailable(f"{port} has no {what}. There is: {have}.")
    return min(((gid, _why(gid, near)) for gid in gids), key=lambda choice: _RANK[choice[1]])


_RANK = {
    reason: rank
    for rank, reason in enumerate(
        (
            "the address of the control stream",
            "RoCE v2, routable IPv4",
            "RoCE v2, routable IPv6",
            "iWARP, IPv4",
            "iWARP, IPv6",
            "InfiniBand",
            "RoCE v2, this link only",
            "RoCE v1, not routable",
        )
    )
}


def _why(gid: Gid, near: IPAddress | None) -> str:
    if gid.kind == "IB":
        return "InfiniBand"
    if gid.kind == "RoCE v1":
        return "RoCE v1, not routable"
    if gid.address == near:
        return "the address of the control stream"
    if gid.kind != _ROCE_V2:
        return f"iWARP, IPv{gid.address.version}"
    if gid.address.is_link_local:
        return "RoCE v2, this link only"
    return f"RoCE v2, routable IPv{gid.address.version}"
