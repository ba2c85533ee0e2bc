"""The end of a run: its numbers as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from traffic.summary import read_lines, summarize

LOSS_FILE = "held_out_loss.jsonl"


def collect(workspace: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything a finished run recorded under `workspace`, as one JSON-ready dict.

    Raises:
        RuntimeError: a round has no bytes or no loss: the run did not get there.
    """
    traffic = summarize(read_lines(workspace))
    lines = _lines(workspace)
    losses = {number: line["held_out_loss"] for number, line in lines.items()}
    rows = [{**asdict(row), "held_out_loss": losses.get(row.round)} for row in traffic.rounds]
    missing = set(range(settings["rounds"])) - {row["round"] for row in rows if row["held_out_loss"] is not None}
    if missing:
        raise RuntimeError(f"nothing recorded for round(s) {', '.join(str(n + 1) for n in sorted(missing))}")
    return {
        **settings,
        "initial_loss": losses.get(None),
        "final_loss": rows[-1]["held_out_loss"],
        "final_digest": lines[rows[-1]["round"]]["digest"],
        "bytes_per_round": round(sum(r["bytes_down"] + r["bytes_up"] for r in rows) / len(rows)),
        "bytes_outside_rounds": traffic.outside_down + traffic.outside_up,
        "rounds_table": rows,
    }


def _lines(workspace: Path) -> dict[int | None, dict[str, Any]]:
    lines = [json.loads(text) for path in Path(workspace).rglob(LOSS_FILE) for text in path.read_text().splitlines()]
    return {line["round"]: line for line in lines}


def print_table(results: dict[str, Any]) -> None:
    """A row a round: loss, bytes of each direction, seconds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(results))
    for heading in (
        "round",
        "held-out loss",
        "server->sites MB",
        "sites->server MB",
        "s down",
        "s up",
        "s codec",
    ):
        table.add_column(heading, justify="right")
    if results["initial_loss"] is not None:
        table.add_row("-", f"{results['initial_loss']:.4f}")
    for row in results["rounds_table"]:
        table.add_row(
            str(row["round"] + 1),
            f"{row['held_out_loss']:.4f}",
            f"{row['bytes_down'] / 1e6:.3f}",
            f"{row['bytes_up'] / 1e6:.3f}",
            f"{row['seconds_down']:.2f}",
            f"{row['seconds_up']:.2f}",
            f"{row['seconds_codec']:.2f}",
        )
    console = Console()
    # A pipe has no width of its own, and a table squeezed into 80 columns can't be read.
    Console(width=None if console.is_terminal else 110).print(table)


def write_json(results: dict[str, Any], path: Path) -> None:
    """The dict as an indented JSON file."""
    path.write_text(json.dumps(results, indent=2) + "\n")


def write_plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss, bytes and seconds by round, one line or bar a run, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, moved, seconds) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        rows = run["rounds_table"]
        rounds = [row["round"] + 1 for row in rows]
        at = [r + (i - (len(runs) - 1) / 2) * width for r in rounds]
        start = [] if run["initial_loss"] is None else [(0, run["initial_loss"])]
        points = start + [(r, row["held_out_loss"]) for r, row in zip(rounds, rows, strict=True)]
        loss.plot(*zip(*points, strict=True), marker="o", label=title(run))
        moved.bar(at, [(row["bytes_down"] + row["bytes_up"]) / 1e6 for row in rows], width)
        seconds.bar(at, [row["seconds_down"] + row["seconds_up"] for row in rows], width)
    loss.set(title="held-out loss", xlabel="round", ylabel="nats per byte")
    moved.set(title="bytes moved, both directions", xlabel="round", ylabel="MB")
    seconds.set(title="time a site spent moving them", xlabel="round", ylabel="s")
    loss.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def title(results: dict[str, Any]) -> str:
    """Short name of a run."""
    options = [f", {name.replace('_', ' ')}" for name in ("error_feedback", "delta", "direct") if results.get(name)]
    return f"{results['quantize']}{''.join(options)} over {results['driver']}"
