"""Goodputs of the settings of `wan.py` beside one another, and beside a simulated go-back-N NIC."""

from __future__ import annotations

import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import wan_cells
import wan_report
from wan_cells import FABRICS, LOSSES, MESSAGE, MIB, PLAIN, RTTS, Setting, Step
from wan_report import Results
from wan_wire import RATE, VERBS_PAYLOAD

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nvflare_rdma.channel.controllers import make_controller  # noqa: E402
from tests.support.links import RESTART, Link, simulate  # noqa: E402

#: Simulated seconds: as long as a huge write may take.
DEADLINE, SEEDS = 20.0, 5
SIMULATED = "simulated"
LINKS = list(itertools.product(RTTS, LOSSES))
Cells = dict[tuple[Setting, float, float], list[dict[str, Any]]]
Goodputs = dict[tuple[Setting, float, float], float]


def simulated() -> Goodputs:
    """The go-back-N model of docs/controllers.md on the same links, with the same packets, mean of `SEEDS` runs."""
    found: Goodputs = {}
    for setting in wan_cells.settings():
        if setting.fabric != "verbs" or setting.rails > 1:
            continue  # the model has one queue of writes
        kind = "adaptive" if setting.adaptive else "fixed"
        for rtt, loss in LINKS:
            link = Link(RATE, rtt / 1e3, loss / 100, RESTART, mtu=VERBS_PAYLOAD)
            runs = [
                simulate(
                    make_controller(kind, setting.chunk, setting.depth, 4 * wan_cells.LONG_MESSAGE),
                    link,
                    seconds=DEADLINE,
                    nbytes=MESSAGE,
                    seed=seed,
                )
                for seed in range(1, SEEDS + 1 if loss else 2)
            ]
            named = Setting(SIMULATED, 1, setting.chunk, setting.depth, setting.adaptive)
            found[named, rtt, loss] = statistics.mean(run.goodput for run in runs) * 8
    return found


def grouped(cells: list[dict[str, Any]]) -> Cells:
    """Those of the matrix."""
    groups: Cells = {}
    for cell in cells:
        if not cell["disturbance"]:
            groups.setdefault((wan_report.setting_of(cell), cell["rtt"], cell["loss"]), []).append(cell)
    return groups


def first_goodput(cells: list[dict[str, Any]]) -> float:
    """Of the first message, median of the runs; 0 for a run that failed."""
    return statistics.median(
        wan_report.goodput(cell["messages"][0]) if cell["messages"] and "error" not in cell else 0.0 for cell in cells
    )


def speed(bits: float, deadline: float) -> str:
    """Nothing lands of a huge write that was cut off: that is a bound."""
    return f"{bits / 1e6:.1f}" if bits else f"< {MESSAGE * 8 / deadline / 1e6:.1f}"


def measured(cells: list[dict[str, Any]]) -> str:
    """Goodput and marks."""
    if not cells:
        return "not run"
    if all("error" in cell for cell in cells):
        return "failed"
    marks = "\\*" if not all(map(wan_report.first_complete, cells)) else ""
    marks += "+" if any(cell.get("idle", 1) < wan_report.IDLE_ENOUGH for cell in cells) else ""
    marks += "!" if any(map(wan_report.breaks, cells)) else ""
    return f"{speed(first_goodput(cells), cells[0]['deadline'])}{marks}"


def fixed(groups: Cells | Goodputs, fabric: str, rtt: float, loss: float) -> dict[Setting, float]:
    """Goodput of each setting without a controller, measured or simulated."""
    return {
        setting: found if isinstance(found, float) else first_goodput(found)
        for (setting, *link), found in groups.items()
        if setting.fabric == fabric and not setting.adaptive and link == [rtt, loss]
    }


def best(found: dict[Setting, float], chunks: tuple[int, ...]) -> tuple[Setting | None, float]:
    """The fastest with one of these chunks."""
    chosen = {setting: bits for setting, bits in found.items() if setting.chunk in chunks}
    fastest = max(chosen, key=lambda setting: chosen[setting], default=None)
    return fastest, chosen[fastest] if fastest else 0.0


def conditions(results: Results, steps: list[Step]) -> list[str]:
    """What ran."""
    header, cells = results.header, results.cells
    done = {Step.of(cell) for cell in cells}
    pings = {link["rtt"]: link["ping"] for link in results.links}
    left = sum(step not in done for step in steps)
    cut = sum(not wan_report.complete(cell) for cell in cells)
    busy = sum(cell.get("idle", 1) < wan_report.IDLE_ENOUGH for cell in cells)
    repeated = (
        f"once; {len(list(wan_cells.repeated()))} settings on the link of {wan_cells.REPEATED_LINK[0]} ms and "
        f"{wan_cells.REPEATED_LINK[1]:g} % {wan_cells.REPEATS} times"
        if header["full"]
        else "once; this was a **reduced run** (`--reduced`), with a sample of the settings"
    )
    sittings = f" in {len(results.headers)} sittings" if len(results.headers) > 1 else ""
    return [
        f"- **Run**: {header['started']}{sittings}, commit {header['commit']}, {len(done)} cells in "
        f"{sum(cell['took'] for cell in cells) / 60:.0f} minutes, each measured {repeated}. Not run: {left}. "
        f"Cut off by their deadline, or failed: {cut}. CPU idle for less than {wan_report.IDLE_ENOUGH:.0%}: {busy}.",
        f"- **Guest**: {header['guest']}; {header['versions']}, pyverbs {header['pyverbs']}; {header['qemu']}.",
        f"- **Host**: {header['host']}.",
        f"- **Wire**: {header['rate'] * 8 / 1e6:.0f} Mbit/s, queue of {header['queue'] / 1e6:.2f} MB; `ping` found "
        f"{', '.join(f'{ping:.1f} ms at {rtt}' for rtt, ping in sorted(pings.items()))}. TCP: {header['congestion']}.",
        "- **Deadlines**: " + ", ".join(f"{what} {s:g} s" for what, s in header["deadlines"].items()) + ".",
    ]


def short(groups: Cells, model: Goodputs) -> list[str]:
    """The best of each kind, and what a huge write is beside it. All in Mbit/s."""
    lines = [
        "Mbit/s; *best*: the best fixed chunk, depth and rails of that link, the huge write left aside.",
        "",
        "| RTT, loss | plain socket | tcp, best | verbs, one huge write | verbs, best | *simulated*, one huge write "
        "| *simulated*, best |",
        "|---" * 7 + "|",
    ]
    ratios: dict[str, dict[str, float]] = {"verbs": {}, SIMULATED: {}}
    one_rail: dict[str, float] = {}
    adaptive: dict[str, dict[str, float]] = {fabric: {} for fabric in FABRICS}
    for rtt, loss in LINKS:
        name = f"{rtt} ms, {loss:g} %"
        row = [measured(groups.get((Setting(PLAIN), rtt, loss), []))]
        for fabric in ("tcp", "verbs", SIMULATED):
            found = fixed(model if fabric == SIMULATED else groups, fabric, rtt, loss)
            setting, bits = best(found, wan_cells.CHUNKS)
            huge = wan_cells.huge(fabric, MESSAGE)
            if fabric in ratios:
                whole = found.get(huge, 0.0)
                row.append(speed(whole, DEADLINE) if huge in found else "not run")
                if setting and huge in found and bits:
                    ratios[fabric][name] = whole / bits
                _, alone = best({s: pace for s, pace in found.items() if s.rails == 1}, wan_cells.CHUNKS)
                if fabric == "verbs" and huge in found and alone:
                    one_rail[name] = whole / alone
            rails = f", {setting.rails} rails" if setting and setting.rails > 1 else ""
            row.append(f"{bits / 1e6:.1f} ({setting.what}{rails})" if setting else "not run")
            cells = groups.get((Setting(fabric, wan_cells.ADAPTIVE_RAILS, MIB, 4, True), rtt, loss), [])
            if fabric in FABRICS and bits and cells and wan_report.complete(cells[0]):
                adaptive[fabric][name] = wan_report.goodput(cells[0]["messages"][-1]) / bits
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        f"- One huge write over verbs (rxe), **measured**, reached {_span(ratios['verbs'])} of the best chunks.",
        f"- The same beside the best chunks over **one** rail, which is one queue pair as well: {_span(one_rail)}.",
        "- One huge write of a NIC that goes back to the start of the write, **simulated**, reached "
        f"{_span(ratios[SIMULATED])} of the best chunks.",
        *(
            f"- The last message of `adaptive` over {fabric} reached {_span(shares)} of the best fixed setting."
            for fabric, shares in adaptive.items()
        ),
        *(f"- Packets sent over the ideal, {fabric}: {_packets(groups, fabric)}." for fabric in (*FABRICS, PLAIN)),
    ]
    return lines


def _span(shares: dict[str, float]) -> str:
    if not shares:
        return "(not run)"
    least, most = min(shares, key=lambda name: shares[name]), max(shares, key=lambda name: shares[name])
    return f"{shares[least]:.0%} ({least}) to {shares[most]:.0%} ({most})"


def _packets(groups: Cells, fabric: str) -> str:
    """By the loss of the link."""
    found = []
    for loss in LOSSES:
        ratios = {
            f"{setting.what}, {setting.rails} rail{'s' * (setting.rails > 1)}, {rtt} ms": wan_report.over_ideal(cell)
            for (setting, rtt, at), cells in groups.items()
            for cell in cells
            if setting.fabric == fabric and at == loss and wan_report.complete(cell)
        }
        if ratios:
            most = max(ratios, key=lambda name: ratios[name])
            middle = statistics.median(ratios.values())
            found.append(f"at {loss:g} % loss {middle:.2f} (median) to {ratios[most]:.2f} ({most})")
    return "; ".join(found) or "not run"
