"""RDMA writes over a WAN that loses packets: one huge write or chunks, beside the tcp fabric and one plain TCP socket.

    python benchmarks/wan.py --guest [--quick] [--out build/wan.json]   in the test guest, about 25 minutes
    python benchmarks/wan.py --docs build/wan.json                      its docs/wan-table.md and docs/wan.svg

The guest (tests/guest) has two software RDMA devices at the ends of a wire, which is slowed here (`wan_wire.py`).
What is measured, and how, is in docs/wan.md. Without --guest it has to run in the guest.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Seconds: what would begin later is left out, and listed as such.
BUDGET = 28 * 60
TIMEOUT = BUDGET + 4 * 60  # of the guest, which ends the run hard


def in_guest(out: Path, quick: bool) -> int:
    """Run this program in the guest and take its results to ``out``."""
    sys.path.insert(0, str(ROOT / "tests" / "guest"))
    import guest
    import host

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="wan-") as name:
        results = Path(name)
        command = [sys.executable, "benchmarks/wan.py", "--out", f"{guest.OUT_IN_GUEST}/wan.json"]
        try:
            host.ensure(host.VERBS_PACKAGES + host.GUEST_PACKAGES)
            host.link_pyverbs()
            status = guest.run([*command, *(["--quick"] if quick else [])], results, TIMEOUT)
        except (guest.GuestError, host.HostError) as error:
            print(f"wan: {error}", file=sys.stderr)
            status = 1
        if (results / "wan.json").exists():  # of a run that was cut off, too: it says how far it came
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(results / "wan.json", out)
            print(f"wan: results are in {out}")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guest", action="store_true", help="boot the test guest and run there")
    parser.add_argument("--quick", action="store_true", help="two links and few settings: to try a change")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wan.json", help="where the results go")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="make the table and the plot of results")
    args = parser.parse_args()
    if args.docs:
        import wan_docs

        wan_docs.make(args.docs)
        return 0
    if args.guest:
        return in_guest(args.out, args.quick)
    import wan_wire

    wan_wire.refuse_outside_guest()
    import wan_run

    wan_run.run(args.out, args.quick, BUDGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
