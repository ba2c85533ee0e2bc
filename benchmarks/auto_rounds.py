"""The type that `auto` chooses for sites whose lines differ: rounds of FLARE's FedAvg in a provisioned federation.

    python benchmarks/auto_rounds.py [--seconds 10] [--rounds 5] [--only exact,nf4,auto] [--markdown docs/auto-table.md]

The server and three sites are network namespaces, joined by wires of 10, 100 and 1000 Mbit/s (`tests/wan/wire.py`),
40 ms of round trip, no loss, with mutual TLS. The model is one numpy array of 24 MiB, normally distributed; a site adds
a little noise to it.

    exact    `add_transfer`
    nf4      the same and `add_quantization` with ``normfloat4``
    auto     the same with ``auto`` and ``round_seconds``, or ``round_bytes``

All figures are those of the senders' records of transfers (docs/records.md): the codec, bytes on the way, seconds from
the receiver's request until all has arrived, and the relative error (of a sample).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import asked, command_line, machine, versions
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.wan.federation import SERVER, Federation  # noqa: E402
from tests.wan.wire import Link, Star, go_apart, is_apart  # noqa: E402

CONFIGURATIONS = ("exact", "nf4", "auto")
#: Mbit/s of each site's wire.
SITES = {"site-1": 10.0, "site-2": 100.0, "site-3": 1000.0}
RTT = 40.0  # ms
SHAPE = 3072, 2048  # 24 MiB of float32
NAME = "auto_rounds"
SECONDS = 1200.0
_CHOSEN = "Messages of task"
console = Console(width=150)


@dataclass(frozen=True)
class Way:
    """A model's way to one site, or from it, in one round."""

    codec: str
    mb: float
    seconds: float
    error: float

    @property
    def cells(self) -> list[str]:
        error = f"{self.error:.2g}" if self.error else "0"
        return [self.codec, f"{self.mb:.1f}", f"{self.seconds:.2f}", error]


@dataclass(frozen=True)
class Round:
    """One round of one site."""

    site: str
    number: int
    down: Way
    up: Way

    @property
    def seconds(self) -> float:
        return self.down.seconds + self.up.seconds


def write_job(configuration: str, args: argparse.Namespace, folder: str) -> None:
    """Write the job to ``folder``/NAME."""
    import numpy as np
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

    from nvflare_rdma.recipe import add_quantization, add_transfer

    model = np.random.default_rng(0).normal(0.0, 0.02, SHAPE).astype(np.float32)
    np.save(f"{folder}/model.npy", model)
    recipe = NumpyFedAvgRecipe(
        name=NAME,
        initial_ckpt=f"{folder}/model.npy",
        min_clients=len(SITES),
        num_rounds=args.rounds,
        train_script=str(Path(__file__).with_name("auto_rounds_client.py")),
    )
    add_transfer(recipe)
    if configuration == "nf4":
        add_quantization(recipe, "normfloat4")
    if configuration == "auto":
        limits = {"round_seconds": args.seconds, "round_bytes": args.bytes, "max_relative_error": args.error}
        add_quantization(recipe, "auto", **{name: value for name, value in limits.items() if value})
    recipe.export(job_dir=folder)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """What a process has sent."""
    for line in path.read_text().splitlines():
        found = json.loads(line)
        if found["direction"] == "sent" and found["round"] is not None:
            if (found["outcome"], found["path"]) != ("done", "direct"):
                raise SystemExit(f"a transfer went otherwise than it should: {found}")
            yield found


def way(record: dict[str, Any]) -> Way:
    codec = record["codecs"].partition(" ")[2] or "exact"
    return Way(codec, record["wire_bytes"] / 1e6, record["seconds"], record["relative_error"] or 0.0)


def rounds_of(at_server: Path, at_sites: dict[str, Path]) -> list[Round]:
    """Each round of each site, by the records of the server and of the sites."""
    down = {(found["peer"].partition(".")[0], found["round"]): way(found) for found in records(at_server)}
    up = {(site, found["round"]): way(found) for site, path in at_sites.items() for found in records(path)}
    return [Round(site, number, down[site, number], up[site, number]) for site, number in sorted(up)]


def measure(configuration: str, args: argparse.Namespace) -> tuple[list[Round], list[str]]:
    """The rounds, and the lines of the log that say why."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        given = [*sys.argv[1:], "--write-job", configuration, folder]
        subprocess.run([sys.executable, __file__, *given], check=True, timeout=300)
        star = Star(home / "star", SERVER)
        try:
            for site, rate in SITES.items():
                star.join(site, Link(rate=rate, delay=RTT / 2))
            federation = Federation(star, home / "federation", list(SITES), "grpc")
            federation.wait_for_sites()
            job = federation.run(home / NAME, SECONDS)
            sites = {site: federation.run_folder(site, job) for site in SITES}
            if job.status != "FINISHED:COMPLETED":
                raise SystemExit(f"{configuration}: {job.status}\n{federation.log('site-1', job)[-3000:]}")
            (at_server,) = job.results.rglob("transfers.jsonl")
            logs = {SERVER: at_server.parents[1] / "log.txt"}
            logs |= {site: each / "log.txt" for site, each in sites.items()}
            why = [
                f"{name}: {line[line.index(_CHOSEN) :]}"
                for name, log in logs.items()
                for line in log.read_text().splitlines()
                if _CHOSEN in line
            ]
            of_sites = {site: each / "nvflare_rdma" / "transfers.jsonl" for site, each in sites.items()}
            return rounds_of(at_server, of_sites), why
        finally:
            star.close()


_NUMBERS = ("mb", "seconds", "error")
HEADINGS = ("site", "Mbit/s", "round", "down", "MB", "s", "error", "up", "MB", "s", "error", "both, s")


def rows(rounds: list[Round]) -> list[list[str]]:
    return [
        [
            one.site,
            f"{SITES[one.site]:g}",
            str(one.number),
            *one.down.cells,
            *one.up.cells,
            f"{one.seconds:.2f}",
        ]
        for one in rounds
    ]


def show(title: str, rounds: list[Round]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("site", "down", "up") else "right")
    for row in rows(rounds):
        table.add_row(*row)
    console.print(table)


def brief(rounds: list[Round]) -> list[list[str]]:
    """A row for each site: medians of all rounds but the first."""
    found = []
    for site, rate in SITES.items():
        later = [one for one in rounds if one.site == site and (one.number or len(rounds) == len(SITES))]
        ways = [[one.down for one in later], [one.up for one in later]]
        cells = [
            cell
            for way in ways
            for cell in Way(way[0].codec, *(statistics.median(getattr(w, key) for w in way) for key in _NUMBERS)).cells
        ]
        both = statistics.median(one.seconds for one in later)
        found.append([site, f"{rate:g}", "medians", *cells, f"{both:.2f}"])
    return found


def markdown(title: str, found: list[list[str]]) -> list[str]:
    table = [list(HEADINGS), ["---"] * len(HEADINGS), *found]
    return [f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in table), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="round_seconds of auto; 0 for none")
    parser.add_argument("--bytes", type=int, default=0, help="round_bytes of auto; 0 for none")
    parser.add_argument("--error", type=float, default=0.0, help="max_relative_error of auto; 0 for none")
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("--write-job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = asked(parser, args.only, CONFIGURATIONS)
    if args.write_job:
        write_job(args.write_job[0], args, args.write_job[1])
        return
    if not is_apart():
        go_apart(sys.executable, *sys.argv)
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "numpy", "grpcio"), highlight=False)
    text = [f"    $ {command_line()}", "", f"{machine()}; {versions('nvflare', 'numpy')}.", ""]
    for name in names:
        rounds, why = measure(name, args)
        limits = (f"round_seconds={args.seconds:g}", f"round_bytes={args.bytes}", f"max_relative_error={args.error:g}")
        given = [limit for limit in limits if not limit.endswith("=0")] if name == "auto" else []
        title = ", ".join([name, *given])
        show(title, rounds)
        text += markdown(title, rows(rounds) if name == "auto" else brief(rounds))
        for line in why:
            console.print(line, highlight=False, style="dim")
        if why:
            wrapped = [part for line in why for part in textwrap.wrap(line, 118, subsequent_indent="    ")]
            text += ["```text", *wrapped, "```", ""]
    if args.markdown:
        args.markdown.write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
