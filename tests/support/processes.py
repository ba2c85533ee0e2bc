"""Real processes for tests: bounded in time, and ended even if the test fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
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


def environment(**extra: str) -> dict[str, str]:
    """This environment with the driver in FLARE's path and the package importable."""
    env = dict(os.environ, NVFLARE_COMM_DRIVER_PATH=driver_path(), **extra)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


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
