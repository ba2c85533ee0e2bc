"""docs/wan-table.md and docs/wan.svg of the results of `wan_run.py`, with a simulated go-back-N NIC beside them."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import wan_cells
import wan_report
from wan_cells import FABRICS, LOSSES, MESSAGE, PLAIN, RTTS, Setting
from wan_wire import RATE, VERBS_PAYLOAD

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from links import RESTART, Link, simulate  # noqa: E402

from nvflare_rdma.channel.controllers import make_controller  # noqa: E402

#: Simulated seconds: as long as a huge write may take.
DEADLINE, SEEDS = 20.0, 5
SIMULATED = "simulated"
Cells = dict[tuple[Setting, float, float], list[dict[str, Any]]]
Goodputs = dict[tuple[Setting, float, float], float]


def simulated() -> Goodputs:
    """The go-back-N model of docs/controllers.md on the same links, with the same packets, mean of `SEEDS` runs."""
    found: Goodputs = {}
    for setting in wan_cells.settings():
        if setting.fabric != "verbs" or setting.rails > 1:
            continue  # the model has one queue of writes
        kind = "adaptive" if setting.adaptive else "fixed"
        for rtt, loss in itertools.product(RTTS, LOSSES):
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
    groups: Cells = {}
    for cell in cells:
        groups.setdefault((wan_report.setting_of(cell), cell["rtt"], cell["loss"]), []).append(cell)
    return groups


def first_goodput(cells: list[dict[str, Any]]) -> float:
    """Of the first message, median of the runs; 0 for a run that failed."""
    return statistics.median(
        wan_report.goodput(cell["messages"][0]) if cell["messages"] and "error" not in cell else 0.0 for cell in cells
    )


def goodput_table(groups: Cells, model: Goodputs) -> list[str]:
    links = [(rtt, loss) for rtt in RTTS for loss in LOSSES]
    lines = ["| | rails | " + " | ".join(f"{rtt} ms, {loss:g} %" for rtt, loss in links) + " |"]
    lines.append("|---" * (2 + len(links)) + "|")
    for setting in wan_cells.settings():
        row = [_measured(groups.get((setting, *link), [])) for link in links]
        lines.append(f"| {setting.fabric}, {setting.what} | {setting.rails} | {' | '.join(row)} |")
    for setting in dict.fromkeys(key[0] for key in model):
        row = [f"{model[setting, *link] / 1e6:.1f}" for link in links]
        lines.append(f"| *simulated* go-back-N, {setting.what} | | {' | '.join(row)} |")
    return lines


def _measured(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return "not run"
    if all("error" in cell for cell in cells):
        return "failed"
    ratios = [wan_report.over_ideal(cell) for cell in cells if "error" not in cell]
    marks = "*" if not all(map(wan_report.complete, cells)) else ""
    marks += "+" if any(cell.get("idle", 1) < wan_report.IDLE_ENOUGH for cell in cells) else ""
    marks += "!" if any(map(wan_report.breaks, cells)) else ""
    ratio = statistics.median(ratios)
    return f"{first_goodput(cells) / 1e6:.1f}{marks} ({f'{ratio:.2f}' if ratio < math.inf else '-'})"


def adaptive_table(groups: Cells) -> list[str]:
    lines = ["| RTT, loss | " + " | ".join(f"{fabric}: goodput | chunk, window" for fabric in FABRICS) + " |"]
    lines.append("|---" * (1 + 2 * len(FABRICS)) + "|")
    for rtt, loss in itertools.product(RTTS, LOSSES):
        row = []
        for fabric in FABRICS:
            cells = groups.get((Setting(fabric, wan_cells.ADAPTIVE_RAILS, wan_cells.MIB, 4, True), rtt, loss), [])
            if not cells or "error" in cells[0]:
                row += ["not run", ""]
                continue
            messages, state = cells[0]["messages"], cells[0]["receiver"]
            speeds = [f"{wan_report.goodput(message) / 1e6:.1f}" for message in messages]
            row += [", ".join(speeds), f"{_size(state['chunk'])}, {_size(state['window'])}"]
        lines.append(f"| {rtt} ms, {loss:g} % | {' | '.join(row)} |")
    return lines


def _size(nbytes: int) -> str:
    return f"{nbytes / wan_cells.MIB:.1f} MiB" if nbytes >= wan_cells.MIB else f"{nbytes >> 10} KiB"


def recovery_table(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| disturbance | setting | Mbit/s before | during | data again after, s | pace of before after, s "
        "| in all, s | resent, MiB | rails broke | ended on |",
        "|---" * 10 + "|",
    ]
    for cell in cells:
        setting = wan_report.setting_of(cell)
        if "error" in cell:
            lines.append(f"| {cell['disturbance']} | {setting} | failed: {cell['error']} |" + " |" * 7)
            continue
        found = wan_report.recovery(cell)
        message = cell["messages"][0]
        resent = (cell["packets"] - wan_report.ideal_packets(cell)) * wan_report.payload(cell) / wan_cells.MIB
        columns = [
            *(f"{found[name] / 1e6:.0f}" for name in ("before", "during")),
            *(f"{found[name]:.1f}" if found[name] < math.inf else "never" for name in ("flows", "full")),
            f"{message['seconds']:.1f}" if wan_report.complete(cell) else f"{message['landed'] >> 20} MiB landed",
            f"{resent:.1f}",
            f"{wan_report.breaks(cell) or 'no'}",
            cell["receiver"].get("fabric", ""),
        ]
        lines.append(f"| {cell['disturbance']} | {setting} | {' | '.join(columns)} |")
    return lines


def make(path: Path) -> None:
    import wan_plot

    result = json.loads(path.read_text())
    groups, model = grouped(result["cells"]), simulated()
    pings = [f"{p['ping']:.1f}" for p in result["pings"]]
    lines = [
        f"{len(result['cells'])} cells and {len(result['recovery'])} recoveries in {result['took'] / 60:.0f} minutes: "
        f"{result['machine']}; {result['versions']}. `ping` found RTTs of {', '.join(pings)} ms. "
        f"Left out for want of time: {'; '.join(result['left_out']) or 'nothing'}.",
        "",
        "### Goodput and packets",
        "",
        "Goodput of one message of 16 MiB in Mbit/s, and packets sent for each that would have been enough.",
        "`*`: not all of it landed in time. `+`: the emulated CPU was idle for less than 10 % of the time. `!`: all",
        "rails broke and were opened again.",
        "",
        *goodput_table(groups, model),
        "",
        "### What adaptive chose",
        "",
        f"{wan_cells.ADAPTIVE_MESSAGES} messages of 16 MiB one after the other (as many as began within 20 s), "
        f"{wan_cells.ADAPTIVE_RAILS} rails: goodput of each in Mbit/s, and the last chunk and window.",
        "",
        *adaptive_table(groups),
        "",
        "### Recovery",
        "",
        f"64 MiB at {wan_cells.RECOVERY_RTT} ms without other loss; the disturbance begins after "
        f"{wan_cells.DISTURB_AT:g} s and lasts {wan_cells.OUTAGE:g} s.",
        "",
        *recovery_table(result["recovery"]),
    ]
    (ROOT / "docs" / "wan-table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    wan_plot.plot(groups, model, result["recovery"], ROOT / "docs" / "wan.svg")


def best(groups: Cells, model: Goodputs, fabric: str, chunk: int, rtt: float, loss: float) -> float:
    """bit/s of the best depth and rails with that chunk."""
    if fabric == SIMULATED:
        found = [v for (s, *link), v in model.items() if s.chunk == chunk and not s.adaptive and link == [rtt, loss]]
    else:
        found = [
            first_goodput(cells)
            for (s, *link), cells in groups.items()
            if (s.fabric, s.chunk, s.adaptive) == (fabric, chunk if fabric != PLAIN else 0, False)
            and link == [rtt, loss]
        ]
    return max(found, default=math.nan)
