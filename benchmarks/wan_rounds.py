"""Rounds over a WAN: a model from a server to all sites at once, and one back from each, by FLARE and by ours.

    python benchmarks/wan_rounds.py [--mib 24] [--sites 2] [--rate 100] [--rtt 40] [--loss 0,0.1] [--only grpc,tcp,...]

The server and each site are network namespaces, joined by a wire for each site (`tests/wan/wire.py`), with the rate,
round trip and loss of packets that are asked for; a queue of 100 ms; packets of 1500 bytes. It takes no rights of root,
but a machine that allows namespaces and TUN devices, and gcc.

    grpc, tcp   FLARE's own tensor path, as it comes, over its grpc and tcp drivers
    direct      `RdmaTransfer` over tcp, in full precision; FLARE's messages go over its grpc driver
    nf4         the same, with tensors marked as `ModelQuantizer` does with ``normfloat4``

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
from pathlib import Path
from typing import Any

import state_dict
from measuring import Peer, command_line, machine, obey, versions
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.wan.wire import CENTRE, Link, Star, apart, is_apart, why_not  # noqa: E402

CONFIGURATIONS = ("grpc", "tcp", "direct", "nf4")
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
    direct = configuration not in ("grpc", "tcp")
    scheme = "tcp" if configuration == "tcp" else "grpc"
    arguments = [f"{scheme}://{CENTRE}:{PORT}", str(mib), str(int(direct)), str(int(configuration == "nf4"))]
    chosen = {"NVFLARE_RDMA_FABRICS": "tcp"} if direct else {}
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


def measure(configuration: str, link: Link, args: argparse.Namespace) -> list[dict[str, float]]:
    """Each round; fewer than asked for if one was not done in time."""
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        star = Star(Path(folder), SERVER, args.congestion)
        peers: list[Peer] = []
        try:
            for number in range(args.sites):
                star.join(f"site-{number + 1}", link)
            peers = peers_on(star, configuration, args.mib)
            for peer in peers:
                peer.answer()
            for _ in range(args.rounds + 1):
                rounds.append(one_round(star, peers))
        except SystemExit as error:
            console.print(f"{configuration}, {link}: {error}", style="dim", highlight=False)
        finally:
            for peer in peers:
                peer.close()
            star.close()
    return rounds


def show(title: str, runs: dict[str, list[dict[str, float]]]) -> None:
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    for heading in ("", "s a round", "down", "up", "x grpc", "MB a site", "CPU s", "first s"):
        table.add_column(heading, justify="right" if heading else "left")
    medians = {
        name: {key: statistics.median(one[key] for one in rounds[1:]) for key in rounds[0]}
        for name, rounds in runs.items()
        if len(rounds) > 1
    }
    for name, rounds in runs.items():
        if not (m := medians.get(name)):
            table.add_row(name, f"not done in {state_dict.TIMEOUT:g} s")
            continue
        times = f"{medians['grpc']['seconds'] / m['seconds']:.2f}" if "grpc" in medians else "-"
        table.add_row(
            name,
            *(f"{m[key]:.2f}" for key in ("seconds", "down", "up")),
            times,
            f"{m['bytes'] / 1e6:.1f}",
            f"{m['cpu']:.2f}",
            f"{rounds[0]['seconds']:.2f}",
        )
    console.print(table)


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
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--rounds", type=int, default=3, help="after the first one (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each row, with every round")
    parser.add_argument("--peer", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        role, url, mib, direct, encoded = args.peer
        Side(role, url, int(mib), direct == "1", encoded == "1").serve()
        return
    asked = [name for name in args.only.split(",") if name]
    if unknown := [name for name in asked if name not in CONFIGURATIONS]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    if not is_apart():
        if reason := why_not():
            raise SystemExit(f"no wires here: {reason}")
        command = apart(sys.executable, *sys.argv)
        os.execvp(command[0], command)
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "torch", "grpcio"), highlight=False)
    settings = {name: value for name, value in os.environ.items() if name.startswith("NVFLARE_")}
    if settings:
        console.print(" ".join(f"{name}={value}" for name, value in settings.items()), highlight=False)
    for rate, rtt, loss in itertools.product(args.rate, args.rtt, args.loss):
        link = Link(rate=rate, delay=rtt / 2, loss=loss, burst=args.burst)
        title = (
            f"{args.mib} MiB, {args.sites} sites, {rate:g} Mbit/s, {rtt:g} ms, {loss:g} % loss"
            f"{f' in bursts of {args.burst:g}' if args.burst > 1 else ''}, {args.congestion}: medians of {args.rounds}"
        )
        runs = {}
        for name in asked:
            runs[name] = measure(name, link, args)
            if args.json:
                with open(args.json, "a") as file:
                    row = {"configuration": name, "link": title, "sites": args.sites, "rounds": runs[name]}
                    file.write(json.dumps(row) + "\n")
        show(title, runs)


if __name__ == "__main__":
    main()
