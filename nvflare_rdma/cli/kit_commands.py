"""What the commands `enable`, `disable` and `status` take. What they do is imported when one of them runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from nvflare_rdma.cli.output import Result


def add_kit_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that are about start-up kits. `command` makes the parser of one, from its name, what runs it and
    what it is for."""
    enable = command("enable", _enable, "put this package's settings into start-up kits")
    _add_targets(enable)
    enable.add_argument("--fabrics", metavar="LIST", help="which fabrics may be used, best first (verbs,shm,tcp)")
    enable.add_argument("--memory-budget", metavar="SIZE", help="what a process's transfers may hold, such as 4GiB")
    enable.add_argument(
        "--data-port",
        metavar="PORT",
        help="one port for the direct tensors of all jobs, or a range: at the servers among the kits; without one, at "
        "every site of them. With --upgrade-driver it may be FLARE's own",
    )
    enable.add_argument(
        "--patience", metavar="TIME", help="how long a transfer waits for a peer that is gone, such as 90s, 30m or 4h"
    )
    enable.add_argument("--upgrade-driver", action="store_true", help="the driver takes over FLARE's tcp connections")
    enable.add_argument(
        "--driver-path",
        metavar="FOLDER",
        help="the driver's folder as the site's processes see it, if that is not this installation's: in an image",
    )
    _add_dry_run(enable)
    disable = command("disable", _disable, "take out what enable has put into start-up kits")
    _add_targets(disable)
    _add_dry_run(disable)
    _add_targets(command("status", _status, "what of this package is set in start-up kits"))


def _add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "targets",
        nargs="+",
        type=Path,
        metavar="TARGET",
        help="a POC or provisioned workspace, a start-up kit, or what `nvflare deploy prepare` made",
    )


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")


def _enable(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.enable import enable_result

    return enable_result(args)


def _disable(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.enable import disable_result

    return disable_result(args)


def _status(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.status import status_result

    return status_result(args)
