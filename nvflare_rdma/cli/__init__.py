"""The command `nvflare-rdma driver-path | doctor | policy`: its arguments, and which module does what it asks for."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from nvflare_rdma.version import __version__

__all__ = ["driver_path", "main"]


def driver_path() -> str:
    """The folder for FLARE's `comm_driver_path`."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "plugin")


def _print_driver_path() -> int:
    folder = driver_path()
    if not os.path.isfile(os.path.join(folder, "rdma_driver.py")):
        print(f"{folder} has no rdma_driver.py: nvflare-rdma is not installed whole, install it again", file=sys.stderr)
        return 1
    print(folder)
    return 0


def _doctor(workspace: Path | None, as_json: bool) -> int:
    from nvflare_rdma.cli.doctor import examine, to_json
    from nvflare_rdma.cli.doctor_text import to_text

    report = examine(workspace)
    print(to_json(report) if as_json else to_text(report))
    return 1 if report.problems else 0


def _policy(config: str, model: str) -> int:
    from nvflare_rdma.cli.policy import print_policy
    from nvflare_rdma.errors import ConfigError

    try:
        return print_policy(config, model)
    except ConfigError as error:
        print(f"nvflare-rdma policy: {error}", file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv`, or with the process's own arguments. Returns its exit status."""
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
    policy = commands.add_parser("policy", help="what each tensor of a model travels as, and the size of the message")
    policy.add_argument("config", metavar="CONFIG", help="an exported job, its config_fed_*.json, or a policy's JSON")
    policy.add_argument("model", metavar="MODEL", help=".safetensors, a torch state dict, or .json of dtype and shape")
    policy.set_defaults(run=lambda args: _policy(args.config, args.model))
    args = parser.parse_args(argv)
    try:
        status = int(args.run(args))
        print(end="", flush=True)
    except BrokenPipeError:  # whoever reads this, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 128 + signal.SIGPIPE  # what a shell says of a program that the signal has ended
    return status
