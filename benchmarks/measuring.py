"""What the benchmarks share: what a process used, on what machine, and peers that do as they are told."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

MIB = 1 << 20
#: So that frees give nothing back to the kernel and every message meets warm pages.
BEST_ENVIRONMENT = {
    "NVFLARE_STREAMING_WINDOW_SIZE": str(16 * MIB),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}


def asked(parser: argparse.ArgumentParser, text: str, known: Iterable[str]) -> list[str]:
    """The names in a text with commas; ends the program if one is not known."""
    names, all_names = [name for name in text.split(",") if name], list(known)
    if unknown := [name for name in names if name not in all_names]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(all_names)}")
    return names


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is in kB."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(field)


class Meter:
    """CPU seconds, page faults and context switches of this process since the last `lap`, and what its peak RSS
    grew by since the meter was made."""

    def __init__(self) -> None:
        # Resets VmHWM to what is resident now; ru_maxrss would remember every peak since the process began.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._rss = status_bytes("VmRSS")
        self.lap()

    def lap(self) -> None:
        self._used = resource.getrusage(resource.RUSAGE_SELF)

    def read(self) -> dict[str, float]:
        now, before = resource.getrusage(resource.RUSAGE_SELF), self._used
        return {
            "user": now.ru_utime - before.ru_utime,
            "system": now.ru_stime - before.ru_stime,
            "cpu": now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime,
            "faults": now.ru_minflt - before.ru_minflt,
            "switches": now.ru_nvcsw + now.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw,
            "rss": status_bytes("VmHWM") - self._rss,
        }


class Measured:
    """The commands of a peer that say what it used; ``_meter`` is made by `idle`, or before."""

    _meter: Meter

    def idle(self) -> dict[str, Any]:
        self._meter = Meter()
        return {}

    def lap(self) -> dict[str, Any]:
        self._meter.lap()
        return {}

    def used(self) -> dict[str, Any]:
        return self._meter.read()


class Peer:
    """A process that runs the script with ``arguments`` and answers a line of JSON for each command. ``on`` is a
    command that runs it somewhere else."""

    def __init__(self, arguments: list[str], environment: dict[str, str], script: str, on: Sequence[str] = ()) -> None:
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [*on, sys.executable, script, *arguments],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # anything else is somebody's log
                return dict(json.loads(line))
        self._fail()

    def ask(self, command: str) -> dict[str, Any]:
        self.tell(command)
        return self.answer()

    def _fail(self) -> NoReturn:
        code = self._process.wait(timeout=10)
        self._errors.seek(0)
        command = shlex.join(map(str, self._process.args))  # type: ignore[arg-type]
        raise SystemExit(f"{command} ended with {code}: {self._errors.read()[-2000:]}")

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
            self._process.wait()
        self._errors.close()


def obey(commands: dict[str, Callable[..., dict[str, Any] | None]]) -> None:
    """A peer's main loop: answer the parent's commands (a name, and JSON without blanks) until it closes stdin."""
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        name, *arguments = line.split()
        print(json.dumps(commands[name](*map(json.loads, arguments)) or {}), flush=True)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)


def pattern(nbytes: int) -> bytearray:
    """Random bytes that repeat with a period that no chunk size is a multiple of, so that swapped chunks show."""
    block = os.urandom(MIB + 7)
    data = bytearray(nbytes)
    view = memoryview(data)
    for start in range(0, nbytes, len(block)):
        part = view[start : start + len(block)]
        part[:] = block[: len(part)]
    return data


def machine() -> str:
    """What the figures were measured on."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            huge = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        huge = "unknown"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return (
        f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, Linux {platform.release()}, huge pages {huge}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start"
    )


def versions(*packages: str) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def command_line() -> str:
    return shlex.join(["python", *sys.argv])
