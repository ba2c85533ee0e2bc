"""The plot of docs/wan.md."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import wan_report
from wan_cells import CHUNKS, DISTURB_AT, DISTURBANCES, LOSSES, MESSAGE, MIB, OUTAGE, PLAIN, RTTS
from wan_compare import SIMULATED, Cells, Goodputs, best, fixed

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "wan", "font.family": "DejaVu Sans", "font.size": 8}
from matplotlib import pyplot  # noqa: E402

_LINES = {
    "verbs": ("C0", "-", "verbs (rxe), measured"),
    "tcp": ("C1", "-", "tcp fabric, measured"),
    PLAIN: ("black", ":", "plain TCP socket, measured"),
    SIMULATED: ("C3", "--", "go-back-N NIC, SIMULATED"),
}
_STEP = 0.4  # seconds over which the recovery plots average


def plot(groups: Cells, model: Goodputs, recoveries: list[dict[str, Any]], path: Path) -> None:
    figure, rows = pyplot.subplots(4, 3, figsize=(10, 11), layout="constrained")
    chunks = (*CHUNKS, MESSAGE)
    for loss, row in zip(LOSSES, rows, strict=False):
        for rtt, axes in zip(RTTS, row, strict=True):
            for fabric, (color, style, label) in _LINES.items():
                found = fixed(model if fabric == SIMULATED else groups, fabric, rtt, loss)
                # A plain socket has no chunks: a line across.
                pairs = [best(found, (chunk if fabric != PLAIN else 0,)) for chunk in chunks]
                values = [bits / 1e6 if setting else math.nan for setting, bits in pairs]
                axes.plot(range(len(chunks)), values, color=color, linestyle=style, marker=".", label=label)
            labels = [*(f"{c // 1024} KiB" if c < MIB else f"{c // MIB} MiB" for c in CHUNKS), "huge"]
            axes.set_xticks(range(len(chunks)), labels)
            axes.set(title=f"RTT {rtt} ms, loss {loss:g} %", ylim=(0, 105))
            axes.tick_params(labelbottom=loss == LOSSES[-1], labelleft=rtt == RTTS[0])
        row[0].set(ylabel="Mbit/s, best depth and rails")
    rows[0][0].legend()
    for how, axes in zip(DISTURBANCES, rows[3], strict=True):
        for cell in recoveries:
            if cell["disturbance"] == how and "error" not in cell:
                _trace(axes, cell)
        axes.set(title=f"{how}, {OUTAGE:g} s", xlabel="seconds", ylim=(0, 130), xlim=(0, 16))
        axes.tick_params(labelleft=axes is rows[3][0])
        axes.axvspan(DISTURB_AT, DISTURB_AT + OUTAGE, color="grey", alpha=0.2)
    rows[3][0].set(ylabel="Mbit/s that arrive")
    figure.legend(*rows[3][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, metadata={"Date": None})


def _trace(axes: Any, cell: dict[str, Any]) -> None:
    setting = wan_report.setting_of(cell)
    if setting.adaptive:
        return  # as readable as it is with the others
    start = cell["messages"][0]["start"]
    thinned = [(cell["samples"][0][0], cell["samples"][0][1])]
    for when, came, _ in cell["samples"]:
        if when - thinned[-1][0] >= _STEP:
            thinned.append((when, came))
    times = [(t0 + t1) / 2 - start for (t0, _), (t1, _) in pairwise(thinned)]
    speeds = [(b1 - b0) * 8 / (t1 - t0) / 1e6 for (t0, b0), (t1, b1) in pairwise(thinned)]
    color = _LINES[setting.fabric][0]
    style = ":" if setting.fabric == PLAIN else "--" if setting.depth == 1 else "-"
    axes.plot(times, speeds, color=color, linestyle=style, linewidth=1, label=f"{setting.fabric}, {setting.what}")
