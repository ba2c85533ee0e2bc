"""docs/wan-table.md and docs/wan.svg of the results of `wan_run.py`, with a simulated go-back-N NIC beside them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import wan_cells
import wan_compare
import wan_report
from wan_cells import FABRICS, MIB, Setting, Step
from wan_compare import LINKS, Cells, Goodputs, measured, speed
from wan_report import Results


def _with_packets(cells: list[dict[str, Any]]) -> str:
    # Of what was cut off nobody knows which packets were needed.
    ratios = [wan_report.over_ideal(cell) for cell in cells if wan_report.complete(cell)]
    return f"{measured(cells)} ({statistics.median(ratios):.2f})" if ratios else measured(cells)


def goodput_table(groups: Cells, model: Goodputs, settings: list[Setting]) -> list[str]:
    lines = ["| | rails | " + " | ".join(f"{rtt} ms, {loss:g} %" for rtt, loss in LINKS) + " |"]
    lines.append("|---" * (2 + len(LINKS)) + "|")
    for setting in settings:
        row = [_with_packets(groups.get((setting, *link), [])) for link in LINKS]
        lines.append(f"| {setting.fabric}, {setting.what} | {setting.rails} | {' | '.join(row)} |")
    for setting in dict.fromkeys(key[0] for key in model):
        row = [speed(model[setting, *link], wan_compare.DEADLINE) for link in LINKS]
        lines.append(f"| *simulated* go-back-N, {setting.what} | | {' | '.join(row)} |")
    return lines


def adaptive_table(groups: Cells) -> list[str]:
    lines = ["| RTT, loss | " + " | ".join(f"{fabric}: goodput | chunk, window" for fabric in FABRICS) + " |"]
    lines.append("|---" * (1 + 2 * len(FABRICS)) + "|")
    for rtt, loss in LINKS:
        row = []
        for fabric in FABRICS:
            cells = groups.get((Setting(fabric, wan_cells.ADAPTIVE_RAILS, MIB, 4, True), rtt, loss), [])
            if not cells or "error" in cells[0]:
                row += ["failed" if cells else "not run", ""]
                continue
            messages, state = cells[0]["messages"], cells[0]["receiver"]
            cut = "" if wan_report.complete(cells[0]) else "\\*"
            speeds = [f"{wan_report.goodput(message) / 1e6:.1f}" for message in messages]
            row += [", ".join(speeds) + cut, f"{_size(state['chunk'])}, {_size(state['window'])}"]
        lines.append(f"| {rtt} ms, {loss:g} % | {' | '.join(row)} |")
    return lines


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB" if nbytes >= MIB else f"{nbytes >> 10} KiB"


def recovery_table(cells: list[dict[str, Any]], steps: list[Step]) -> list[str]:
    lines = [
        "| disturbance | setting | Mbit/s before | during | data again after, s | pace of before after, s "
        "| in all, s | resent, MiB | all rails broke | ended on |",
        "|---" * 10 + "|",
    ]
    found = {Step.of(cell): cell for cell in cells}
    for step in steps:
        row = _recovery_row(found[step]) if step in found else "not run |" + " |" * 7
        lines.append(f"| {step.disturbance} | {step.setting} | {row}")
    return lines


def _recovery_row(cell: dict[str, Any]) -> str:
    if "error" in cell:
        return f"failed: {cell['error']} |" + " |" * 7
    found = wan_report.recovery(cell)
    message = cell["messages"][0]
    resent = (cell["packets"] - wan_report.ideal_packets(cell)) * wan_report.payload(cell) / MIB
    columns = [
        *(f"{found[name] / 1e6:.0f}" for name in ("before", "during")),
        *(f"{found[name]:.1f}" if found[name] < math.inf else "not by its end" for name in ("flows", "full")),
        f"{message['seconds']:.1f}"
        if wan_report.complete(cell)
        else f"> {message['seconds']:.0f}\\*, {message['landed'] >> 20} MiB landed",
        # Of an unfinished transfer nobody knows what was sent twice.
        f"{max(resent, 0.0):.1f}" if wan_report.complete(cell) else "-",
        f"{wan_report.breaks(cell) or 'no'}",
        cell["receiver"].get("fabric", "-"),
    ]
    return " | ".join(columns) + " |"


def make(results: Results, docs: Path) -> None:
    import wan_plot

    groups, model = wan_compare.grouped(results.cells), wan_compare.simulated()
    steps = wan_cells.plan(results.header["full"])
    settings = list(dict.fromkeys(step.setting for step in steps if not step.disturbance))
    lines = [
        *wan_compare.conditions(results, steps),
        "",
        "### In short",
        "",
        *wan_compare.short(groups, model),
        "",
        "### Goodput and packets",
        "",
        "Goodput of one message of 16 MiB in Mbit/s (of several runs the median; of `adaptive` the first message), and",
        "in brackets the packets sent for each that would have been enough. `*`: the deadline cut it off, and what had",
        "landed counts, without packets: a lower bound, or with `<` an upper one, as nothing of a huge write lands",
        f"before its end. `+`: the emulated CPU was idle for less than {wan_report.IDLE_ENOUGH:.0%} of the time, so it",
        "may have been the limit. `!`: all rails broke and were opened again.",
        "",
        *goodput_table(groups, model, settings),
        "",
        "### What adaptive chose",
        "",
        f"{wan_cells.ADAPTIVE_MESSAGES} messages of 16 MiB one after the other (fewer if the deadline came), "
        f"{wan_cells.ADAPTIVE_RAILS} rails: goodput of each in Mbit/s, and the last chunk and window.",
        "",
        *adaptive_table(groups),
        "",
        "### Recovery",
        "",
        f"64 MiB at {wan_cells.RECOVERY_RTT} ms without other loss; the disturbance begins after "
        f"{wan_cells.DISTURB_AT:g} s and lasts {wan_cells.OUTAGE:g} s. *during*, *data again* and *pace* are of the "
        "bytes that come to the receiver's interface, copies included.",
        "",
        *(f"- **{name}**: {words}." for name, words in wan_cells.DISTURBANCES.items()),
        "",
        *recovery_table(results.cells, [step for step in steps if step.disturbance]),
    ]
    (docs / "wan-table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    recoveries = [cell for cell in results.cells if cell["disturbance"]]
    wan_plot.plot(groups, model, recoveries, docs / "wan.svg")
