"""`nvflare-rdma enable TARGET...` puts this package's settings into start-up kits, `disable TARGET...` takes them out
again. All kits of all targets are worked out before the first file is written."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvflare_rdma.cli.output import BY_CONFIG, ENVIRONMENT, CommandError, Result
from nvflare_rdma.cli.port_use import who_has_all
from nvflare_rdma.kits import (
    ADMIN,
    BACKUP,
    CLIENT,
    SERVER,
    Kit,
    KitError,
    KitPlan,
    disable,
    enable,
    find_kits,
    wanted,
    write,
)

_ENVIRONMENT = ("NO_ACCESS", "CANT_WRITE", "CHANGED_MEANWHILE")
_NEXT = "Processes that run have read their settings already: start the sites and the server again."


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Say what is wrong with a kit as a command does.

    Raises:
        CommandError: a kit can't be read or changed, or a value is wrong.
    """
    try:
        yield
    except KitError as error:
        recovery = ENVIRONMENT if error.code in _ENVIRONMENT else BY_CONFIG
        raise CommandError(error.code, str(error), error.hint, recovery) from error
    except OSError as error:
        reason = f"{error.filename or 'a file'} can't be read: {error.strerror or error}"
        raise CommandError("NO_ACCESS", reason, "run this as whoever owns it", ENVIRONMENT) from error


def kits_of(targets: Sequence[Path]) -> list[Kit]:
    """The kits of all targets, each once.

    Raises:
        KitError: as `find_kits`.
    """
    found = [kit for target in targets for kit in find_kits(target)]
    return list({kit.folder.resolve(): kit for kit in found}.values())


def kit_of(folder: Path) -> Kit:
    """The one kit in a folder.

    Raises:
        CommandError: there is none, there are several, or it is not whole.
    """
    with told():
        kits = find_kits(folder)
    if len(kits) > 1:
        names = ", ".join(each.name for each in kits)
        raise CommandError("NO_KIT", f"{folder} has several kits: {names}", "name the folder of one of them")
    return kits[0]


def enable_result(args: argparse.Namespace) -> Result:
    """Put in what the arguments say."""
    with told():
        kits = kits_of(args.targets)
        what = wanted(
            args.fabrics, args.memory_budget, args.data_port, args.patience, args.upgrade_driver, args.driver_path
        )
        door = SERVER if any(kit.role == SERVER for kit in kits) else CLIENT
        plans = [enable(kit, what, bool(what.ports) and kit.role == door) for kit in kits]
        for plan in plans:
            if what.ports and plan.kit.role == door and what.ports not in map(str, plan.kit.ports):
                plan.notes.extend(_taken(what.ports))
        _carry_out(plans, args)
    return _result(plans, args)


def _taken(ports: str) -> Iterator[str]:
    """What is to be said of ports of which none is free here: the kit may be another host's, or its FLARE runs."""
    first, _, last = ports.partition("-")
    if who := who_has_all(range(int(first), int(last or first) + 1)):
        yield (
            f"port {ports} is in use on this host, by {who}: right, if that is this site's FLARE, or if the kit is for "
            "another host; else end that process, or name another --data-port"
        )


def disable_result(args: argparse.Namespace) -> Result:
    """Take out what was put in."""
    with told():
        plans = [disable(kit) for kit in kits_of(args.targets)]
        _carry_out(plans, args)
    return _result(plans, args)


def _carry_out(plans: Sequence[KitPlan], args: argparse.Namespace) -> None:
    if not args.dry_run:
        write([change for plan in plans for change in plan.changes])


def _result(plans: Sequence[KitPlan], args: argparse.Namespace) -> Result:
    diff = "\n".join(plan.diff for plan in plans if plan.diff)
    if args.format != "txt" and diff:
        print(diff, file=sys.stderr)
    data = {"dry_run": args.dry_run, "sites": [_data(plan) for plan in plans]}
    lines = [diff, ""] if diff else []
    lines.extend(line for plan in plans for line in _lines(plan, args.dry_run))
    if diff and not args.dry_run:
        lines.append(_NEXT)
    return Result(data, "\n".join(lines))


def _data(plan: KitPlan) -> dict[str, Any]:
    return {
        "site": plan.kit.name,
        "role": plan.kit.role,
        "folder": str(plan.kit.folder),
        "changed": [str(path) for path in plan.files],
        "diff": plan.diff,
        "notes": plan.notes,
    }


def _lines(plan: KitPlan, dry_run: bool) -> Iterator[str]:
    names = " and ".join(path.name for path in plan.files)
    if names:
        kept = any(change.path.name.endswith(BACKUP) and change.after is not None for change in plan.changes)
        original = f"; the original is kept as *{BACKUP}" if kept else ""
        verb = "would be" if dry_run else "is" if len(plan.files) == 1 else "are"
        yield f"{plan.kit.name}: {names} {verb} changed{original}"
    elif plan.kit.role != ADMIN:
        yield f"{plan.kit.name}: nothing to do"
    for note in plan.notes:
        yield f"{plan.kit.name}: {note}"
