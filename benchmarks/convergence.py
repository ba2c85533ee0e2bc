"""How far training comes when models travel in few bits: jobs/stdlib_lm with each kind of message, several seeds each.

    python benchmarks/convergence.py [TABLE] [--seeds 3] [--rounds 48] [--at-once 2] [--kinds int2 ...]

Every cell is a job of its own in FLARE's simulator, server and sites each a process, of which `results.json` is kept in
`--workspace`: what is there already, with the same settings, is not run again. All kinds with the first seed come
first, and the table tells of how many seeds each kind has. When this is ended, the jobs that it has started end, too.
`--kinds` runs some kinds only, or none if no name follows; the table has all that is kept. Writes table and figure to
docs, and prints the former.

`rounding` and `differences` train from scratch. `tuning` and `adapters` go on from a model that was trained in full
precision, which is made first: all weights at a lower rate, or LoRA adapters alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convergence_figure import draw
from measuring import versions

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "stdlib_lm" / "job.py"
FULL = "fp32"
#: Rounds at the end over which the loss is to have become flat.
TAIL = 5
#: Of what makes the figures: a run that others have made is made again.
VERSIONS = versions("nvflare-rdma", "nvflare", "torch", "numpy")
DEADLINE = 1800.0


@dataclass(frozen=True)
class Message:
    """A way for models to travel: its name in the table, and the job's options."""

    name: str
    codec: str
    options: tuple[str, ...] = ()


FEEDBACK, DELTA = "--error-feedback", "--delta"
_BOTH = (FEEDBACK, DELTA)
_FP32 = Message(FULL, "none")
_DIFFERENCES = (
    _FP32,
    Message("topk2_128", "topk2_128", _BOTH),
    Message("exact_delta", "exact_delta", (DELTA,)),
    Message("topk2", "topk2", _BOTH),
    Message("normfloat4_e4m3", "normfloat4_e4m3", _BOTH),
    Message("int2", "int2", _BOTH),
    Message("normfloat4", "normfloat4", _BOTH),
)


@dataclass(frozen=True)
class Table:
    """Messages that are compared, and what their jobs have in common: options, with numbers, and whether they go on
    from a trained model."""

    messages: tuple[Message, ...]
    options: dict[str, float] = field(default_factory=dict)
    goes_on: bool = False


#: Of all tables, unless they say something else.
OPTIONS = {"rounds": 48, "sites": 3, "steps": 16, "width": 128, "layers": 2}
#: Of the job that trains what others go on from.
FIRST = {"rounds": 48, "sites": 3, "steps": 16}
#: By table: models that are rounded, with and without what makes up for that; and differences alone.
TABLES = {
    "rounding": Table(
        (
            _FP32,
            Message("fp16", "float16"),
            Message("int8", "int8"),
            Message("blockwise8", "blockwise8"),
            Message("fp4", "float4"),
            Message("nf4", "normfloat4"),
            Message("nf4 + error feedback", "normfloat4", (FEEDBACK,)),
            Message("nf4 + error feedback + delta", "normfloat4", _BOTH),
            Message("2-bit + error feedback", "int2", (FEEDBACK,)),
            Message("2-bit + error feedback + delta", "int2", _BOTH),
        )
    ),
    "differences": Table(_DIFFERENCES),
    "tuning": Table(_DIFFERENCES, {"rounds": 24, "steps": 8, "rate": 3e-4}, goes_on=True),
    "adapters": Table(_DIFFERENCES, {"rounds": 24, "steps": 8, "rank": 16}, goes_on=True),
}


@dataclass(frozen=True)
class Final:
    """The end of one message's runs, in nats per byte, by seed."""

    losses: dict[int, float]
    #: before the first round
    first: dict[int, float]
    #: of the final weights
    digests: dict[int, str]
    bytes_per_round: float
    #: without the first round, in which the sites hold nothing yet that a difference could be taken from
    bytes_later: float
    #: by how much of itself the loss fell in the last `TAIL` rounds
    tail: float
    #: (loss of the untrained model, after round 1, ...), mean over the seeds
    curve: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation of a seed; None for a single one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


class Jobs:
    """Runs jobs, and ends those that run when it is told to."""

    def __init__(self, settings: dict[str, float], workspace: Path) -> None:
        self._settings = settings
        self._workspace = workspace
        self._workspace.mkdir(parents=True, exist_ok=True)
        self._start: Path | None = None
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def kept(self, message: Message, seed: int) -> dict[str, Any] | None:
        """What a run with these settings has left."""
        path = self._path(message, seed)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        wanted = {**self._settings, "made_with": VERSIONS, "seed": seed, "quantize": message.codec, "in_order": True}
        wanted |= {option[2:].replace("-", "_"): option in message.options for option in _BOTH}
        if self._start is not None:
            wanted["start"] = str(self._start)
        return found if wanted.items() <= found.items() else None

    def run(self, message: Message, seed: int) -> None:
        """One job, unless its results are there. Raises RuntimeError with the end of its log if it failed."""
        if self.kept(message, seed) is not None:
            return
        with tempfile.TemporaryDirectory(prefix="convergence-") as folder:
            start = ["--start", str(self._start)] if self._start is not None else []
            options = ["--quantize", message.codec, *message.options, *start]
            if not self._execute(options, {**self._settings, "seed": seed}, folder):
                return
            results = json.loads((Path(folder) / "results.json").read_text())
            self._path(message, seed).write_text(json.dumps({**results, "made_with": VERSIONS}))
        seconds = (self.kept(message, seed) or {}).get("wall_seconds")
        print(f"{message.name}, seed {seed}: done in {seconds} s", file=sys.stderr, flush=True)

    def go_on(self, folder_of_start: Path, first: dict[str, float], train: bool) -> None:
        """Have the jobs go on from a model that a job with these settings trains in full precision, unless that folder
        has it, or none is to `train`."""
        self._start = path = folder_of_start / "start.pt"
        made_with, kept = {**first, "made_with": VERSIONS}, folder_of_start / "start.json"
        if not train or (path.exists() and kept.exists() and json.loads(kept.read_text()) == made_with):
            return
        with tempfile.TemporaryDirectory(prefix="convergence-") as folder:
            if self._execute(["--quantize", "none"], first, folder):
                (model,) = Path(folder).rglob("FL_global_model.pt")
                shutil.copy(model, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)  # another table's jobs may be reading it
                kept.write_text(json.dumps(made_with))

    def _execute(self, options: Sequence[str], numbers: dict[str, float], folder: str) -> bool:
        """Whether the job ran, in `folder`: none does that is to be ended."""
        command = [sys.executable, str(JOB), *options, "--in-order"]
        command += [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        command += ["--workspace", folder]
        with self._lock:
            if self._ended:
                return False
            job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            self._running.add(job)
        try:
            _, said = job.communicate(timeout=DEADLINE)
        finally:
            job.kill()  # the simulator and the sites end with the job's process
            job.wait()
            with self._lock:
                self._running.discard(job)
        if job.returncode and not self._ended:
            raise RuntimeError(f"{' '.join(command)}\n{said}")
        return not self._ended

    def end(self) -> None:
        """Start no more jobs, and end those that run."""
        with self._lock:
            self._ended = True
            for job in self._running:
                job.kill()

    def _path(self, message: Message, seed: int) -> Path:
        options = "".join(option[1:] for option in message.options)
        return self._workspace / f"{message.codec}{options}-{seed}.json"


def final(runs: dict[int, dict[str, Any]]) -> Final:
    """What the runs of one message, by seed, came to."""
    curves = [[r["initial_loss"], *(row["held_out_loss"] for row in r["rounds_table"])] for r in runs.values()]
    curve = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    moved = [[row["bytes_down"] + row["bytes_up"] for row in r["rounds_table"]] for r in runs.values()]
    return Final(
        losses={seed: r["final_loss"] for seed, r in runs.items()},
        first={seed: r["initial_loss"] for seed, r in runs.items()},
        digests={seed: r["final_digest"] for seed, r in runs.items()},
        bytes_per_round=statistics.fmean(statistics.fmean(rounds) for rounds in moved),
        bytes_later=statistics.fmean(statistics.fmean(rounds[1:] or rounds) for rounds in moved),
        tail=1 - curve[-1] / curve[-1 - min(TAIL, len(curve) - 1)],
        curve=curve,
    )


def table(finals: dict[str, Final], goes_on: bool) -> list[str]:
    """A row a message, as Markdown; for runs that go on from a trained model with how much of what full precision
    gains they gain, too."""
    full = finals[FULL]
    columns = (
        *("messages", "seeds", "MB a round", "times fewer", "after the first round", "final held-out loss"),
        *("spread", "against fp32", "by seed", f"fell in the last {TAIL} rounds", "final weights"),
        *(("of fp32's gain",) if goes_on else ()),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, end in finals.items():
        both = [seed for seed in end.losses if seed in full.losses]
        differences = [100 * (end.losses[seed] / full.losses[seed] - 1) for seed in both]
        equal = [end.digests[seed] == full.digests[seed] for seed in both]
        same = "fp32's, every bit" if equal and all(equal) else "its own" if not any(equal) else "fp32's in some"
        cells = [
            name,
            str(len(end.losses)),
            f"{end.bytes_per_round / 1e6:.3f}",
            f"{full.bytes_per_round / end.bytes_per_round:.1f}",
            f"{full.bytes_later / end.bytes_later:.1f}",
            f"{end.mean:.4f}",
            "-" if end.spread is None else f"{end.spread:.4f}",
            *(("", "") if name == FULL else (_percent(differences), ", ".join(f"{d:+.2f}" for d in differences))),
            f"{100 * end.tail:.2f} %",
            "" if name == FULL else same,
        ]
        if goes_on:
            gains = [(end.first[seed] - end.losses[seed]) / (full.first[seed] - full.losses[seed]) for seed in both]
            cells.append(f"{100 * statistics.fmean(gains):.0f} %" if gains else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(differences: Sequence[float]) -> str:
    return f"{statistics.fmean(differences):+.2f} %" if differences else "-"


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
        ends.plot(list(end.losses.values()), [i] * len(end.losses), ".", color=f"C{i}")
        ends.plot(end.mean, i, "|", markersize=14, color=f"C{i}")
    spread = full.spread or 0.0
    ends.axvspan(full.mean - spread, full.mean + spread, color="grey", alpha=0.2, label="fp32's spread")
    curves.set(xlabel="round", ylabel="held-out loss, nats per byte, mean of the seeds", yscale="log")
    curves.legend()
    ends.set(xlabel="final held-out loss; a dot a seed", yticks=range(len(finals)))
    ends.set_yticklabels(finals)
    ends.invert_yaxis()
    ends.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, default="differences")
    parser.add_argument("--seeds", type=int, default=3)
    for name in OPTIONS:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--at-once", type=int, default=2, help="jobs that run side by side")
    parser.add_argument("--kinds", nargs="*", help="names of the table's messages to run; without a name, none")
    parser.add_argument("--workspace", type=Path, default=ROOT / "build" / "convergence")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    chosen = TABLES[args.table]
    messages = chosen.messages
    if unknown := set(args.kinds or ()) - {message.name for message in messages}:
        parser.error(f"{args.table} has no {', '.join(unknown)}, but {', '.join(m.name for m in messages)}")
    usual: dict[str, float] = OPTIONS | chosen.options
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    settings = usual | given
    jobs = Jobs(settings, args.workspace / args.table if chosen.goes_on else args.workspace)
    wanted = [m for m in messages if args.kinds is None or m.name in args.kinds]
    cells = [(message, seed) for seed in range(args.seeds) for message in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    failed = False
    with ThreadPoolExecutor(args.at_once) as pool:
        try:
            if chosen.goes_on:
                jobs.go_on(args.workspace, {**OPTIONS, **given, **FIRST}, bool(cells))
            for cell in [pool.submit(jobs.run, *cell) for cell in cells]:
                if error := cell.exception():
                    failed = True
                    print(error, file=sys.stderr, flush=True)
        finally:
            jobs.end()
    runs = {m.name: {seed: jobs.kept(m, seed) for seed in range(args.seeds)} for m in messages}
    found = {name: {seed: run for seed, run in each.items() if run} for name, each in runs.items()}
    if not found[FULL]:
        sys.exit("there is no table without a run of fp32")
    finals = {name: final(each) for name, each in found.items() if each}
    seeds = {} if args.seeds == parser.get_default("seeds") else {"seeds": args.seeds}
    changed = [f" --{name} {value}" for name, value in {**seeds, **given}.items() if value != usual.get(name)]
    lines = [
        f"{settings['sites']} sites, {settings['rounds']} rounds of {settings['steps']} steps; "
        f"{next(iter(found[FULL].values()))['model_bytes'] // 4:,} parameters. "
        f"{VERSIONS}. `python benchmarks/convergence.py {args.table}{''.join(changed)}`",
        "",
        *table(finals, chosen.goes_on),
    ]
    print("\n".join(lines))
    (args.docs / f"convergence-{args.table}.md").write_text("\n".join(lines) + "\n")
    plot(finals, args.docs / f"convergence-{args.table}.svg")
    tables = {name: args.docs / f"convergence-{name}.md" for name in TABLES}
    draw({name: path for name, path in tables.items() if path.exists()}, args.docs / "convergence-quality.svg")
    sys.exit(failed)


if __name__ == "__main__":
    main()
