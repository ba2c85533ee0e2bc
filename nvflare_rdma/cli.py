"""``nvflare-rdma driver-path | doctor``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

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


def _doctor() -> int:
    from nvflare_rdma.fabric.selection import probe
    from nvflare_rdma.fabric.verbs_devices import VerbsOptions

    print(f"nvflare-rdma {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}")
    for package in ("nvflare", "torch", "bitsandbytes"):
        try:
            print(f"{package:<13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:<13} not installed")
    print(f"\n{'fabric':<8} {'usable':<7} reason")
    for name, state in probe(VerbsOptions(), 64 << 20).items():
        print(f"{name:<8} {'yes' if state.usable else 'no':<7} {state.reason}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nvflare-rdma", description="RDMA-chunked streaming for NVIDIA FLARE")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("driver-path", help="print the folder for FLARE's comm_driver_path").set_defaults(
        run=_print_driver_path
    )
    commands.add_parser("doctor", help="what this machine can use, and why not the rest").set_defaults(run=_doctor)
    args = parser.parse_args(argv)
    return int(args.run())


if __name__ == "__main__":
    sys.exit(main())
