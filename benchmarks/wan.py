"""RDMA writes over a WAN that loses packets: one huge write or chunks, beside the tcp fabric and one plain TCP socket.

    python benchmarks/wan.py --guest [--reduced] [--resume]    measure in the test guest: build/wan/results.jsonl
    python benchmarks/wan.py --docs                            docs/wan-table.md and docs/wan.svg of these results

The guest (tests/guest) has two software RDMA devices at the ends of a wire, which is slowed here (`wan_wire.py`).
What is measured, and how, is in docs/wan.md. Without --guest it has to run in the guest.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import wan_report
from measuring import machine

ROOT = Path(__file__).resolve().parents[1]
NAME = "results.jsonl"
#: Of one sitting: no cell begins later. --resume goes on.
MINUTES = 32.0
#: Seconds that boot, imports and the last cell may take on top; then the guest is ended.
MORE = 180.0


def in_guest(out: Path, full: bool, resume: bool, minutes: float) -> int:
    """Run this program in the guest, which writes its results to ``out``."""
    sys.path.insert(0, str(ROOT / "tests" / "guest"))
    import guest
    import host

    facts = {"host": machine(), "commit": _commit(), "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    if (out / NAME).exists():
        if not resume:
            print(f"wan: {out / NAME} is there: --resume goes on with it; to begin anew, remove it", file=sys.stderr)
            return 2
        before = wan_report.load(out / NAME).header
        if (before["commit"], before["full"]) != (facts["commit"], full):
            print(f"wan: {out / NAME} is of commit {before['commit']}, or not of the same cells", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options = ["--out", guest.OUT_IN_GUEST, "--minutes", str(minutes), *([] if full else ["--reduced"])]
    try:
        host.ensure(host.VERBS_PACKAGES + host.GUEST_PACKAGES)
        host.link_pyverbs()
        facts["qemu"] = _says("qemu-system-x86_64", "--version")
        facts["pyverbs"] = _says("dpkg-query", "-W", "-f", "${Version}", "python3-pyverbs")
        command = [sys.executable, "benchmarks/wan.py", *options, "--facts", json.dumps(facts)]
        return int(guest.run(command, out, minutes * 60 + MORE))
    except guest.GuestError as error:
        print(f"wan: {error}", file=sys.stderr)
        return int(error.status)
    except host.HostError as error:
        print(f"wan: {error}", file=sys.stderr)
        return 1


def _says(*command: str) -> str:
    """The first line of what a program prints, or nothing if there is none."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    except OSError:
        return ""
    return result.stdout.strip().partition("\n")[0]


def _commit() -> str:
    return _says("git", "describe", "--always", "--dirty") or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guest", action="store_true", help="boot the test guest and measure there")
    parser.add_argument("--reduced", action="store_true", help="fewer settings, none repeated")
    parser.add_argument("--resume", action="store_true", help="measure what an earlier run has not")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no cell begins later (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wan", metavar="DIR", help=f"of {NAME}")
    parser.add_argument("--docs", action="store_true", help="make the docs' table and plot of the results")
    parser.add_argument("--facts", type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.docs:
        import wan_docs

        wan_docs.make(wan_report.load(args.out / NAME), ROOT / "docs")
        return 0
    if args.guest:
        return in_guest(args.out, not args.reduced, args.resume, args.minutes)
    import wan_wire

    wan_wire.refuse_outside_guest()
    import wan_run

    facts: dict[str, Any] = args.facts
    wan_run.run(args.out / NAME, not args.reduced, args.minutes, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
