"""What the processes of a FLARE job used: peak memory and CPU of each, by its role, and the bytes over the loopback."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

_SAMPLE_SECONDS = 0.05
_SEARCH_EVERY = 10  # samples
_TICK = os.sysconf("SC_CLK_TCK")
_ROLES = {
    "nvflare_rdma.simulator": "server",
    "simulator_worker": "{site}",
    "server_train": "server parent",
    "runner_process": "server job",
    "client_train": "{site} parent",
    "worker_process": "{site} job",
}
_OWN_NETWORK = "JOBS_BENCHMARK_OWN_NETWORK"


@dataclass
class Used:
    """Of one process: largest resident memory, the part of it that is not of files, and CPU seconds."""

    peak: int = 0
    anonymous: int = 0
    cpu: float = 0.0


class ProcessTree:
    """Watches the processes that descend from `roots` during a ``with`` block, and ends them all when it is left."""

    def __init__(self, roots: list[subprocess.Popen[bytes]]) -> None:
        self.used: dict[str, Used] = {}
        self._roots = roots
        self._seen: dict[int, psutil.Process] = {}
        self._roles: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProcessTree:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._search()
        # psutil knows when a process was started, and signals nobody who has got its number since.
        left = [process for process in self._seen.values() if process.is_running()]
        for send in (signal.SIGTERM, signal.SIGKILL):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(send)
            _, left = psutil.wait_procs(left, timeout=10)
        for root in self._roots:
            root.wait(timeout=10)

    def _run(self) -> None:
        samples = 0
        while not self._stop.wait(_SAMPLE_SECONDS):
            if samples % _SEARCH_EVERY == 0:
                self._search()
            samples += 1
            for pid, role in list(self._roles.items()):
                self._sample(pid, role)

    def _search(self) -> None:
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(root.pid)
                for process in (parent, *parent.children(recursive=True)):
                    self._seen.setdefault(process.pid, process)
        for pid, process in self._seen.items():
            with contextlib.suppress(psutil.Error):
                if role := _role(process.cmdline()):
                    self._roles[pid] = role  # anew each time: between fork and exec it has its parent's command line

    def _sample(self, pid: int, role: str) -> None:
        try:
            with open(f"/proc/{pid}/status") as file:
                sizes = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", file.read(), re.MULTILINE))
            with open(f"/proc/{pid}/stat") as file:
                times = file.read().rpartition(")")[2].split()[11:13]
        except OSError:
            return
        if not sizes:  # a zombie has no memory any more
            return
        used = self.used.setdefault(role, Used())
        used.peak = max(used.peak, int(sizes["VmHWM"]) * 1024)
        used.anonymous = max(used.anonymous, int(sizes["RssAnon"]) * 1024)
        used.cpu = max(used.cpu, sum(map(int, times)) / _TICK)


def _role(command: list[str]) -> str:
    text = " ".join(command)
    for part, role in _ROLES.items():
        if part in text:
            site = re.search(r"\b(site-\d+)\b", text)
            return role.format(site=site[1] if site else "site")
    return ""


def loopback_bytes() -> int:
    """Bytes that have gone over this network namespace's loopback device."""
    with open("/proc/net/dev") as file:
        return next(int(line.split()[1]) for line in file if line.lstrip().startswith("lo:"))


def own_loopback() -> bool:
    """Go on in a network namespace of this process's own, where nobody else's bytes count, by starting the script anew;
    False where none is to be had."""
    if _OWN_NETWORK in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return True
    command = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        return False
    os.environ[_OWN_NETWORK] = "1"
    os.execvp(command[0], [*command, sys.executable, *sys.argv])


def wait_for(process: subprocess.Popen[bytes], seconds: float, what: str) -> float:
    """Wait until `process` ends; the seconds that took.

    Raises:
        RuntimeError: it failed, or has not ended in time.
    """
    start = time.monotonic()
    try:
        status: Any = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = f"no end after {seconds:g} s"
    if status:
        raise RuntimeError(f"{what}: {status}")
    return time.monotonic() - start
