"""Which process listens on a port of this host, as far as this user may know."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
_LISTENS = "0A"


def who_listens(port: int, proc: Path = PROC) -> str:
    """The process that listens on a TCP port, as "python3 (process 123)"; "" if there is none, or it is not shown."""
    sockets = {f"socket:[{inode}]" for number, inode in _listening(proc) if number == port}
    if not sockets:
        return ""
    for process in sorted((entry for entry in proc.iterdir() if entry.name.isdigit()), key=lambda entry: entry.name):
        with contextlib.suppress(OSError):  # another user's, or it has ended
            if any(_target(entry) in sockets for entry in (process / "fd").iterdir()):
                return f"{_name(process)} (process {process.name})"
    return ""


def who_has_all(ports: range, proc: Path = PROC) -> str:
    """The process that listens on the first of these ports, if none of them is free on this host; "" else."""
    if not set(ports) <= listening_ports(proc):
        return ""
    return who_listens(ports[0], proc) or "a process that this user may not see"


def listening_ports(proc: Path = PROC) -> set[int]:
    """The TCP ports of this host's network at which somebody listens."""
    return {port for port, _ in _listening(proc)}


def _listening(proc: Path) -> Iterator[tuple[int, str]]:
    """Ports, and the sockets that listen there. /proc/net/tcp has `sl local_address rem_address st ... inode`."""
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS:
                    yield int(fields[1].rpartition(":")[2], 16), fields[9]


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def _name(process: Path) -> str:
    """Its program; of a Python, what it runs."""
    with contextlib.suppress(OSError):
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        program = Path(words[0]).name
        if program.startswith("python") and "-m" in words[1:-1]:
            return f"{program} -m {words[words.index('-m') + 1]}"
        return program
    return "a process"
