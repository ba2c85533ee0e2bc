"""How far training comes when models travel in few bits: jobs/stdlib_lm with each kind of message, several seeds each.

    python benchmarks/convergence.py [--seeds 3] [--rounds 48] [--at-once 2] [--workspace build/convergence]

Every cell is a job of its own in FLARE's simulator, server and sites each a process, of which `results.json` is kept:
what is there already, with the same settings, is not run again. Writes docs/convergence-table.md and
docs/convergence.svg, and prints the former.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import command_line, versions

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "stdlib_lm" / "job.py"
FULL = "fp32"
#: Rounds at the end over which the loss is to have become flat.
TAIL = 5
DEADLINE = 1800.0


@dataclass(frozen=True)
class Message:
    """A way for models to travel: its name in the table, and the job's options."""

    name: str
    codec: str
    options: tuple[str, ...] = ()


FEEDBACK, DELTA = "--error-feedback", "--delta"
MESSAGES = (
    Message(FULL, "none"),
    Message("fp16", "float16"),
    Message("int8", "int8"),
    Message("blockwise8", "blockwise8"),
    Message("fp4", "float4"),
    Message("nf4", "normfloat4"),
    Message("nf4 + error feedback", "normfloat4", (FEEDBACK,)),
    Message("nf4 + error feedback + delta", "normfloat4", (FEEDBACK, DELTA)),
    Message("2-bit + error feedback", "int2", (FEEDBACK,)),
    Message("2-bit + error feedback + delta", "int2", (FEEDBACK, DELTA)),
)


@dataclass(frozen=True)
class Final:
    """The end of one message's runs, in nats per byte, one value a seed."""

    losses: list[float]
    bytes_per_round: float
    #: by how much of itself the loss fell in the last `TAIL` rounds
    tail: float
    #: (loss of the untrained model, after round 1, ...), mean over the seeds
    curve: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation of a seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


def run(message: Message, seed: int, settings: dict[str, int], workspace: Path) -> dict[str, Any]:
    """One job. Raises RuntimeError with the end of its log if it failed."""
    kept = workspace / f"{message.name.replace(' + ', '-').replace(' ', '_')}-{seed}.json"
    wanted = {**settings, "seed": seed, "quantize": message.codec}
    wanted |= {option[2:].replace("-", "_"): option in message.options for option in (FEEDBACK, DELTA)}
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        if wanted.items() <= found.items():
            return found
    with tempfile.TemporaryDirectory(prefix="convergence-") as folder:
        command = [sys.executable, str(JOB), "--quantize", message.codec, *message.options, "--workspace", folder]
        command += [text for name, value in {**settings, "seed": seed}.items() for text in (f"--{name}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
        if done.returncode:
            raise RuntimeError(f"{message.name}, seed {seed}: {' '.join(command)}\n{done.stderr}")
        shutil.copy(Path(folder) / "results.json", kept)
    print(f"{message.name}, seed {seed}: done", file=sys.stderr, flush=True)
    return dict(json.loads(kept.read_text()))


def final(runs: Iterable[dict[str, Any]]) -> Final:
    runs = list(runs)
    curves = [[r["initial_loss"], *(row["held_out_loss"] for row in r["rounds_table"])] for r in runs]
    curve = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    tail = 1 - curve[-1] / curve[-1 - min(TAIL, len(curve) - 1)]
    moved = statistics.fmean(r["bytes_per_round"] for r in runs)
    return Final([c[-1] for c in curves], moved, tail, curve)


def table(finals: dict[str, Final]) -> list[str]:
    full = finals[FULL]
    lines = [
        "| messages | bytes a round | final held-out loss | spread | against fp32 | by seed "
        f"| fell in the last {TAIL} rounds |",
        "|---" * 7 + "|",
    ]
    for name, end in finals.items():
        differences = [100 * (loss / other - 1) for loss, other in zip(end.losses, full.losses, strict=True)]
        listed = ", ".join(f"{d:+.2f}" for d in differences)
        against = "" if name == FULL else f"{100 * (end.mean / full.mean - 1):+.2f} %"
        lines.append(
            f"| {name} | {100 * end.bytes_per_round / full.bytes_per_round:.2f} % | {end.mean:.4f} "
            f"| {end.spread:.4f} | {against} | {'' if name == FULL else listed} | {100 * end.tail:.2f} % |"
        )
    return lines


def plot(finals: dict[str, Final], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "convergence", "font.size": 9}
    from matplotlib import pyplot

    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    full = finals[FULL]
    for i, (name, end) in enumerate(finals.items()):
        style = "-" if i < 5 else "--"
        curves.plot(range(len(end.curve)), end.curve, style, color=f"C{i}", label=name, linewidth=1)
        ends.plot(end.losses, [i] * len(end.losses), ".", color=f"C{i}")
        ends.plot(end.mean, i, "|", markersize=14, color=f"C{i}")
    ends.axvspan(full.mean - full.spread, full.mean + full.spread, color="grey", alpha=0.2, label="fp32's spread")
    curves.set(xlabel="round", ylabel="held-out loss, nats per byte, mean of the seeds", yscale="log")
    curves.legend()
    ends.set(xlabel="final held-out loss; a dot a seed", yticks=range(len(finals)))
    ends.set_yticklabels(finals)
    ends.invert_yaxis()
    ends.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"seeds": 3, "rounds": 48, "sites": 3, "steps": 16, "width": 128, "layers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--at-once", type=int, default=2, help="jobs that run side by side")
    parser.add_argument("--workspace", type=Path, default=ROOT / "build" / "convergence")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("rounds", "sites", "steps", "width", "layers")}
    args.workspace.mkdir(parents=True, exist_ok=True)
    cells = [(message, seed) for seed in range(args.seeds) for message in MESSAGES]
    with ThreadPoolExecutor(args.at_once) as pool:
        done = list(pool.map(lambda cell: run(*cell, settings, args.workspace), cells))
    finals = {m.name: final(r for cell, r in zip(cells, done, strict=True) if cell[0] == m) for m in MESSAGES}
    lines = [
        f"{args.sites} sites, {args.seeds} seeds, {args.rounds} rounds of {args.steps} steps; "
        f"{done[0]['model_bytes'] // 4:,} parameters. {versions('nvflare', 'torch', 'numpy')}. `{command_line()}`",
        "",
        *table(finals),
    ]
    print("\n".join(lines))
    (args.docs / "convergence-table.md").write_text("\n".join(lines) + "\n")
    plot(finals, args.docs / "convergence.svg")


if __name__ == "__main__":
    main()
