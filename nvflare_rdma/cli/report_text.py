"""A report for terminals: lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvflare_rdma.cli.report_figures import Moved, Report, Told
from nvflare_rdma.cli.report_words import (
    amount,
    fabric_name,
    fold,
    goodputs,
    headline,
    notes,
    number,
    round_name,
    seconds,
    speed,
    title,
    which_rounds,
)
from nvflare_rdma.logs import escaped

WIDTH = 80
#: A table with so many columns has them close together, so that names have room.
_CLOSE = 9


def to_text(report: Report) -> str:
    """The report for people."""
    blocks = [
        "\n".join([*_wrapped(title(report)), "", *_wrapped(headline(report))]),
        *(_drawn(table) for table in (_totals(report), _rounds(report), _sites(report))),
        "\n".join(_reasons("On FLARE's own path", report.fallbacks)),
        "\n".join(_reasons("Failed", report.failures)),
        "\n".join(line for note in notes(report) for line in _wrapped(note)),
    ]
    lines = "\n\n".join(block for block in blocks if block).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _drawn(table: Table) -> str:
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip("\n")


def _totals(report: Report) -> Table:
    """What went which way."""
    ways = {
        "server to sites": [each.down for each in report.rounds],
        "sites to server": [each.up for each in report.rounds],
        "site to site": [each.between for each in report.rounds],
        "in all": [report.moved],
    }
    table = _table(("", "left"), *((name, "right") for name in ("transfers", "raw", "on the wire", "fewer")))
    for way, several in ways.items():
        moved = Moved(*(sum(getattr(m, f) for m in several) for f in ("transfers", "raw_bytes", "wire_bytes")))
        if moved.transfers:
            sizes = amount(moved.raw_bytes), amount(moved.wire_bytes), fold(moved)
            _row(table, way, f"{moved.transfers:,}", *sizes)
    return table


def _rounds(report: Report) -> Table:
    """One line a round. What never happened has no column."""
    troubles = [
        (name, [getattr(each.effort, field) for each in report.rounds])
        for name, field in (("FLARE's", "fallback"), ("failed", "failed"), ("re-sent", "resent_chunks"))
    ]
    troubles = [(name, counts) for name, counts in troubles if any(counts)]
    losses = any(each.loss is not None for each in report.rounds)
    names = [("round", "right"), ("raw", "right"), ("wire", "right"), ("slowest", "left"), ("time", "right")]
    names += [
        ("goodput", "right"),
        *((name, "right") for name, _ in troubles),
        *([("loss", "right")] if losses else []),
    ]
    table = _table(*names)
    for n, each in enumerate(report.rounds):
        loss = [] if not losses else ["-" if each.loss is None else f"{each.loss:.4g}"]
        sizes = amount(each.moved.raw_bytes), amount(each.moved.wire_bytes)
        slowest = each.slowest_site, seconds(each.slowest_seconds), speed(each.goodput)
        _row(table, round_name(each), *sizes, *slowest, *(f"{counts[n]:,}" for _, counts in troubles), *loss)
    return table


def _sites(report: Report) -> Table:
    names = ("received", "goodput", "sent", "goodput", "time", "budget")
    table = _table(("site", "left"), *((name, "right") for name in names), ("direct over", "left"))
    for site in report.sites:
        received, sent = goodputs(site)
        fabrics = ", ".join(fabric_name(name).removeprefix("over ") for name in site.fabrics) or "-"
        way_in, way_out = (amount(site.received.raw_bytes), speed(received)), (amount(site.sent.raw_bytes), speed(sent))
        times = seconds(site.busy.seconds), amount(site.effort.budget_peak_bytes)
        _row(table, site.name, *way_in, *way_out, *times, fabrics)
    return table


def _table(*columns: tuple[str, str]) -> Table:
    gap = 1 if len(columns) < _CLOSE else 0  # besides the box's own
    table = Table(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=justify == "right")  # type: ignore[arg-type]
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(escaped(cell)) for cell in cells))


def _reasons(what: str, told: Iterable[Told]) -> Iterator[str]:
    """Each reason, with where it was given."""
    told = list(told)
    if told:
        yield f"{what}:"
    for each in told:
        ways = ", ".join(each.ways[:4]) + ", ..." * (len(each.ways) > 4)
        rounds = f"; {which_rounds(each)}" if each.rounds else ""
        yield from _wrapped(f"{number(each.transfers, 'transfer')} ({ways}{rounds}): {each.reason}", "  ")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        escaped(text),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  " * bool(indent),
        break_on_hyphens=False,
    )
