"""``nvflare-rdma driver-path | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nvflare_rdma.version import __version__


def driver_path() -> str:
    """The folder for FLARE's `comm_driver_path`."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugin")


def _print_driver_path() -> int:
    folder = driver_path()
    if not os.path.isfile(os.path.join(folder, "rdma_driver.py")):
        print(f"{folder} has no rdma_driver.py: nvflare-rdma is not installed whole, install it again", file=sys.stderr)
        return 1
    print(folder)
    return 0


def _doctor(workspace: Path | None, as_json: bool) -> int:
    from nvflare_rdma.doctor import examine, to_json
    from nvflare_rdma.doctor_text import to_text

    report = examine(workspace)
    print(to_json(report) if as_json else to_text(report))
    return 1 if report.problems else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nvflare-rdma", description="RDMA-chunked streaming for NVIDIA FLARE")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    path = commands.add_parser("driver-path", help="print the folder for FLARE's comm_driver_path")
    path.set_defaults(run=lambda args: _print_driver_path())
    doctor = commands.add_parser("doctor", help="what this machine can use, and why not the rest")
    doctor.add_argument(
        "--workspace", type=Path, metavar="FOLDER", help="a FLARE site's folder, whose settings count (default: here)"
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=lambda args: _doctor(args.workspace, args.json))
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
