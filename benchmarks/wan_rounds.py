"""Rounds over a WAN: a model from a server to all sites at once, and one back from each, by FLARE and by ours.

    python benchmarks/wan_rounds.py [--mib 24] [--sites 2] [--rate 100] [--rtt 40] [--loss 0,0.1] [--only grpc,tcp,...]
    python benchmarks/wan_rounds.py --all --json build/wan_rounds.jsonl    # all that docs/wan-rounds.md shows: an hour
    python benchmarks/wan_rounds.py --docs build/wan_rounds.jsonl          # its table and its plot

The server and each site are network namespaces, joined by a wire for each site (`tests/wan/wire.py`), with the rate,
round trip and loss of packets that are asked for; a queue of 100 ms; packets of 1500 bytes. It takes no rights of root,
but a machine that allows namespaces and TUN devices, and gcc.

    grpc, tcp, http   FLARE's own tensor path, as it comes, over its grpc, tcp and http drivers
    grpc+best         the same with a window of 16 MiB and an allocator that keeps memory: `measuring.BEST_ENVIRONMENT`
    direct            `RdmaTransfer` over tcp, in full precision; FLARE's messages go over its grpc driver
    int8, nf4, nf4e   the same, with tensors marked as `ModelQuantizer` does with ``int8``, ``normfloat4`` and
                      ``normfloat4_e4m3``

``down``: all sites ask at once, and the clock runs until the last one has all tensors. ``up``: all send at once, and
the clock runs until the last one has the server's answer, which it gives when it has all tensors; what came is
compared. A round is both, without what else a round of a job has: no training, no files, no waiting for tasks. Links
are in the clear. MB are all bytes that were put on the wires, headers and lost packets included; CPU is of all
processes. Every row is of fresh networks and processes; ``first`` is their first round, in which links are opened.
Settings in the environment (``NVFLARE_RDMA_RAILS=8``) count, and are named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import state_dict
from measuring import BEST_ENVIRONMENT, Peer, asked, command_line, machine, obey, versions
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.wan.wire import CENTRE, Link, Star, go_apart, is_apart  # noqa: E402


@dataclass(frozen=True)
class Way:
    """How models move: FLARE's driver, whether over links of this package, and encoded by which codec."""

    scheme: str = "grpc"
    direct: bool = False
    codec: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


CONFIGURATIONS = {
    "grpc": Way(),
    "tcp": Way("tcp"),
    "http": Way("http"),
    "grpc+best": Way(environment=BEST_ENVIRONMENT),
    "direct": Way(direct=True),
    "int8": Way(direct=True, codec="int8"),
    "nf4": Way(direct=True, codec="normfloat4"),
    "nf4e": Way(direct=True, codec="normfloat4_e4m3"),
}
USUAL = "grpc,tcp,direct,nf4"


@dataclass(frozen=True)
class Case:
    """A model, the sites that get it and send it back, and their wires."""

    mib: int = 24
    sites: int = 2
    rate: float = 100.0  # Mbit/s
    rtt: float = 40.0  # ms
    loss: float = 0.0  # %
    burst: float = 1.0
    congestion: str = "cubic"
    slow: float = 1.0  # the first site's wire is so many times slower
    rounds: int = 3

    @property
    def wires(self) -> str:
        """What they are like, for people."""
        bursts = f" in bursts of {self.burst:g}" if self.burst > 1 else ""
        slow = f", one site {self.slow:g} times slower" if self.slow != 1 else ""
        return f"{self.rate:g} Mbit/s, {self.rtt:g} ms, {self.loss:g} % loss{bursts}, {self.congestion}{slow}"

    @property
    def title(self) -> str:
        return f"{self.mib} MiB, {self.sites} sites, {self.wires}: medians of {self.rounds}"

    def link(self, number: int) -> Link:
        rate = self.rate / self.slow if number == 0 else self.rate
        return Link(rate=rate, delay=self.rtt / 2, loss=self.loss, burst=self.burst)

    def share(self, found: Mapping[str, float]) -> float:
        """Percent of the rate that a site's wire was used, on average and in the direction of the model; by all bytes
        that were put on it. Of the slowest wire if there is one."""
        return 100 * found["bytes"] * 8 / found["seconds"] / (self.rate / self.slow * 1e6)


#: What the documentation shows.
ALL = (
    (Case(loss=0.1), "grpc,direct,nf4,nf4e"),
    (Case(), "grpc,tcp,http,grpc+best,direct,int8,nf4,nf4e"),
    (Case(loss=1.0), "direct,nf4,nf4e"),
    (Case(loss=0.1, congestion="bbr"), "grpc,direct,nf4"),
    (Case(mib=4), "grpc,direct,int8,nf4"),
    (Case(mib=4, loss=0.1), "grpc,direct,int8,nf4"),
    (Case(mib=96), "grpc,direct,nf4"),
    (Case(mib=96, loss=0.1, rounds=1), "grpc,direct,nf4"),
    (Case(mib=96, loss=1.0), "direct,nf4"),
    (Case(mib=96, rate=1000, rtt=20), "grpc,direct,nf4"),
    (Case(mib=96, rate=1000, rtt=20, loss=0.1), "grpc,direct,nf4"),
    (Case(rate=30, rtt=60, loss=0.1, rounds=1), "grpc,direct,nf4"),
    (Case(sites=4, loss=0.1, rounds=1), "grpc,direct,nf4"),
    (Case(slow=10, rounds=1), "grpc,direct,nf4"),
)
SERVER, PORT = "server", 8002
console = Console(width=150)


class Side(state_dict.Side):
    """As in `state_dict`, with what came from each site."""

    def _take(self, request: Any) -> Any:
        from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey

        # Sites send at once, each in a thread of its own: an item of a dict is set at once, too.
        self._got[request.get_header(MessageHeaderKey.ORIGIN)] = request.payload["model"]
        return self._reply({})

    def check(self) -> dict[str, Any]:
        got, self._got = self._got, {}
        names = self._model.keys()
        equal = all(
            model.keys() == names and all(self._equal(model[name], self._model[name]) for name in names)
            for model in got.values()
        )
        return {"sites": len(got), "equal": equal}

    def serve(self) -> None:
        obey({name: getattr(self, name) for name in ("lap", "used", "down", "up", "check")})
        self._cell.stop()


def peers_on(star: Star, configuration: str, mib: int) -> list[Peer]:
    way = CONFIGURATIONS[configuration]
    arguments = [f"{way.scheme}://{CENTRE}:{PORT}", str(mib), str(int(way.direct)), way.codec]
    chosen = dict(way.environment) | ({"NVFLARE_RDMA_FABRICS": "tcp"} if way.direct else {})
    return [Peer(["--peer", name, *arguments], chosen, __file__, star.on(name)) for name in (SERVER, *star.wires)]


def one_round(star: Star, peers: list[Peer]) -> dict[str, float]:
    server, sites = peers[0], peers[1:]
    for peer in peers:
        peer.ask("lap")
    before = [wire.count() for wire in star.wires.values()]
    found: dict[str, float] = {}
    for way in ("down", "up"):
        start = time.perf_counter()
        for site in sites:
            site.tell(way)
        for site in sites:
            site.answer()
        found[way] = time.perf_counter() - start
    after = [wire.count() for wire in star.wires.values()]
    used = [peer.ask("used")["cpu"] for peer in peers]
    if server.ask("check") != {"sites": len(sites), "equal": True}:
        raise SystemExit("what came back differs from what was sent")
    sent = sum((b - a).sent for then, now in zip(before, after, strict=True) for a, b in zip(then, now, strict=True))
    return found | {"seconds": found["down"] + found["up"], "bytes": sent / len(sites), "cpu": sum(used)}


def measure(configuration: str, case: Case) -> list[dict[str, float]]:
    """Each round; fewer than asked for if one was not done in time."""
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        star = Star(Path(folder), SERVER, case.congestion)
        peers: list[Peer] = []
        try:
            for number in range(case.sites):
                star.join(f"site-{number + 1}", case.link(number))
            peers = peers_on(star, configuration, case.mib)
            for peer in peers:
                peer.answer()
            for _ in range(case.rounds + 1):
                rounds.append(one_round(star, peers))
        except SystemExit as error:
            console.print(f"{configuration}, {case.title}: {error}", style="dim", highlight=False)
        finally:
            for peer in peers:
                peer.close()
            star.close()
    return rounds


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of all rounds but the first one; empty if there is no other."""
    return {key: statistics.median(one[key] for one in rounds[1:]) for key in rounds[0]} if len(rounds) > 1 else {}


def show(case: Case, runs: dict[str, list[dict[str, float]]]) -> None:
    table = Table(title=case.title, title_justify="left", min_width=len(case.title) + 2)
    for heading in ("", "s a round", "down", "up", "x grpc", "% of link", "MB a site", "CPU s", "first s"):
        table.add_column(heading, justify="right" if heading else "left")
    usual = medians(runs.get("grpc", []))
    for name, rounds in runs.items():
        if not (m := medians(rounds)):
            table.add_row(name, f"not done in {state_dict.TIMEOUT:g} s")
            continue
        table.add_row(
            name,
            *(f"{m[key]:.2f}" for key in ("seconds", "down", "up")),
            f"{usual['seconds'] / m['seconds']:.2f}" if usual else "-",
            f"{case.share(m):.0f}",
            f"{m['bytes'] / 1e6:.1f}",
            f"{m['cpu']:.2f}",
            f"{rounds[0]['seconds']:.2f}",
        )
    console.print(table)


def run(case: Case, names: list[str], results: Path | None) -> None:
    runs = {}
    for name in names:
        runs[name] = measure(name, case)
        if results is not None:
            with open(results, "a") as file:
                file.write(json.dumps({"configuration": name, "case": asdict(case), "rounds": runs[name]}) + "\n")
    show(case, runs)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=24, help="of the model (default: %(default)s)")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rate", type=numbers, default=[100.0], metavar="MBIT,...", help="of each site's wire")
    parser.add_argument("--rtt", type=numbers, default=[40.0], metavar="MS,...")
    parser.add_argument("--loss", type=numbers, default=[0.0, 0.1], metavar="PERCENT,...")
    parser.add_argument("--burst", type=float, default=1.0, metavar="PACKETS", help="lost in a row, on average")
    parser.add_argument("--congestion", default="cubic", help="of all connections (default: %(default)s)")
    parser.add_argument("--slow", type=float, default=1.0, metavar="TIMES", help="so much slower is the first site")
    parser.add_argument("--only", default=USUAL, help=f"of {','.join(CONFIGURATIONS)} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="after the first one (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each row, with every round")
    parser.add_argument("--all", action="store_true", help="measure all that the documentation shows")
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", help="make table and plot of what --all --json has written"
    )
    parser.add_argument("--peer", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        role, url, mib, direct, codec = args.peer
        Side(role, url, int(mib), direct == "1", codec).serve()
        return
    if args.docs:
        import wan_rounds_docs

        wan_rounds_docs.write(args.docs)
        return
    names = asked(parser, args.only, CONFIGURATIONS)
    if not is_apart():
        go_apart(sys.executable, *sys.argv)
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "torch", "grpcio"), highlight=False)
    settings = {name: value for name, value in os.environ.items() if name.startswith("NVFLARE_")}
    if settings:
        console.print(" ".join(f"{name}={value}" for name, value in settings.items()), highlight=False)
    if args.all:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"machine": machine(), "versions": versions("nvflare", "torch")}) + "\n")
        for case, text in ALL:
            run(case, text.split(","), args.json)
        return
    for rate, rtt, loss in itertools.product(args.rate, args.rtt, args.loss):
        case = Case(args.mib, args.sites, rate, rtt, loss, args.burst, args.congestion, args.slow, args.rounds)
        run(case, names, args.json)


if __name__ == "__main__":
    main()
