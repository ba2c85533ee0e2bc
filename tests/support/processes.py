"""Real processes for tests: bounded in time, and ended even if the test fails."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvflare_rdma.cli import driver_path

ROOT = Path(__file__).resolve().parents[2]
#: FLARE looks for its configuration in all of the working directory, file by file: a small one saves seconds.
SMALL = Path(__file__).resolve().parent
#: For `run` and `background`: processes that find no torch, whose loading takes longer than most jobs here.
WITHOUT_TORCH = {"PYTHONPATH": str(SMALL / "without_torch")}

#: `free_port` gives these, in a slice for each worker, where the kernel does not choose from them; those of tests that
#: name some are above. Fewer than so many are not worth dividing.
_PORTS, _SLICES, _LEAST_PORTS = range(10_000, 20_000), 20, 4000
#: What it has given last, and does not give again so soon.
_given: deque[int] = deque(maxlen=_LEAST_PORTS // _SLICES // 2)


def environment(**extra: str) -> dict[str, str]:
    """This environment with the driver in FLARE's path and the package importable."""
    env = dict(os.environ, NVFLARE_COMM_DRIVER_PATH=driver_path(), **extra)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def free_port() -> int:
    """A port that was free a moment ago, and that nobody gets who binds port 0: until a process has started and listens
    at it, others do that all the time."""
    ports = _own_ports()
    start = secrets.randbelow(len(ports))
    for port in (*ports[start:], *ports[:start]):
        if port not in _given and _is_free(port):
            _given.append(port)
            return port
    raise RuntimeError(f"none of the ports {ports[0]} to {ports[-1]} is free")


def _own_ports() -> range:
    """Those of this pytest-xdist worker and what it starts, outside the range from which the kernel chooses."""
    first, last = 32768, 60999
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    outside = [ports for ports in (_PORTS, range(1024, first), range(last + 1, 65536)) if len(ports) >= _LEAST_PORTS]
    ports = next((ports for ports in outside if ports[-1] < first or ports[0] > last), _PORTS)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    number = 1 + int(worker) % (_SLICES - 1) if worker.isdigit() else 0
    size = len(ports) // _SLICES
    return ports[number * size : (number + 1) * size]


def _is_free(port: int) -> bool:
    for address in ("127.0.0.1", ""):
        with socket.socket() as sock:
            try:
                sock.bind((address, port))
            except OSError:
                return False
    return True


def run(script: Path | Sequence[str], *args: str, timeout: float, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script (or ``-m module``) to its end."""
    head = [str(script)] if isinstance(script, Path) else list(script)
    return subprocess.run(
        [sys.executable, *head, *args],
        env=environment(**extra),
        cwd=SMALL,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def found_by(command: Sequence[str], folder: Path, timeout: float, cwd: Path = SMALL, **extra: str) -> Any:
    """Run a command that writes what it finds to results.json in ``folder``, and give that."""
    done = subprocess.run(
        command, env=environment(**extra), cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads((folder / "results.json").read_text())


@contextmanager
def background(script: Path, *args: str, log: Path, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python script that runs until its stdin is closed; its stderr goes to ``log``."""
    with open(log, "wb") as err:
        process = subprocess.Popen(
            [sys.executable, str(script), *args], env=environment(**extra), stdin=subprocess.PIPE, stderr=err, cwd=SMALL
        )
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=5)
