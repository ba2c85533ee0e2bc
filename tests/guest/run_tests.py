"""The tests that need RDMA devices (``make test-verbs``): on this machine's own, or else in the guest.

In the guest, every test that pytest collects here has to run and pass: none may be skipped without anyone noticing.
A guest has one CPU, so each selection of tests gets a guest of its own where this machine has CPUs for them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import guest
import host
import kernel

# The arguments of one collection each; they take about as long.
_FLARE = "tests/verbs/test_flare.py"
SELECTIONS = {
    "verbs": ["tests/verbs", f"--ignore={_FLARE}"],
    "conformance": ["tests/conformance", _FLARE, "-k", "verbs or flare"],
}
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
RESULTS = kernel.CACHE / "results"
LIMIT = 15 * 60 - 20  # seconds, for everything
GUEST_LIMIT = 14 * 60


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGALRM, lambda number, frame: sys.exit(f"test-verbs: not done after {LIMIT} s"))
    signal.alarm(LIMIT)
    try:
        host.ensure(host.VERBS_PACKAGES)
        host.link_pyverbs()
        selected = {name: collect(arguments) for name, arguments in SELECTIONS.items()}
        tests = [test for each in selected.values() for test in each]
        if devices := _entries(Path("/sys/class/infiniband")):
            print(f"test-verbs: {len(tests)} tests on this machine's own {', '.join(devices)}", flush=True)
            return subprocess.run([*PYTEST, *tests], cwd=guest.ROOT, check=False).returncode
        host.ensure(host.GUEST_PACKAGES)
        return in_guests(selected if (os.cpu_count() or 1) >= len(selected) else {"all": tests})
    except host.HostError as error:
        print(f"test-verbs: {error}", file=sys.stderr)
    except guest.GuestError as error:
        print(f"test-verbs: {error}", file=sys.stderr)
        return error.status
    return 1


def collect(selection: list[str]) -> list[str]:
    """The tests' names, as pytest collects them here."""
    result = subprocess.run(
        [*PYTEST, "--collect-only", "-q", *selection],
        cwd=guest.ROOT,
        env={**os.environ, "PYTHONPATH": str(guest.ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = [line for line in result.stdout.splitlines() if re.match(r"\S+\.py::", line)]
    if result.returncode or not found:
        raise host.HostError(f"pytest cannot collect {' '.join(selection)}:\n{result.stdout}{result.stderr}")
    return found


def in_guests(selected: dict[str, list[str]]) -> int:
    """Run each selection of tests in a guest, all at once; zero if every test passed."""
    shutil.rmtree(RESULTS, ignore_errors=True)
    siw = kernel.prepare().siw.exists()
    running = {name: Running(name, tests) for name, tests in selected.items()}
    status = 0
    for name, tests in selected.items():
        status = running[name].wait() or status
        # Without siw, and only then, tests that need it may be skipped.
        if problems := judge(RESULTS / name / "junit.xml", len(tests), siw):
            status = status or 1
            print(f"test-verbs: not every test passed; results are in {RESULTS / name}", file=sys.stderr)
            print("".join(f"    {problem}\n" for problem in problems), end="", file=sys.stderr)
    return status


class Running:
    """A guest that runs ``tests``. What it prints is printed with its name."""

    def __init__(self, name: str, tests: list[str]) -> None:
        print(f"test-verbs: {len(tests)} tests in the guest '{name}'", flush=True)
        self._name, folder = name, RESULTS / name
        folder.mkdir(parents=True)
        (folder / "tests").write_text("".join(f"{test}\n" for test in tests))
        out = guest.OUT_IN_GUEST
        options = ["-v", "--color=no", f"--junitxml={out}/junit.xml", "-o", "timeout=600", f"@{out}/tests"]
        command = [sys.executable, guest.__file__, "--timeout", str(GUEST_LIMIT), "--out", str(folder), "--"]
        command += [sys.executable, "-m", "pytest", *options]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._printing = threading.Thread(target=self._print, daemon=True)
        self._printing.start()

    def _print(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"{self._name}: {line}", end="", flush=True)

    def wait(self) -> int:
        self._printing.join()
        return self._process.wait()


def judge(junit: Path, collected: int, siw: bool) -> list[str]:
    """What speaks against a run in which ``collected`` tests should have passed."""
    if not junit.exists():
        return ["pytest wrote no results"]
    counts = {"passed": 0, "failure": 0, "error": 0, "skipped": 0, "skipped for want of siw": 0}
    details = []
    for case in ElementTree.parse(junit).iter("testcase"):
        outcome, reason = "passed", ""
        for element in case:
            if element.tag in counts:
                outcome, reason = element.tag, element.get("message", "")
        if outcome == "skipped" and not siw and re.search("siw|iwarp", reason, re.IGNORECASE):
            outcome = "skipped for want of siw"
        elif outcome != "passed":
            first_line = (reason.splitlines() or [""])[0]
            details.append(f"{outcome}: {case.get('classname')}::{case.get('name')}: {first_line}")
        counts[outcome] += 1
    if not details and counts["passed"] + counts["skipped for want of siw"] == collected:
        return []
    return [f"{'collected':24}{collected:5}", *(f"{name:24}{n:5}" for name, n in counts.items()), *details]


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


if __name__ == "__main__":
    sys.exit(main())
