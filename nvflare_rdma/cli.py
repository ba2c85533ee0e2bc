"""``nvflare-rdma driver-path | doctor | policy``."""

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


def _policy(config: str, model: str) -> int:
    from nvflare_rdma.errors import ConfigError
    from nvflare_rdma.policy_table import print_policy

    try:
        return print_policy(config, model)
    except ConfigError as error:
        print(f"nvflare-rdma policy: {error}", file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nvflare-rdma", description="RDMA-chunked streaming for NVIDIA FLARE")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("driver-path", help="print the folder for FLARE's comm_driver_path").set_defaults(
        run=_print_driver_path
    )
    commands.add_parser("doctor", help="what this machine can use, and why not the rest").set_defaults(run=_doctor)
    policy = commands.add_parser("policy", help="what each tensor of a model travels as, and the size of the message")
    policy.add_argument("config", metavar="CONFIG", help="an exported job, its config_fed_*.json, or a policy's JSON")
    policy.add_argument("model", metavar="MODEL", help=".safetensors, a torch state dict, or .json of dtype and shape")
    policy.set_defaults(run=_policy)
    args = vars(parser.parse_args(argv))
    del args["command"]
    return int(args.pop("run")(**args))


if __name__ == "__main__":
    sys.exit(main())
