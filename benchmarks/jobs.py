"""Whole FLARE jobs, in the simulator and in a POC, as FLARE moves tensors over grpc and as `RdmaTransfer` does.

    python benchmarks/jobs.py [--jobs stdlib_lm,gpt2_small] [--in simulator,poc] [--rounds 2] [--steps 0]
                              [--quantize normfloat4] [--sites 2] [--at-once 2] [--task-interval 0.2]

A server and some sites, each with its processes: one a site in the simulator; in the POC a parent and a job process
each, with mutual TLS. FLARE's messages go over grpc in every configuration. gpt2_large is the job gpt2_small with the
sizes of GPT-2 Large. Where the simulator has fewer sites at once than there are, they take turns in its processes.

    empty     FLARE alone, and a model of a few kB: what the processes need without a model
    flare     FLARE alone, tensors in full precision
    ours      RdmaTransfer and quantization, over the fabric that is chosen by itself: shared memory, on one host;
              gpt2_small's checkpoints are saved in the background. A POC's kits are those of `nvflare-rdma enable`
    ours-tcp  the same with NVFLARE_RDMA_FABRICS=tcp, so that the bytes can be counted

``wall`` of the simulator is from its start to its end, of the POC from the job's submission to its end, by the admin's
session. A round is from the server's log line that it has started to the next round's, or to that of the workflow's
end: training is in it (one step of gpt2_small, 16 of stdlib_lm, or --steps), and in the first one the sites' start.
Bytes are those of the loopback device's counter, headers included, over the wall time; in a network namespace of the
benchmark's own where it may have one, else everybody's on this machine. Peak is VmHWM, looked at every 50 ms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import poc
from measuring import MIB, command_line, machine, versions
from process_tree import ProcessTree, Used, loopback_bytes, own_loopback, wait_for
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 400.0
#: Of float32 parameters.
JOBS = {"stdlib_lm": 12_713_984, "gpt2_small": 124_439_808, "gpt2_large": 774_030_080}
#: Jobs that are another's, with other sizes.
OF_OTHER_SIZE = {"gpt2_large": ("gpt2_small", ["--width", "1280", "--layers", "36"])}
EMPTY = {
    "stdlib_lm": ["--width", "64", "--layers", "1"],
    "gpt2_small": ["--width", "64", "--layers", "1", "--vocab", "256"],
}
WHERE = ("simulator", "poc")
CONFIGURATIONS = ("empty", "flare", "ours", "ours-tcp")
console = Console(width=150)


@dataclass
class Run:
    """What one run of a job came to."""

    wall: float = 0.0
    rounds: list[float] = field(default_factory=list)
    loopback: int = 0
    used: dict[str, Used] = field(default_factory=dict)


def export(job: str, configuration: str, arguments: argparse.Namespace, folder: Path) -> Path:
    """Write the FLARE job."""
    job, sizes = OF_OTHER_SIZE.get(job, (job, []))
    options = ["--rounds", str(arguments.rounds), "--sites", str(arguments.sites), "--driver", "grpc"]
    options += [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    options += (
        ["--direct", "--quantize", arguments.quantize] if configuration.startswith("ours") else ["--quantize", "none"]
    )
    options += EMPTY[job] if configuration == "empty" else sizes
    command = [sys.executable, str(ROOT / "jobs" / job / "job.py"), *options, "--workspace", str(folder / "none")]
    done = subprocess.run(
        [*command, "--export", "--export-dir", str(folder)], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(f"{job} could not be exported: {done.stderr[-2000:]}")
    if arguments.task_interval is not None:
        (config,) = (folder / job).glob("app*/config/config_fed_server.json")
        settings = json.loads(config.read_text()) | {"server": {"task_request_interval": arguments.task_interval}}
        config.write_text(json.dumps(settings))
    return folder / job


def environment(configuration: str) -> dict[str, str]:
    """What all processes of a run get."""
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("NVFLARE_")}
    chosen["PYTHONPATH"] = str(ROOT)
    if configuration == "ours-tcp":
        chosen["NVFLARE_RDMA_FABRICS"] = "tcp"
    return chosen


def in_simulator(job: Path, variables: dict[str, str], folder: Path, sites: int, at_once: int) -> Run:
    command = [sys.executable, "-m", "nvflare_rdma.simulator", str(job), "-w", str(folder / "workspace")]
    command += ["-n", str(sites), "-t", str(at_once), "--scheme", "grpc"]
    before = loopback_bytes()
    with open(folder / "console.log", "wb") as out:
        server = subprocess.Popen(
            command,
            env=variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    with ProcessTree([server]) as tree:
        wall = wait_for(server, DEADLINE, f"simulator in {folder}")
        moved = loopback_bytes() - before
    return Run(wall, read_rounds((folder / "workspace" / "server" / "log.json").read_text()), moved, tree.used)


def in_poc(job: Path, variables: dict[str, str], folder: Path, sites: int, enabled: bool) -> Run:
    kits = poc.prepare(folder, sites, "grpc", variables)
    if enabled:
        targets = [str(kit) for kit in kits.iterdir() if (kit / "local").is_dir() and kit.name != poc.ADMIN]
        command = [sys.executable, "-m", "nvflare_rdma.cli", "enable", *targets]
        subprocess.run(command, env=variables, cwd=folder, check=True, capture_output=True, timeout=60)
    with ProcessTree(poc.start(kits, variables)) as tree:
        arguments = [str(Path(poc.__file__)), str(kits / poc.ADMIN), str(job), str(DEADLINE)]
        before, start = loopback_bytes(), time.monotonic()
        with open(folder / "console.log", "wb") as out:
            admin = subprocess.Popen([sys.executable, *arguments], env=variables, cwd=folder, stdout=out, stderr=out)
        with ProcessTree([admin]):
            wait_for(admin, DEADLINE + 60, f"job in {folder}")
        moved, wall = loopback_bytes() - before, time.monotonic() - start
        rounds = read_rounds(saved_log(folder / "poc" / "jobs-storage"))
    return Run(wall, rounds, moved, tree.used)


def saved_log(storage: Path) -> str:
    """The server's log of the only job in a POC's job storage, where FLARE has put all of the job's files."""
    with zipfile.ZipFile(next(storage.glob("*/workspace"))) as archive:
        return archive.read("log.json").decode()


def read_rounds(log: str) -> list[float]:
    """Seconds of each round, from the server's log.json."""
    lines = [text for text in log.splitlines() if '"name": "FedAvg"' in text]
    lines = [text for text in lines if " started." in text or "Finished FedAvg" in text]
    times = [datetime.strptime(json.loads(text)["asctime"], "%Y-%m-%d %H:%M:%S,%f") for text in lines]
    return [(after - before).total_seconds() for before, after in itertools.pairwise(times)]


def show(job: str, where: str, rounds: int, sites: int, runs: dict[str, Run], alone: bool) -> None:
    """One table: what the job took, then each process."""
    model = JOBS[job] * 4
    title = (
        f"{job} ({model / MIB:.0f} MiB), {where}: {rounds} rounds x {sites} sites, "
        f"{2 * rounds * sites * model / 1e9:.2f} GB of model to move"
    )
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    table.add_row("wall s", *(f"{run.wall:.1f}" for run in runs.values()))
    for number in range(rounds):
        cells = (f"{run.rounds[number]:.1f}" if number < len(run.rounds) else "-" for run in runs.values())
        table.add_row(f"round {number + 1} s", *cells)
    table.add_row(
        f"loopback MB{'' if alone else ' (of the whole machine)'}",
        *(f"{run.loopback / 1e6:.0f}" for run in runs.values()),
        end_section=True,
    )
    for role in sorted({role for run in runs.values() for role in run.used}):
        found = [run.used.get(role) for run in runs.values()]
        table.add_row(f"{role}: peak MiB", *(f"{u.peak / MIB:.0f}" if u else "-" for u in found))
        if "empty" in runs and (empty := runs["empty"].used.get(role)):
            cells = (f"{(u.peak - empty.peak) / model:.2f}" if u else "-" for u in found)
            table.add_row("  above empty, in models", *cells)
        table.add_row("  CPU s", *(f"{u.cpu:.1f}" if u else "-" for u in found))
    console.print(table)


def chosen(parser: argparse.ArgumentParser, text: str, known: Any) -> list[str]:
    """The names in `text`, all of which must be known."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", default="stdlib_lm,gpt2_small", help="of " + ",".join(JOBS))
    parser.add_argument("--in", dest="where", default=",".join(WHERE), help="of " + ",".join(WHERE))
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--at-once", type=int, help="of the sites, in the simulator; else all")
    parser.add_argument("--quantize", default="normfloat4", help="of ours; none: full precision")
    parser.add_argument("--steps", type=int, help="of training, a round; 0: sites send back what they got")
    parser.add_argument("--task-interval", type=float, help="seconds after which sites ask for a task; else FLARE's 2")
    parser.add_argument("--keep", type=Path, help="a folder for the workspaces and logs, in place of a temporary one")
    args = parser.parse_args()
    jobs, places = chosen(parser, args.jobs, JOBS), chosen(parser, args.where, WHERE)
    configurations = chosen(parser, args.only, CONFIGURATIONS)
    alone = own_loopback()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what has been started is ended
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "torch", "transformers", "grpcio"), highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        for job in jobs:
            for where in places:
                runs = {}
                for configuration in configurations:
                    folder = (args.keep or Path(temporary)).resolve() / f"{job}-{where}-{configuration}"
                    folder.mkdir(parents=True)
                    exported = export(job, configuration, args, folder)
                    variables = environment(configuration)
                    if where == "simulator":
                        run = in_simulator(exported, variables, folder, args.sites, args.at_once or args.sites)
                    else:
                        run = in_poc(exported, variables, folder, args.sites, configuration.startswith("ours"))
                    runs[configuration] = run
                    console.print(f"{folder.name}: {runs[configuration]}", style="dim", highlight=False)
                show(job, where, args.rounds, args.sites, runs, alone)


if __name__ == "__main__":
    main()
