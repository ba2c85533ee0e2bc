"""RDMA devices as the kernel shows them (sysfs, Documentation/ABI/stable/sysfs-class-infiniband), and the choice of a
port and a GID. Needs no pyverbs, so that a machine without it can still be told what it has.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.fabric.interfaces import IPAddress, addresses_of
from nvflare_rdma.fabric.options import SYSFS, VerbsOptions

INFINIBAND, ROCE, IWARP = "InfiniBand", "RoCE", "iWARP"
_LINK_LAYERS = {"InfiniBand": INFINIBAND, "Ethernet": ROCE}
_ROCE_V2 = "RoCE v2"
#: What only siw calls itself. Before Linux 6.11 its devices were found below those of their network interface.
_SIW = "Software iWARP stack"


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's GID table, of the `kind` "IB", "RoCE v1" or "RoCE v2", for the interface `netdev`. The kind
    "iWARP" is an address of the port's interface, numbered in the kernel's order."""

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
        """The family of the GID. Two GIDs reach each other only within a family."""
        if self.kind.startswith((ROCE, IWARP)):
            return f"{self.kind} over IPv{self.address.version}"
        return INFINIBAND if self.kind == "IB" else self.kind

    def __str__(self) -> str:
        where = f" on {self.netdev}" if self.netdev else ""
        return f"GID {self.index} ({self.kind}, {self.address}{where})"


@dataclass(frozen=True, slots=True)
class PortInfo:
    """A port of an RDMA device. `transport` is `INFINIBAND`, `ROCE`, `IWARP` or what else the kernel calls it;
    `software` says that the kernel emulates it (rxe, siw)."""

    device: str
    number: int
    transport: str
    software: bool
    state: str
    rate: str
    gids: tuple[Gid, ...]

    @property
    def active(self) -> bool:
        """Whether the port has a link."""
        return self.state == "ACTIVE"

    @property
    def refusal(self) -> str:
        """Why no rail can be made on it, whatever its state; "" if one can. EFA ("unspecified") and usNIC have no
        reliable connections."""
        return "" if self.transport in (INFINIBAND, ROCE, IWARP) else "has no reliable connections (RC)"

    def __str__(self) -> str:
        kind = f"software {self.transport}" if self.software else self.transport
        return f"{self.device} port {self.number} ({kind}, {self.rate})"


def list_ports(sysfs: Path = SYSFS) -> list[PortInfo]:
    """All ports of all RDMA devices, by name. Empty where the kernel has none."""
    devices = sysfs / "class/infiniband"
    return [
        _read_port(devices / device, number)
        for device in _names(devices)
        for number in _numbers(devices / device / "ports")
    ]


def _read_port(device: Path, number: int) -> PortInfo:
    port = device / "ports" / str(number)
    node_type = _read(device / "node_type").partition(": ")[2]
    if node_type == "RNIC":
        transport = IWARP
    elif node_type == "CA":
        transport = _LINK_LAYERS.get(_read(port / "link_layer"), "unknown")
    else:
        transport = node_type or "unknown"
    # rxe names its network interface as its parent, and nothing else does.
    software = (
        "/devices/virtual/" in str(device.resolve())
        or (device / "parent").exists()
        or _read(device / "node_desc") == _SIW
    )
    state = _read(port / "state").partition(": ")[2] or "unknown"
    rate = _read(port / "rate").partition(" (")[0] or "unknown rate"
    gids = tuple(_read_gids(port, transport))
    if transport == IWARP:
        gids = tuple(_read_addresses(device, gids))
    return PortInfo(device.name, number, transport, software, state, rate, gids)


def _read_gids(port: Path, transport: str) -> list[Gid]:
    """The entries in use. Most of a table is empty, with holes where addresses were removed: any may be the last."""
    gids: list[Gid] = []
    for index in _numbers(port / "gids"):
        text = _read(port / "gids" / str(index))
        kind = _kind(port, index, transport) if text.strip("0:") else ""
        if not kind:
            continue
        with contextlib.suppress(ValueError):
            value = ipaddress.IPv6Address(text)
            gids.append(Gid(index, value, kind, _read(port / "gid_attrs/ndevs" / str(index))))
    return gids


def _read_addresses(device: Path, gids: Sequence[Gid]) -> list[Gid]:
    """An iWARP port's own GID is a MAC address: it is reached by the addresses of its interface. An address of one
    link only does not do: it needs the name of the interface, which the peer can't know."""
    netdevs = {gid.netdev: 0 for gid in gids if gid.netdev} or [path.name for path in device.glob("device/net/*")]
    found = [(address, netdev) for netdev in netdevs for address in addresses_of(netdev) if not address.is_link_local]
    values = (ipaddress.IPv6Address(f"::ffff:{a}") if a.version == 4 else a for a, _ in found)
    return [Gid(n, value, IWARP, found[n][1]) for n, value in enumerate(values)]


def _kind(port: Path, index: int, transport: str) -> str:
    if transport != ROCE:
        return "IB" if transport == INFINIBAND else transport
    return _read(port / "gid_attrs/types" / str(index)).replace("IB/RoCE v1", "RoCE v1")


def device_file(device: str, sysfs: Path = SYSFS) -> str:
    """The name in `DEVICE_FILES` of the file by which programs open a device; "" if the kernel has none."""
    files = sysfs / "class/infiniband_verbs"
    return next((name for name in _names(files) if _read(files / name / "ibdev") == device), "")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _numbers(folder: Path) -> list[int]:
    return sorted(int(name) for name in _names(folder) if name.isdecimal())


def _read(path: Path) -> str:
    try:
        with open(path, "rb", buffering=0) as file:  # a GID table has up to 1024 files, and it counts
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""  # the kernel answers EINVAL for what an entry does not have


def choose_ports(ports: Sequence[PortInfo], options: VerbsOptions) -> list[PortInfo]:
    """Return the ports to use: those that `options` name, else the best one.

    Raises:
        FabricUnavailable: there is none, or not the one that was asked for; says why and what to do.
    """
    if not ports:
        raise FabricUnavailable(
            "no RDMA device: the kernel shows none in /sys/class/infiniband (an adapter's driver may not be loaded; "
            "see `rdma link` and `lspci`)"
        )
    if options.devices:
        return list(dict.fromkeys(_find(ports, name) for name in options.devices))
    able = [port for port in ports if not port.refusal]
    if not able:
        raise FabricUnavailable(f"no RDMA device can be used: {', '.join(f'{port} {port.refusal}' for port in ports)}")
    allowed = [port for port in able if options.software or not port.software]
    if not allowed:
        names = ", ".join(dict.fromkeys(port.device for port in able))
        raise FabricUnavailable(
            f"only software RDMA here ({names}), which is slower than tcp: it is used only when asked for by name "
            f"(rdma_device={able[0].device}) or by rdma_fabrics=verbs"
        )
    active = [port for port in allowed if port.active]
    if not active:
        states = ", ".join(f"{port.device}:{port.number} is {port.state}" for port in allowed)
        raise FabricUnavailable(f"no RDMA port is ACTIVE: {states} ({_BRING_UP})")
    return [min(active, key=lambda port: (port.software, -_gigabits(port.rate)))]


_BRING_UP = "see the cable, `ip link set ... up`, the subnet manager"


def _find(ports: Sequence[PortInfo], wanted: str) -> PortInfo:
    device, _, number = wanted.partition(":")
    same = [port for port in ports if port.device == device]
    found = [port for port in same if number in ("", str(port.number))]
    if not found:
        have = ", ".join(f"{port.device}:{port.number}" for port in ports)
        raise FabricUnavailable(f"rdma_device={wanted}: there is no such device or port here. There is: {have}.")
    best = max(found, key=lambda port: port.active)
    if best.refusal:
        raise FabricUnavailable(f"rdma_device={wanted}: {best} {best.refusal}")
    if not best.active:
        raise FabricUnavailable(f"rdma_device={wanted}: {best} is {best.state}, not ACTIVE ({_BRING_UP})")
    return best


def _gigabits(rate: str) -> float:
    try:
        return float(rate.split()[0])
    except (IndexError, ValueError):
        return 0.0


def choose_gid(
    port: PortInfo, options: VerbsOptions, near: IPAddress | None = None, family: str = ""
) -> tuple[Gid, str]:
    """Return the GID to use on a port, and why.

    `near` is this side's address on the control stream: the network that reaches the peer already is the best guess.
    `family` is that of the peer's GID, see `Gid.family`; "" if it is not known yet.

    Raises:
        FabricUnavailable: the port has none, or none of that family, or not the one that was asked for.
    """
    have = ", ".join(map(str, port.gids)) or "none"
    if options.gid_index is not None:
        asked = f"rdma_gid_index={options.gid_index}"
        gid = next((gid for gid in port.gids if gid.index == options.gid_index), None)
        if gid is None:
            raise FabricUnavailable(f"{port} has no GID of {asked}. There is: {have}.")
        if family and gid.family != family:
            raise FabricUnavailable(f"{port}: {asked} is {gid.family}, the peer uses {family}. There is: {have}.")
        return gid, "rdma_gid_index"
    gids = [gid for gid in port.gids if not family or gid.family == family]
    if not gids:
        what = f"GID for {family}, which the peer uses" if family else "GID: its interface needs an IP address"
        raise FabricUnavailable(f"{port} has no {what}. There is: {have}.")
    return min(((gid, _why(gid, near)) for gid in gids), key=lambda choice: _REASONS.index(choice[1]))


#: Best first.
_REASONS = (
    "the address of the control stream",
    "RoCE v2, routable IPv4",
    "RoCE v2, routable IPv6",
    "iWARP, IPv4",
    "iWARP, IPv6",
    "the only kind there is",
    "RoCE v2, this link only",
    "RoCE v1, not routable",
)


def _why(gid: Gid, near: IPAddress | None) -> str:
    if gid.kind == "RoCE v1":
        return "RoCE v1, not routable"
    if gid.kind not in (_ROCE_V2, IWARP):
        return "the only kind there is"
    if gid.address == near:
        return "the address of the control stream"
    if gid.kind == IWARP:
        return f"iWARP, IPv{gid.address.version}"
    if gid.address.is_link_local:
        return "RoCE v2, this link only"
    return f"RoCE v2, routable IPv{gid.address.version}"
