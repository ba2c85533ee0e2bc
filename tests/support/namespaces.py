"""Networks of their own for the processes of a test: what is done to them does nothing to this machine's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import SMALL, found_by

#: As root of a network, and of a view of the file system, of its own.
APART = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--"]


def require(commands: str) -> None:
    """Skip the test where a network of its own can't be made, or `commands` (of a shell, as its root) fail there."""
    try:
        done = subprocess.run([*APART, "sh", "-c", commands], capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"two networks can't be made here: {error} (packages util-linux, iproute2)")
    if done.returncode:
        pytest.skip(f"networks as this test needs them can't be made here: {done.stderr.strip()}")


def run_apart(script: str, folder: Path, timeout: float, *args: str) -> Any:
    """Run a script of this folder in a network of its own; returns what it writes to results.json in ``folder``. Data
    goes over tcp, to ports from 20000 on."""
    command = [*APART, sys.executable, str(SMALL / script), str(folder), *args]
    return found_by(command, folder, timeout, NVFLARE_RDMA_DATA_PORTS="20000-20010", NVFLARE_RDMA_FABRICS="tcp")


def ip(*commands: str) -> None:
    """Commands of ip(8), in this process's network."""
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True, timeout=20)


def in_another_network(script: str, *args: str) -> subprocess.Popen[str]:
    """A Python script in a network of its own, which ends with this process. It says "ready" on its stdout, and waits
    for a line on its stdin."""
    died = ["setpriv", "--pdeathsig", "KILL", "--"]
    process = subprocess.Popen(
        [*died, "unshare", "--net", sys.executable, script, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process
