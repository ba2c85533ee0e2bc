"""A /sys as the kernel lays it out, with the RDMA devices that a test asks for."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

PCI = "devices/pci0000:00/0000:00:03.0/infiniband"
VIRTUAL = "devices/virtual/infiniband"


class FakeSysfs:
    def __init__(self, root: Path) -> None:
        self.root = root

    def device(self, name: str, node_type: str = "1: CA", folder: str = PCI, **files: str) -> Path:
        """``files``: more of them, such as ``parent``."""
        device = self.root / folder / name
        self.write(device, node_type=node_type, node_desc="device", **files)
        self._link("infiniband", device)
        number = len(list((self.root / "class/infiniband").iterdir())) - 1
        verbs = self.root / folder.removesuffix("infiniband") / f"infiniband_verbs/uverbs{number}"
        self.write(verbs, ibdev=name)
        self._link("infiniband_verbs", verbs)
        return device

    def port(
        self,
        device: str,
        number: int = 1,
        gids: Mapping[int, tuple[str, str, str]] | None = None,
        table: int = 16,
        state: str = "4: ACTIVE",
        rate: str = "100 Gb/sec (4X EDR)",
        link_layer: str = "Ethernet",
    ) -> Path:
        """``gids``: index -> (IP address, as the kernel's type, netdev); the rest of the ``table`` is empty."""
        port = (self.root / "class/infiniband" / device / "ports").resolve() / str(number)
        self.write(port, state=state, rate=rate, link_layer=link_layer, lid="0x0")
        for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
            (port / folder).mkdir(parents=True)
        for index in range(table):
            address, kind, netdev = (gids or {}).get(index, ("::", "", ""))
            self.write(port / "gids", **{str(index): _gid(address)})
            if kind:  # of an empty entry the kernel gives none: EINVAL
                self.write(port / "gid_attrs/types", **{str(index): kind})
                self.write(port / "gid_attrs/ndevs", **{str(index): netdev})
        return port

    def netdev(self, name: str, mtu: int) -> None:
        self.write(self.root / "class/net" / name, mtu=str(mtu))

    def module(self, name: str) -> None:
        (self.root / "module" / name).mkdir(parents=True)

    def rxe(self, name: str = "rxa", netdev: str = "va", address: str = "10.8.0.1") -> None:
        """As Linux 6.12 shows one that is up."""
        self.device(name, folder=VIRTUAL, parent=netdev)
        gids = {0: ("fe80::ff:fe00:101", "RoCE v2", netdev), 1: (address, "RoCE v2", netdev)}
        self.port(name, gids=gids, rate="10 Gb/sec (1X FDR10)")

    def siw(self, name: str = "swa", folder: str = VIRTUAL) -> None:
        self.device(name, "4: RNIC", folder)
        self.write(self.root / folder / name, node_desc="Software iWARP stack")
        self.port(name, gids={0: ("200:0:301::", "IB/RoCE v1", "vc")}, table=1, rate="10 Gb/sec (1X FDR10)")

    def _link(self, kind: str, target: Path) -> None:
        folder = self.root / "class" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / target.name).symlink_to(target)

    @staticmethod
    def write(folder: Path, **files: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")


def _gid(address: str) -> str:
    ip = ipaddress.ip_address(address)
    return ipaddress.IPv6Address(f"::ffff:{ip}" if ip.version == 4 else str(ip)).exploded
