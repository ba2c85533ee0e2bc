"""`nvflare-rdma status TARGET...`: what of this package is set in start-up kits."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvflare_rdma.cli.enable import kits_of, told
from nvflare_rdma.cli.output import Result
from nvflare_rdma.kits import ADMIN, KitState, state_of
from nvflare_rdma.settings import PREFIX


def status_result(args: argparse.Namespace) -> Result:
    """A table with a line for each site. What is wrong makes the exit code 1."""
    with told():
        states = [state_of(kit) for kit in kits_of(args.targets)]
    console = Console(width=max(shutil.get_terminal_size((80, 24)).columns, 60), highlight=False)
    with console.capture() as text:
        console.print(_table(states))
    lines = [line.rstrip() for line in text.get().rstrip("\n").splitlines()]
    lines += [f"{state.site}: {problem}" for state in states for problem in state.problems]
    problems = any(state.problems for state in states)
    return Result({"sites": [asdict(state) for state in states]}, "\n".join(lines), 1 if problems else 0)


def _table(states: list[KitState]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in ("site", "driver", "one port", "no code", "set by", f"{PREFIX}..."):
        table.add_column(header, overflow="fold", no_wrap=header != "site")
    for state in states:
        if state.role != ADMIN:  # an admin's kit has nothing to set
            table.add_row(*(Text(cell) for cell in _cells(state)))
    return table


def _cells(state: KitState) -> tuple[str, ...]:
    settings = "\n".join(f"{name.removeprefix(PREFIX)}={value}" for name, value in state.settings.items())
    classes = {None: "-", True: "allowed"}.get(None if state.classes_missing is None else not state.classes_missing)
    by = "enable" if state.enabled else "hand" if state.settings or state.driver or state.parent_door else "-"
    return (
        state.site,
        "yes" if state.driver else "no",
        "yes" if state.parent_door else "no",
        classes or "refused",
        by,
        settings or "defaults",
    )
