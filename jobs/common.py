"""What the jobs here have in common: options, the parts that they choose, the simulator, and what is said of failures.

Import it before FLARE: importing FLARE takes its own options out of sys.argv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXPORT = "--export" in sys.argv  # FLARE's own option: write the job and stop

sys.path[:0] = [p for p in (str(ROOT),) if p not in sys.path]

from nvflare_rdma.codecs import CODEC_NAMES  # noqa: E402

QUANTIZE = ("none", *CODEC_NAMES)
DRIVERS = ("rdma", "tcp", "grpc")


def natural(text: str) -> int:
    """0, 1, 2 ..., for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def positive(text: str) -> int:
    """1, 2, 3 ..., for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} is no number above 0")
    return value


def multiple_of_64(text: str) -> int:
    """64, 128, 192 ..., for argparse."""
    value = positive(text)
    if value % 64:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 64")
    return value


def basic_parser(description: str, name: str, sites: int, quantize: str) -> argparse.ArgumentParser:
    """A parser with the options of all jobs; the job's own number of sites and codec are the defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quantize", choices=QUANTIZE, default=quantize, help="how weights travel")
    made.add_argument("--sites", type=positive, default=sites)
    made.add_argument("--workspace", type=Path, default=Path(f"{name}_workspace"))
    made.add_argument("--verbose", action="store_true", help="show FLARE's log")
    made.set_defaults(driver="rdma")
    return made


def parser(description: str, name: str, rounds: int, sites: int) -> argparse.ArgumentParser:
    """A parser with the options of the jobs that compare what models travel over and as."""
    made = basic_parser(description, name, sites, "normfloat4")
    made.add_argument("--error-feedback", action="store_true", help="add what a message lost to the next one")
    made.add_argument("--delta", action="store_true", help="send the sites what has changed, not the whole model")
    made.add_argument("--driver", choices=DRIVERS, default="rdma", help="what they travel over")
    made.add_argument("--direct", action="store_true", help="tensors go directly from process to process")
    made.add_argument("--rounds", type=positive, default=rounds)
    return made


def check(made: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """`args`, unless they contradict each other."""
    if args.quantize == "none" and (args.error_feedback or args.delta):
        made.error("--error-feedback and --delta are for messages of few bits: choose one with --quantize")
    return args


def add_parts(recipe: Any, args: argparse.Namespace) -> None:
    """Put what `args` ask for on the recipe, and count what moves."""
    from traffic.recorder import TrafficRecorder

    from nvflare_rdma.recipe import add_quantization, add_transfer

    # FLARE copies the recorder's modules into the job, as it does with a training script.
    recipe._job.to_server(TrafficRecorder(), id="traffic_recorder")
    recipe._job.to_clients(TrafficRecorder(), id="traffic_recorder")
    if args.direct:
        add_transfer(recipe)
    if args.quantize != "none":
        add_quantization(recipe, args.quantize, error_feedback=args.error_feedback, delta=args.delta)


def name_script(recipe: Any) -> None:
    """Have the job find its training script by name, in the copy that FLARE puts into it. FLARE writes the path that a
    recipe was given, and finds a script that has a whole path nowhere but on this machine."""
    recipe._ensure_client_apps_prepared()
    for app in recipe._job._deploy_map.values():
        for executor in (each.executor for each in getattr(app.app_config, "executors", ())):
            if hasattr(executor, "_task_script_path"):  # a swarm has one more executor
                executor._task_script_path = Path(executor._task_script_path).name


def simulator(args: argparse.Namespace) -> Any:
    """FLARE's simulator over ``args.driver`` in ``args.workspace``."""
    from nvflare_rdma.simulator import RdmaSimEnv

    workspace = args.workspace.resolve()
    return RdmaSimEnv(
        num_clients=args.sites,
        workspace_root=str(workspace),
        scheme=args.driver,
        console=None if args.verbose else workspace / "console.log",
    )


def execute(recipe: Any, args: argparse.Namespace, name: str, **defaults: str) -> Path:
    """Run the job `name` in the simulator, and return its folder in the workspace. With FLARE's own option ``--export``
    the job is written instead, and this process ends. ``defaults`` are for variables that aren't set.

    Raises:
        RuntimeError: the job failed.
    """
    env = simulator(args)
    if EXPORT:
        recipe.execute(env)
    workspace = args.workspace.resolve()
    shutil.rmtree(workspace / name, ignore_errors=True)
    workspace.mkdir(parents=True, exist_ok=True)
    (workspace / "console.log").unlink(missing_ok=True)
    with environment(**defaults):
        recipe.execute(env)
    return workspace / name


def counted(args: argparse.Namespace) -> dict[str, str]:
    """What has all bytes go over TCP: all processes are on one host, where they could use shared memory, which no
    counter of the kernel sees."""
    return {"NVFLARE_RDMA_FABRICS": "tcp"} if args.driver == "rdma" or args.direct else {}


@contextlib.contextmanager
def environment(**defaults: str) -> Iterator[None]:
    """What the server's and the sites' processes inherit; ``defaults`` are for variables that aren't set."""
    before = dict(os.environ)
    # A FLARE job finds this package installed; run from a source tree it is found by this path.
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), before.get("PYTHONPATH")) if p)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_and_tell(job: Callable[[], None], args: argparse.Namespace, name: str) -> int:
    """Run `job`, and return the exit status: 1 if it failed, after the end of the log."""
    try:
        job()
    except Exception as e:  # noqa: BLE001  a job has failed in whatever way: say where to look
        print(f"\nThe job failed: {e}\n{last_errors(args.workspace.resolve(), name)}", file=sys.stderr)
        return 1
    return 0


def last_errors(workspace: Path, name: str, count: int = 8) -> str:
    """The log of a failed run of the job `name`, and the last lines in it that tell of an error."""
    logs = [workspace / "console.log", *sorted((workspace / name).rglob("log.txt"))]
    logs = [log for log in logs if log.is_file() and log.stat().st_size]
    found: list[str] = []
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line or "Error:" in line]
        found = [f"{log}:", *(f"  {line}" for line in errors[-count:])]
        if errors:
            break
    return "\n".join(found) or f"no log was written under {workspace}"


def print_report(folder: Path) -> dict[str, Any]:
    """Print what `nvflare-rdma report --text` says of the job in `folder`, and return what it has for programs."""
    from nvflare_rdma.cli.report import report_result

    result = report_result(folder, None, None, text=True, form="txt")
    print(result.text)
    return dict(result.data)


def print_traffic(folder: Path, title: str, rounds: int) -> None:
    """A row a round of what `TrafficRecorder` has written in the job's workspace: bytes and seconds, each way.

    Raises:
        RuntimeError: there are fewer than ``rounds``: the job did not get there.
    """
    from rich.console import Console
    from rich.table import Table
    from traffic.summary import read_lines, summarize

    rows = summarize(read_lines(folder)).rounds
    if len(rows) < rounds:
        raise RuntimeError(f"only {len(rows)} of {rounds} rounds are recorded in {folder}")
    table = Table(title=title)
    for heading in ("round", "server->sites MB", "sites->server MB", "s down", "s up", "s codec"):
        table.add_column(heading, justify="right")
    for row in rows:
        moved = (f"{nbytes / 1e6:.1f}" for nbytes in (row.bytes_down, row.bytes_up))
        seconds = (f"{value:.2f}" for value in (row.seconds_down, row.seconds_up, row.seconds_codec))
        table.add_row(str(row.round + 1), *moved, *seconds)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
