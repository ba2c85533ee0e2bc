"""The adaptive controller beside the best fixed setting, on simulated links. See docs/controllers.md.

    python benchmarks/controllers.py [--quick] [--processes 2] [--docs]

For each link (bandwidth x RTT x loss x model of what a lost packet costs) the best fixed chunk and depth are found by
search, for a long transfer and for a short one, and the adaptive controller runs on the same. Simulated time only:
the result is the same on every machine. ``--docs`` writes docs/controllers-table.md and docs/controllers.svg.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nvflare_rdma.channel.controllers import Controller, make_controller  # noqa: E402
from tests.support.link_search import CHUNKS, best_fixed, mean_goodput, restart_goodput  # noqa: E402
from tests.support.links import GIB, MIB, MODELS, RESTART, TCP, Link, simulate  # noqa: E402

BANDWIDTHS = (10e6, 100e6, 1e9, 10e9, 100e9)
RTTS = (0.05e-3, 1e-3, 10e-3, 50e-3, 200e-3)
LOSSES = (0.0, 1e-4, 1e-3, 1e-2)
SHORT, SHORT_SEEDS = 64 * MIB, 3
SEEDS = (1, 2, 3, 4)  # of the long transfer; without loss all are the same
MODEL_NAMES = {TCP: "TCP", "resume": "NIC that resumes", RESTART: "NIC that restarts"}


def adaptive() -> Controller:
    return make_controller("adaptive", MIB, 8, 8 * GIB)


@dataclass(frozen=True)
class Cell:
    """Goodputs in bytes/s; ``steady`` is the second half of the long transfer; chunk and window are its medians.

    ``halves`` and ``wholes``: shares of the best setting's second half and whole, for each seed."""

    link: Link
    best: tuple[float, int, int]
    best_short: float
    halves: tuple[float, ...]
    wholes: tuple[float, ...]
    whole: float
    steady: float
    short: float
    chunk: int
    window: int

    @property
    def of_best(self) -> float:
        return self.halves[0]


def measure(link: Link) -> Cell:
    run = simulate(adaptive(), link, seconds=link.long, trace=True)
    best = best_fixed(link, seconds=link.long)
    halves, wholes = [], []
    for seed in SEEDS if link.loss else SEEDS[:1]:
        fixed = make_controller("fixed", *best[1:], 1 << 62)
        runs = [simulate(c, link, seconds=link.long, trace=True, seed=seed) for c in (adaptive(), fixed)]
        ours, theirs = (r.between(link.long / 2, link.long) for r in runs)
        halves.append(ours / theirs)
        wholes.append(runs[0].goodput / runs[1].goodput)
    half = [line for line in run.trace if line[0] > link.long / 2]
    return Cell(
        link,
        best,
        best_fixed(link, seeds=SHORT_SEEDS, nbytes=SHORT)[0],
        tuple(halves),
        tuple(wholes),
        run.goodput,
        run.between(link.long / 2, link.long),
        mean_goodput(adaptive, link, SHORT_SEEDS, nbytes=SHORT),
        int(statistics.median_low(line[1] for line in half)),
        int(statistics.median_low(line[2] for line in half)),
    )


def size(nbytes: float) -> str:
    return (
        f"{nbytes / MIB:.0f}M"
        if nbytes >= 10 * MIB
        else f"{nbytes / MIB:.2g}M"
        if nbytes >= MIB
        else f"{nbytes / 1024:.0f}K"
    )


def rate(bandwidth: float) -> str:
    bits = bandwidth * 8
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"


def name(link: Link) -> str:
    return f"{MODEL_NAMES[link.model]}, {rate(link.bandwidth)}, {link.rtt * 1e3:g} ms, loss {link.loss:g}"


def summary(cells: list[Cell]) -> list[str]:
    lines = [
        f"{len(cells)} links. Share of the best fixed setting that adaptive reached, of {len(SEEDS)} seeds the worst:",
        "",
    ]
    lines += [
        "| | least | 10th percentile | median | cells below 85 % | cells below 50 % |",
        "|---|---|---|---|---|---|",
    ]
    for title, of in (
        ("long transfer, second half", [min(c.halves) for c in cells]),
        ("long transfer, all of it", [min(c.wholes) for c in cells]),
        ("64 MiB, mean of three", [c.short / c.best_short for c in cells]),
    ):
        low = [sum(share < limit for share in of) for limit in (0.85, 0.5)]
        tenth = statistics.quantiles(of, n=10, method="inclusive")[0]
        lines.append(f"| {title} | {min(of):.0%} | {tenth:.1%} | {statistics.median(of):.1%} | {low[0]} | {low[1]} |")
    clean = [c.steady / c.link.bandwidth for c in cells if not c.link.loss]
    lines += ["", f"Without loss: at least {min(clean):.0%} of the link in the second half."]
    for title, low_cells in (
        ("below 85 % in the second half", [c for c in cells if min(c.halves) < 0.85]),
        ("below 85 % over all of the long transfer", [c for c in cells if min(c.wholes) < 0.85]),
        ("64 MiB below 50 %", [c for c in cells if c.short / c.best_short < 0.5]),
    ):
        lines += ["", f"Cells {title}: {len(low_cells) or 'none'}.", ""]
        lines += [
            f"- {name(c.link)}: {min(c.halves):.0%} second half, {min(c.wholes):.0%} all, "
            f"{c.short / c.best_short:.0%} of 64 MiB"
            for c in low_cells
        ]
    return lines


def table(cells: list[Cell], rtts: tuple[float, ...]) -> list[str]:
    lines = ["| model | bandwidth | loss | " + " | ".join(f"{r * 1e3:g} ms" for r in rtts) + " |"]
    lines.append("|---" * (3 + len(rtts)) + "|")
    by_link = {(c.link.model, c.link.bandwidth, c.link.loss, c.link.rtt): c for c in cells}
    rows = sorted({key[:3] for key in by_link}, key=lambda key: (MODELS.index(key[0]), key[2], key[1]))
    for model, bandwidth, loss in rows:
        row = [by_link[model, bandwidth, loss, rtt] for rtt in rtts]
        shown = [
            f"{c.steady / bandwidth:.1%} ({c.of_best:.0%}) {size(c.chunk)}/{size(c.window)}, "
            f"best {size(c.best[1])}x{c.best[2]}"
            for c in row
        ]
        lines.append(f"| {MODEL_NAMES[model]} | {rate(bandwidth)} | {loss:g} | " + " | ".join(shown) + " |")
    return lines


def fedrdma() -> list[str]:
    """Best chunk by bandwidth and loss, and what depth brings, where a lost packet restarts the message."""
    lines = [
        "| bandwidth | no loss, depth 1 | no loss, depth 8 | " + " | ".join(f"loss {p:g}" for p in LOSSES[1:]) + " |"
    ]
    lines.append("|---" * (3 + len(LOSSES[1:])) + "|")
    for bandwidth in BANDWIDTHS:
        row = []
        for loss, depths in ((0.0, (1,)), (0.0, (8,)), *((p, (64,)) for p in LOSSES[1:])):
            link = Link(bandwidth / 8, 10e-3, loss, RESTART)
            found, chunk, _ = best_fixed(link, depths=depths, seconds=link.long)
            row.append(f"{size(chunk)}: {found / link.bandwidth:.1%}")
        lines.append(f"| {rate(bandwidth / 8)} | " + " | ".join(row) + " |")
    return lines


def plot(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "controllers", "font.size": 8}
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for loss in (0.0, 1e-5, *LOSSES[1:]):
        link = Link(1e9 / 8, 10e-3, loss, RESTART)
        left.plot(
            [c / MIB for c in CHUNKS], [restart_goodput(link, c) / link.bandwidth for c in CHUNKS], label=f"{loss:g}"
        )
    left.set(title="NIC that restarts, 1 Gbit/s, 10 ms", xlabel="chunk, MiB", ylabel="share of the link", xscale="log")
    left.legend(title="packet loss")
    link = Link(10e9 / 8, 10e-3, 1e-5, RESTART)
    for depth in (1, 4, 16, 64):
        shares = [
            simulate(make_controller("fixed", c, depth, 1 << 62), link, seconds=link.long).goodput / link.bandwidth
            for c in CHUNKS
        ]
        middle.plot([c / MIB for c in CHUNKS], shares, label=f"{depth}")
    middle.set(title="the same, 10 Gbit/s, loss 1e-5", xlabel="chunk, MiB", xscale="log")
    middle.legend(title="depth")
    for model in MODELS:
        shares = sorted(c.of_best for c in cells if c.link.model == model)
        right.plot([i / (len(shares) - 1) for i in range(len(shares))], shares, label=MODEL_NAMES[model])
    right.axhline(0.85, color="grey", linewidth=0.5)
    right.set(
        title="adaptive beside the best fixed", xlabel="share of the cells", ylabel="share of the best", ylim=(0, 1.2)
    )
    right.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three RTTs and three bandwidths")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="write the table and the plot that the docs show")
    args = parser.parse_args()
    shown = RTTS[0::2]
    bandwidths, rtts = (BANDWIDTHS[0::2], shown) if args.quick else (BANDWIDTHS, RTTS)
    links = [Link(b / 8, r, p, m) for m in MODELS for p in LOSSES for b in bandwidths for r in rtts]
    with multiprocessing.Pool(args.processes) as pool:
        cells = pool.map(measure, links, chunksize=1)
    lines = [*summary(cells), "", *table(cells, shown)]
    best = ["", "Best chunk, and share of the link, at 10 ms (with loss: depth 64):", "", *fedrdma()]
    print("\n".join(lines + best))
    if args.docs:
        (ROOT / "docs" / "controllers-table.md").write_text("\n".join(lines) + "\n")
        (ROOT / "docs" / "controllers-fedrdma.md").write_text("\n".join(best[3:]) + "\n")
        plot(cells, ROOT / "docs" / "controllers.svg")


if __name__ == "__main__":
    main()
