"""Whole jobs over a WAN: rounds of FLARE's FedAvg in a provisioned federation, each participant on a host of its own.

    python benchmarks/wan_jobs.py [--rounds 3] [--rate 100] [--rtt 40] [--loss 0.1] [--only stock,transfer,nf4,...]

The model, the text and the training are those of jobs/stdlib_lm, with one step a round, so that moving models takes
most of its time. Server and sites are network namespaces, joined by wires (`tests/wan/wire.py`), with mutual TLS.

    stock          FLARE as it comes, over its grpc driver
    transfer       with `add_transfer`
    nf4            with `add_quantization` (normfloat4): FLARE's own path
    transfer+nf4   both

A round is from FLARE's ROUND_STARTED to the next one, or to the end of the run: moving models, waiting for tasks,
training, aggregation, saving. ``compute``: the longest that a site worked on its task in that round; what is left
without it is in the next column. MB are all bytes that were put on the wires in the whole job, by site.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import asked, command_line, machine, versions
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "stdlib_lm"
sys.path.append(str(ROOT))

from tests.wan.federation import SERVER, Federation, Job  # noqa: E402
from tests.wan.wire import Link, Star, go_apart, is_apart  # noqa: E402

CONFIGURATIONS = ("stock", "transfer", "nf4", "transfer+nf4")
SITES = ("site-1", "site-2")
WIDTH, LAYERS, STEPS = 512, 4, 1
SECONDS = 1200.0
console = Console(width=150)


def write_job(configuration: str, rounds: int, folder: str) -> None:
    """Write the job to ``folder/wan_jobs``."""
    sys.path[:0] = [str(JOB), str(Path(__file__).parent)]
    from model import ByteGPT
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat, TransferType
    from wan_jobs_clock import Clock

    from nvflare_rdma.recipe import add_quantization, add_transfer

    recipe = FedAvgRecipe(
        name="wan_jobs",
        model=ByteGPT(WIDTH, LAYERS, heads=WIDTH // 64),
        min_clients=len(SITES),
        num_rounds=rounds,
        train_script=str(JOB / "client.py"),
        train_args=f"--sites {len(SITES)} --steps {STEPS} --width {WIDTH} --layers {LAYERS} --seed 0",
        server_expected_format=ExchangeFormat.PYTORCH,
        params_transfer_type=TransferType.DIFF,
        key_metric="",
    )
    recipe._job.to_server(Clock(), id="clock")
    recipe._job.to_clients(Clock(), id="clock")
    if configuration.startswith("transfer"):
        add_transfer(recipe)
    if configuration.endswith("nf4"):
        add_quantization(recipe, "normfloat4")
    recipe.export(job_dir=folder)


def events(log: str) -> list[dict[str, Any]]:
    return [json.loads(found) for found in re.findall(r"CLOCK (\{.*\})", log)]


def rounds_of(server: list[dict[str, Any]], sites: list[list[dict[str, Any]]]) -> list[dict[str, float]]:
    """Seconds of each round, and of the longest task in it."""
    starts = [event["at"] for event in server if event["event"] == "_round_started"]
    ends = [*starts[1:], next(event["at"] for event in server if event["event"] == "_end_run")]
    found = []
    for start, end in zip(starts, ends, strict=True):
        worked = [0.0]
        for site in sites:
            within = [event for event in site if start <= event["at"] <= end and event["task"] == "train"]
            begun = [event["at"] for event in within if event["event"] == "_before_task_execution"]
            done = [event["at"] for event in within if event["event"] == "_after_task_execution"]
            worked += [b - a for a, b in zip(begun, done, strict=False)]
        found.append({"seconds": end - start, "compute": max(worked)})
    return found


def measure(configuration: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        command = [sys.executable, __file__, "--write-job", configuration, folder, "--rounds", str(args.rounds)]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=300)
        star = Star(home / "star", SERVER)
        try:
            for site in SITES:
                star.join(site, Link(rate=args.rate, delay=args.rtt / 2, loss=args.loss))
            paths = os.pathsep.join(map(str, (ROOT, JOB)))
            federation = Federation(star, home / "federation", list(SITES), "grpc", PYTHONPATH=paths)
            federation.wait_for_sites()
            before = [wire.count() for wire in star.wires.values()]
            job = federation.run(home / "wan_jobs", SECONDS)
            if job.status != "FINISHED:COMPLETED":
                raise SystemExit(f"{configuration}: {job.status}\n{federation.log(SITES[0], job)[-3000:]}")
            after = [wire.count() for wire in star.wires.values()]
            sent = sum((b - a).sent for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
            sites = [events(federation.log(site, job)) for site in SITES]
            return {"rounds": rounds_of(events(server_log(job)), sites), "bytes": sent / len(SITES)}
        finally:
            star.close()


def server_log(job: Job) -> str:
    return next(path.read_text() for path in job.results.rglob("log.txt"))


def show(title: str, runs: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    headings = ("", "s, each round", "median", "compute", "without it", "x stock", "x, without", "MB a site")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    medians = {
        name: (
            statistics.median(one["seconds"] for one in run["rounds"]),
            statistics.median(one["compute"] for one in run["rounds"]),
            statistics.median(one["seconds"] - one["compute"] for one in run["rounds"]),
        )
        for name, run in runs.items()
    }
    stock = medians.get("stock")
    for name, run in runs.items():
        seconds, compute, moving = medians[name]
        table.add_row(
            name,
            ", ".join(f"{one['seconds']:.1f}" for one in run["rounds"]),
            *(f"{value:.1f}" for value in (seconds, compute, moving)),
            *((f"{stock[0] / seconds:.2f}", f"{stock[2] / moving:.2f}") if stock else ("-", "-")),
            f"{run['bytes'] / 1e6:.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=100.0, metavar="MBIT", help="of each site's wire")
    parser.add_argument("--rtt", type=float, default=40.0, metavar="MS")
    parser.add_argument("--loss", type=float, default=0.1, metavar="PERCENT")
    parser.add_argument("--only", default="stock,transfer,transfer+nf4", help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--write-job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_job:
        write_job(args.write_job[0], args.rounds, args.write_job[1])
        return
    names = asked(parser, args.only, CONFIGURATIONS)
    if not is_apart():
        go_apart(sys.executable, *sys.argv)
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "torch", "grpcio"), highlight=False)
    runs = {}
    for name in names:
        runs[name] = measure(name, args)
        console.print(f"{name}: {runs[name]}", style="dim", highlight=False)
    wires = f"{args.rate:g} Mbit/s, {args.rtt:g} ms, {args.loss:g} % loss, cubic"
    show(f"stdlib_lm, {len(SITES)} sites, provisioned, {wires}", runs)


if __name__ == "__main__":
    main()
