"""Run the job twice, in full precision and in 4 bits, and show the two side by side.

python jobs/stdlib_lm/demo.py            (or: make demo)

Writes demo_workspace/summary.json and demo_workspace/comparison.png; each run's own results are in a folder below.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

from common import DRIVERS  # noqa: E402
from progress import SECONDS_A_LINE  # noqa: E402
from report import title, write_json, write_plot  # noqa: E402

RUNS = ("none", "normfloat4")


def compare(full: dict[str, Any], few: dict[str, Any]) -> dict[str, Any]:
    """What the run with few bits saved, and what that did to the loss, against the one in full precision."""
    return {
        "times_fewer_bytes": round(full["bytes_per_round"] / few["bytes_per_round"], 3),
        "percent_of_full_bytes": round(100 * few["bytes_per_round"] / full["bytes_per_round"], 3),
        "final_loss_difference_percent": round(100 * (few["final_loss"] / full["final_loss"] - 1), 3),
    }


def print_comparison(full: dict[str, Any], few: dict[str, Any], summary: dict[str, Any]) -> None:
    """Both runs' rounds side by side, then what they come to."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{title(full)}  |  {title(few)}")
    table.add_column("round", justify="right")
    for heading in ("held-out loss", "MB down", "MB up", "s moving", "s codec"):
        for run in (full, few):
            table.add_column(f"{heading}\n{run['quantize']}", justify="right")
    for a, b in zip(full["rounds_table"], few["rounds_table"], strict=True):
        cells = [str(a["round"] + 1)]
        cells += [f"{run['held_out_loss']:.4f}" for run in (a, b)]
        cells += [f"{run[key] / 1e6:.3f}" for key in ("bytes_down", "bytes_up") for run in (a, b)]
        cells += [f"{run['seconds_down'] + run['seconds_up']:.2f}" for run in (a, b)]
        cells += [f"{run['seconds_codec']:.2f}" for run in (a, b)]
        table.add_row(*cells)
    Console(width=None if console.is_terminal else 150).print(table)
    print(
        f"{few['quantize']}: {summary['times_fewer_bytes']:.2f} times fewer bytes "
        f"({summary['percent_of_full_bytes']:.2f} % of full precision's, a round, both directions); "
        f"final held-out loss {few['final_loss']:.4f} against {full['final_loss']:.4f} "
        f"({summary['final_loss_difference_percent']:+.2f} %; one run of each: a difference of this size can be noise)"
    )


def wait_for(run: subprocess.Popen[bytes], progress: Path) -> int:
    """The exit status of `run`. Until it shows its own progress, from `progress`, there is a line every few seconds:
    loading FLARE and torch can take a minute on a busy machine.
    """
    began = time.monotonic()
    try:
        while True:
            try:
                return run.wait(SECONDS_A_LINE)
            except subprocess.TimeoutExpired:
                if not progress.is_dir():
                    print(f"loading FLARE and torch ({time.monotonic() - began:.0f} s)", flush=True)
    except BaseException:
        run.kill()
        run.wait()
        raise


def main() -> int:
    """Run both; 1 if either failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=DRIVERS, default="rdma")
    parser.add_argument("--workspace", type=Path, default=Path("demo_workspace"))
    args, for_job = parser.parse_known_args()  # what is left is for job.py
    start = time.monotonic()
    runs = []
    for i, quantize in enumerate(RUNS):
        print(f"run {i + 1} of {len(RUNS)}: {quantize}", flush=True)
        folder = args.workspace / quantize
        # What the two runs differ in comes last, so that nothing passed on can change it.
        command = [sys.executable, str(HERE / "job.py"), *for_job, "--quantize", quantize, "--driver", args.driver]
        # A run of its own process: FLARE keeps state per process.
        shutil.rmtree(folder / "progress", ignore_errors=True)  # an earlier run's
        status = wait_for(subprocess.Popen([*command, "--workspace", str(folder)]), folder / "progress")
        if status:
            print(f"the {quantize} run failed", file=sys.stderr)
            return 1
        runs.append(json.loads((folder / "results.json").read_text()))
    summary = compare(*runs)
    summary["wall_seconds"] = round(time.monotonic() - start, 1)
    print_comparison(*runs, summary)
    write_json({**summary, "runs": runs}, args.workspace / "summary.json")
    write_plot(runs, args.workspace / "comparison.png")
    print(f"{summary['wall_seconds']:.0f} s; summary.json and comparison.png are in {args.workspace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
