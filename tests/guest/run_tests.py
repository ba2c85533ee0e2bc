"""The tests that need RDMA devices: on this machine's own, or else in the guest.

    python tests/guest/run_tests.py          one of each kind (make test-verbs): see selection.py
    python tests/guest/run_tests.py --all    all of them (make test-verbs-all)

In the guest, every test that pytest collects here and that is chosen has to run and pass: none may be skipped without
anyone noticing. A guest has one CPU, so each group of tests gets a guest of its own where this machine has CPUs for
them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import guest
import host
import kernel
import selection

# The arguments of one collection each; they take about as long.
_FAULTS = "tests/verbs/test_faults.py"
GROUPS = {
    "verbs": ["tests/verbs", f"--ignore={_FAULTS}"],
    "conformance": ["tests/conformance", _FAULTS, "-k", "verbs or test_faults"],
}
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
RESULTS = kernel.CACHE / "results"


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    #: For everything, on any machine: whoever called this waits no longer.
    allowance: int
    #: For a guest on a machine of the reference's speed; others get as many times more, see `speed`.
    guest: int


# Several times what it takes on an idle machine of the reference's speed: it may get more to do than when it was timed.
CHOSEN = Limits(allowance=40 * 60 - 20, guest=20 * 60)
ALL = Limits(allowance=80 * 60 - 20, guest=40 * 60)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests that need RDMA devices.")
    parser.add_argument("--all", action="store_true", help="also those that show the same once more")
    every = parser.parse_args().all
    limits = ALL if every else CHOSEN
    end = time.monotonic() + limits.allowance
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGALRM, lambda number, frame: sys.exit(f"test-verbs: not done after {limits.allowance} s"))
    signal.alarm(limits.allowance)
    try:
        host.ensure(host.VERBS_PACKAGES)
        host.link_pyverbs()
        collected = {name: collect(arguments) for name, arguments in GROUPS.items()}
        selected = collected if every else choose(collected)
        tests = [test for each in selected.values() for test in each]
        print(f"test-verbs: {len(tests)} of {sum(map(len, collected.values()))} tests", flush=True)
        if devices := _entries(Path("/sys/class/infiniband")):
            print(f"test-verbs: on this machine's own {', '.join(devices)}", flush=True)
            return subprocess.run([*PYTEST, *tests], cwd=guest.ROOT, check=False).returncode
        host.ensure(host.GUEST_PACKAGES)
        groups = selected if (os.cpu_count() or 1) >= len(selected) else {"all": tests}
        # A guest that takes too long shows its console; the alarm shows nothing.
        return in_guests(groups, limits.guest, end - 20)
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


def choose(collected: dict[str, list[str]]) -> dict[str, list[str]]:
    """What `selection` leaves of each group."""
    try:
        chosen = set(selection.chosen([test for each in collected.values() for test in each]))
    except ValueError as error:
        raise host.HostError(str(error)) from error
    return {name: [test for test in tests if test in chosen] for name, tests in collected.items()}


def in_guests(groups: dict[str, list[str]], timeout: float, end: float) -> int:
    """Run each group of tests in a guest, all at once; zero if every test passed.

    A guest has ``timeout`` seconds, more on a slow machine, but is ended at ``end``.
    """
    shutil.rmtree(RESULTS, ignore_errors=True)
    siw = kernel.prepare().siw.exists()
    if len(groups) == 1:
        timeout *= len(GROUPS)
    begin = time.monotonic()
    running = {name: Running(name, tests, timeout, end - begin) for name, tests in groups.items()}
    status = 0
    for name, tests in groups.items():
        status = running[name].wait() or status
        # Without siw, and only then, tests that need it may be skipped.
        if problems := judge(RESULTS / name / "junit.xml", len(tests), siw):
            status = status or 1
            print(f"test-verbs: not every test passed; results are in {RESULTS / name}", file=sys.stderr)
            print("".join(f"    {problem}\n" for problem in problems), end="", file=sys.stderr)
    print(f"test-verbs: the guests took {time.monotonic() - begin:.0f} s", flush=True)
    return status


class Running:
    """A guest that runs ``tests``. What it prints is printed with its name."""

    def __init__(self, name: str, tests: list[str], timeout: float, at_most: float) -> None:
        print(f"test-verbs: {len(tests)} tests in the guest '{name}'", flush=True)
        self._name, folder = name, RESULTS / name
        folder.mkdir(parents=True)
        (folder / "tests").write_text("".join(f"{test}\n" for test in tests))
        out = guest.OUT_IN_GUEST
        # How long a test may take the guest says, in its environment.
        options = ["-v", "--color=no", "--durations=15", f"--junitxml={out}/junit.xml", f"@{out}/tests"]
        limits = ["--timeout", f"{timeout:.0f}", "--at-most", f"{at_most:.0f}"]
        command = [sys.executable, guest.__file__, *limits, "--out", str(folder), "--"]
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
