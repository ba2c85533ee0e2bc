"""docs/wan-rounds-table.md and docs/wan-rounds.svg of what `wan_rounds.py --all --json` has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import state_dict
from wan_rounds import Case, medians

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "wan", "font.family": "DejaVu Sans", "font.size": 8}
from matplotlib import pyplot  # noqa: E402

DOCS = Path(__file__).resolve().parents[1] / "docs"
_HEADINGS = ("", "s a round", "down", "up", "times grpc", "% of link", "MB a site", "CPU s", "first round, s")

#: A case, and the rounds of each configuration.
Results = dict[Case, dict[str, list[dict[str, float]]]]


def read(path: Path) -> tuple[dict[str, Any], Results]:
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    results: Results = {}
    for line in lines:
        results.setdefault(Case(**line["case"]), {})[line["configuration"]] = line["rounds"]
    return header, results


def table(case: Case, runs: dict[str, list[dict[str, float]]]) -> list[str]:
    usual = medians(runs.get("grpc", []))
    lines = [f"### {case.mib} MiB, {case.sites} sites, {case.wires}: medians of {case.rounds}", ""]
    lines += [" | ".join(("", *_HEADINGS, "")).strip(), "|---|" + "---:|" * (len(_HEADINGS) - 1)]
    for name, rounds in runs.items():
        if not (m := medians(rounds)):
            lines.append(f"| {name} | not done in {state_dict.TIMEOUT:g} s |" + " |" * (len(_HEADINGS) - 2))
            continue
        cells = [f"{m[key]:.2f}" for key in ("seconds", "down", "up")]
        cells += [f"{usual['seconds'] / m['seconds']:.1f}" if usual else "", f"{case.share(m):.0f}"]
        cells += [f"{m['bytes'] / 1e6:.1f}", f"{m['cpu']:.2f}", f"{rounds[0]['seconds']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def plot(results: Results, path: Path) -> None:
    """Seconds of a round, a group of bars for each case in which there is FLARE's grpc."""
    shown = {case: runs for case, runs in results.items() if medians(runs.get("grpc", []))}
    names = [name for name in ("grpc", "direct", "nf4") if all(name in runs for runs in shown.values())]
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(shown) + 1), layout="constrained")
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        values = [medians(runs[name]).get("seconds", 0.0) for runs in shown.values()]
        places = [place + number * height for place in range(len(shown))]
        bars = axes.barh(places, values, height * 0.9, label=name, color=f"C{number}")
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=7)
    axes.set_yticks(
        [place + 0.4 - height / 2 for place in range(len(shown))],
        [f"{case.mib} MiB, {case.sites} sites\n{case.wires}" for case in shown],
    )
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="seconds of a round, down and up (logarithmic)")
    axes.set_xlim(right=1.5 * axes.get_xlim()[1])  # for the label of the longest
    axes.margins(y=0.01)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def write(path: Path) -> None:
    header, results = read(path)
    lines = [f"{header['machine']}; {header['versions']}.", ""]
    for case, runs in results.items():
        lines += table(case, runs)
    text = "\n".join(lines).rstrip() + "\n"
    (DOCS / "wan-rounds-table.md").write_text(text)
    print(text)
    plot(results, DOCS / "wan-rounds.svg")
