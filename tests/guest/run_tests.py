"""The tests that need RDMA devices (``make test-verbs``): on this machine's own, or else in the guest.

In the guest, every test that pytest collects here has to run and pass: none may be skipped without anyone noticing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import guest
import host
import kernel

# The arguments of one collection each.
SELECTIONS = (("tests/verbs",), ("tests/conformance", "-k", "verbs"))
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
RESULTS = kernel.CACHE / "results"
LIMIT = 14 * 60  # seconds, for everything
GUEST_LIMIT = 13 * 60


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGALRM, lambda number, frame: sys.exit(f"test-verbs: not done after {LIMIT} s"))
    signal.alarm(LIMIT)
    try:
        host.ensure(host.VERBS_PACKAGES)
        host.link_pyverbs()
        tests = collect()
        if devices := _entries(Path("/sys/class/infiniband")):
            print(f"test-verbs: {len(tests)} tests on this machine's own {', '.join(devices)}", flush=True)
            return subprocess.run([*PYTEST, *tests], cwd=guest.ROOT, check=False).returncode
        host.ensure(host.GUEST_PACKAGES)
        return in_guest(tests)
    except host.HostError as error:
        print(f"test-verbs: {error}", file=sys.stderr)
    except guest.GuestError as error:
        print(f"test-verbs: {error}", file=sys.stderr)
        return error.status
    return 1


def collect() -> list[str]:
    """The tests' names, as pytest collects them here."""
    names: list[str] = []
    for selection in SELECTIONS:
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
        # 5: the selection is empty
        if result.returncode not in (0, 5):
            raise host.HostError(f"pytest cannot collect {' '.join(selection)}:\n{result.stdout}{result.stderr}")
        names += found
    if not names:
        raise host.HostError(f"pytest found no tests in {SELECTIONS}")
    return names


def in_guest(tests: list[str]) -> int:
    """Run ``tests`` in the guest; zero if every one of them passed."""
    print(f"test-verbs: {len(tests)} tests in the guest", flush=True)
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    (RESULTS / "tests").write_text("".join(f"{name}\n" for name in tests))
    out = guest.OUT_IN_GUEST
    color = "yes" if sys.stdout.isatty() else "no"  # the guest's console cannot tell
    options = [f"--color={color}", f"--junitxml={out}/junit.xml", "-o", "timeout=600"]
    command = [sys.executable, "-m", "pytest", "-v", *options, f"@{out}/tests"]
    status = guest.run(command, RESULTS, GUEST_LIMIT)
    # Without siw, and only then, tests that need it may be skipped.
    problems = judge(RESULTS / "junit.xml", len(tests), siw=kernel.prepare().siw.exists())
    if problems:
        print(f"test-verbs: not every test passed; results are in {RESULTS}", file=sys.stderr)
        print("".join(f"    {problem}\n" for problem in problems), end="", file=sys.stderr)
    return status or bool(problems)


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
