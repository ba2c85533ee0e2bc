"""The guest's kernel: Debian's stock 6.12, unpacked and not installed, with soft-iWARP (siw) built beside it.

Debian leaves siw out of its kernels, so it is built from the same source package against the same headers.
Everything is kept in ``build/guest/kernel``: a second call finds it there and does nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import host

CACHE = Path(__file__).resolve().parents[2] / "build" / "guest"
# 6.1's rxe hangs when a send queue fills, and the -cloud kernels have no rxe at all.
IMAGE = re.compile(r"^linux-image-(6\.12\.[0-9.]+\+deb[0-9]+)-amd64\b", re.MULTILINE)
SOURCE = "linux-source-6.12"
SIW = "drivers/infiniband/sw/siw"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel."""

    folder: Path

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    def image(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.folder / "modules"

    @property
    def siw(self) -> Path:
        """The module that was built; it may be absent."""
        return self.folder / "siw.ko"

    @property
    def siw_log(self) -> Path:
        """Why siw could not be built."""
        return self.folder / "siw.log"


def newest() -> str:
    """The version of the newest 6.12 kernel that apt knows, without the ``-amd64``."""
    search = ("apt-cache", "search", "--names-only", r"^linux-image-6\.12\.")
    found: list[str] = IMAGE.findall(host.apt(*search))
    if not found:
        host.update_lists()
        found = IMAGE.findall(host.apt(*search))
    if not found:
        raise host.HostError(
            "apt knows no package linux-image-6.12.*+deb12-amd64: the guest needs Debian 12 with bookworm-security "
            "in its package sources"
        )
    return max(found, key=lambda version: [int(n) for n in re.findall(r"\d+", version)])


def prepare(cache: Path = CACHE) -> Kernel:
    """The kernel in ``cache``, downloaded and built if it is not there yet."""
    with _locked(cache):
        done = sorted((cache / "kernel").glob("*/vmlinuz"), key=lambda path: path.stat().st_mtime)
        if done:
            return Kernel(done[-1].parent)
        base = newest()
        kernel = Kernel(cache / "kernel" / f"{base}-amd64")
        print(f"guest: preparing kernel {kernel.version}, once", flush=True)
        # The build happens elsewhere: the kernel's makefiles do not take a path with spaces in it.
        with tempfile.TemporaryDirectory(prefix="guest-kernel-") as name:
            work = Path(name)
            os.chmod(work, 0o755)  # apt downloads as a user of its own
            shutil.rmtree(kernel.folder, ignore_errors=True)
            kernel.folder.mkdir(parents=True)
            _unpack(work, f"linux-image-{kernel.version}")
            (modules,) = work.glob("root/**/modules/*/kernel")
            shutil.copytree(modules.parent, kernel.modules)
            try:
                shutil.copy2(_build_siw(work, base), kernel.siw)
            except (host.HostError, OSError, subprocess.SubprocessError) as error:
                kernel.siw_log.write_text(f"{error}\n")
            # Last: where the image is, everything is.
            shutil.copy2(work / "root" / "boot" / f"vmlinuz-{kernel.version}", kernel.folder / "partial")
            (kernel.folder / "partial").rename(kernel.image)
        return kernel


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One preparation at a time."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack(work: Path, *packages: str) -> None:
    """Download packages and unpack them into ``work/root``."""
    host.with_fresh_lists("apt-get", "download", "-q", *packages, cwd=work)
    for package in packages:
        (deb,) = work.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", deb, work / "root"], check=True, timeout=300)
        deb.unlink()


def _build_siw(work: Path, base: str) -> Path:
    version, root = f"{base}-amd64", work / "root"
    headers = f"usr/src/linux-headers-{version}"
    _unpack(work, f"linux-headers-{version}", f"linux-headers-{base}-common", f"linux-kbuild-{base}", SOURCE)
    subprocess.run(
        ["tar", "-xf", root / f"usr/src/{SOURCE}.tar.xz", "-C", work, f"{SOURCE}/{SIW}"], check=True, timeout=300
    )
    # The headers' Makefile includes another one by its absolute path.
    makefile = root / headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{root}/usr/src/"))
    # Without it, kbuild makes no BTF, for which it would need another tool.
    (root / headers / "vmlinux").unlink(missing_ok=True)
    source = work / SOURCE / SIW
    make: list[str | Path] = ["make", "-s", "-j2", "-C", root / headers, f"M={source}", "CONFIG_RDMA_SIW=m", "modules"]
    result = subprocess.run(make, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        raise host.HostError(f"make of siw ended with {result.returncode}: {result.stderr.strip()[-2000:]}")
    subprocess.run(["strip", "--strip-debug", source / "siw.ko"], check=True, timeout=60)
    return source / "siw.ko"
