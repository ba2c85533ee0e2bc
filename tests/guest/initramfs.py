"""The guest's first file system: busybox, ``init.sh`` and the kernel modules that the tests need, as a cpio archive.

In Python because the host may have neither cpio nor kmod. Not compressed: an emulated CPU unpacks slowly.
"""

from __future__ import annotations

import io
import lzma
import re
import shutil
from pathlib import Path

from host import HostError
from kernel import Kernel

MODULES = (
    # the machine: its devices and file systems
    *("virtio_pci", "virtio_rng", "virtiofs", "9pnet_virtio", "9p", "overlay"),
    # checksums that rxe and siw ask for by name, so that no module names them as a dependency
    *("crc32_generic", "crc32c_generic"),
    *("ib_core", "ib_uverbs", "rdma_cm", "rdma_ucm", "rdma_rxe"),
    # wires, and what can go wrong on them
    *("veth", "dummy", "sch_netem", "sch_tbf", "sch_fq", "tcp_bbr"),
)
FOLDERS = ("bin", "dev", "proc", "sys", "modules", "host", "layer", "newroot")
HERE = Path(__file__).resolve().parent


def build(kernel: Kernel) -> bytes:
    """The archive."""
    if not (busybox := shutil.which("busybox")):
        raise HostError("busybox is missing: apt-get install busybox-static")
    modules = _closure(kernel)
    archive = _Archive()
    for folder in FOLDERS:
        archive.add(folder, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, Path(busybox).read_bytes())
    archive.add("init", 0o100755, (HERE / "init.sh").read_bytes())
    for name, content in modules.items():
        archive.add(f"modules/{name}.ko", 0o100644, content)
    archive.add("modules/order", 0o100644, "".join(f"{name}\n" for name in modules).encode())
    return archive.end()


def _closure(kernel: Kernel) -> dict[str, bytes]:
    """The modules and all that they depend on, in an order in which each can be loaded."""
    paths = {_name(path): path for path in kernel.modules.rglob("*.ko*")}
    builtin = {_name(Path(line)) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    wanted = [*MODULES]
    if kernel.siw.exists():
        paths["siw"] = kernel.siw
        wanted.append("siw")
    contents: dict[str, bytes] = {}

    def visit(name: str) -> None:
        name = name.replace("-", "_")
        if name in contents or name in builtin:
            return
        if name not in paths:
            raise HostError(f"kernel {kernel.version} has no module {name}: remove build/guest to get a newer kernel")
        content = paths[name].read_bytes()
        if paths[name].suffix == ".xz":
            content = lzma.decompress(content)
        if found := re.search(rb"\0depends=([^\0]+)\0", content):
            for dependency in found[1].decode().split(","):
                visit(dependency)
        contents[name] = content  # after those that it depends on

    for name in wanted:
        visit(name)
    return contents


def _name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


class _Archive:
    """A cpio archive in the one format that the kernel takes ("newc")."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file, device that it is, name's length, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        self._write(b"070701" + b"".join(b"%08X" % field for field in fields) + path)
        self._write(content)

    def end(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._out.write(bytes(-self._out.tell() % 4))
