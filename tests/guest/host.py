"""What the host needs before a guest can start: distribution packages, and pyverbs in this Python's environment.

As root, what is missing is installed; others are told what to install.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

VERBS_PACKAGES = ("python3-pyverbs", "ibverbs-providers")
GUEST_PACKAGES = (
    "qemu-system-x86",
    "qemu-system-common",
    "busybox-static",
    "iproute2",
    "gcc",  # this and the next three build the one kernel module that Debian leaves out
    "make",
    "binutils",
    "xz-utils",
)
# Where Debian and Ubuntu install Python packages for the system's own Python.
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")


class HostError(Exception):
    """The host lacks something; the message says what, and how to get it."""


def apt(*args: str, cwd: Path | None = None) -> str:
    """The output of one apt command."""
    try:
        result = subprocess.run(
            args,
            cwd=cwd,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError(f"{args[0]} is missing: the guest is made from Debian packages, use Debian 12") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"'{' '.join(args)}' took more than 300 s: is the package mirror reachable?") from error
    if result.returncode:
        raise HostError(f"'{' '.join(args)}' ended with {result.returncode}: {result.stderr.strip()[-1000:]}")
    return result.stdout


def with_fresh_lists(*args: str, cwd: Path | None = None) -> str:
    """One apt command, tried again with updated package lists if it fails (lists age, mirrors drop old files)."""
    try:
        return apt(*args, cwd=cwd)
    except HostError:
        update_lists()
        return apt(*args, cwd=cwd)


def update_lists() -> None:
    if os.geteuid():
        raise HostError("the package lists are missing or old, and only root may update them: sudo apt-get update")
    apt("apt-get", "update", "-q")


def missing(packages: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise HostError("dpkg-query is missing: the guest is made from Debian packages, use Debian 12") from error
    installed = {line.split()[0] for line in result.stdout.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def ensure(packages: Sequence[str]) -> None:
    """Install those that are missing."""
    absent = missing(packages)
    if not absent:
        return
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *absent]
    if os.geteuid():
        raise HostError(f"missing packages, and only root may install them: sudo {' '.join(command)}")
    print(f"host: installing {' '.join(absent)}", flush=True)
    with_fresh_lists(*command)


def link_pyverbs(system: Path = SYSTEM_PACKAGES) -> None:
    """Make the distribution's pyverbs importable here: PyPI has none, and it must fit the installed rdma-core."""
    if importlib.util.find_spec("pyverbs"):
        return
    package, suffix = system / "pyverbs", sysconfig.get_config_var("EXT_SUFFIX")
    if not any(package.glob(f"*{suffix}")):
        built = {m[1] + "." + m[2] for p in package.glob("*.so") if (m := re.search(r"cpython-(\d)(\d+)", p.name))}
        raise HostError(
            f"{package} is built for Python {', '.join(sorted(built)) or '(none found)'}, "
            f"but {sys.prefix} has Python {sys.version.split()[0]}: make the environment with the system's Python, "
            "for example 'rm -r .venv; make PYTHON=/usr/bin/python3 test-verbs'"
        )
    if sys.prefix == sys.base_prefix:
        raise HostError(f"{sys.executable} is in no virtual environment: use the one that 'make' makes")
    (Path(sysconfig.get_paths()["purelib"]) / "pyverbs").symlink_to(package)
