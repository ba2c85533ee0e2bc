"""One model to 1, 2, 4 and 8 receivers at once: FLARE's own tensor path beside ours.

    python benchmarks/receivers.py [--mib 1024] [--rounds 3] [--receivers 1,2,4,8] [--only tcp,direct,direct+nf4]

A server process and one for each receiver, with a FLARE cell each, and the state dict of `state_dict.py`. The clock
runs from when all are told to ask for the model until the last of them has it. ``tcp``: FLARE's own path over its tcp
driver; ``direct``: `RdmaTransfer`, which chooses shared memory here; ``direct-tcp``: held to tcp; ``+nf4``: encoded on
the way.

Every round starts fresh processes for every configuration and number in turn. They get the model twice; times and CPU
are of the second transfer, peak RSS is what the server's VmHWM grew by over both from the idle, connected process.
"""

from __future__ import annotations

import argparse
import statistics
import time

import state_dict
from measuring import MIB, Peer, command_line, free_port, machine, versions
from rich.console import Console
from rich.table import Table

CONFIGURATIONS = ("tcp", "direct", "direct-tcp", "direct+nf4", "direct-tcp+nf4")
console = Console(width=150)


def environment(configuration: str) -> dict[str, str]:
    way = configuration.removesuffix("+nf4").removeprefix("direct").removeprefix("-")
    return {"NVFLARE_RDMA_FABRICS": way} if configuration.startswith("direct") and way else {}


def run(configuration: str, count: int, mib: int) -> dict[str, float]:
    """Seconds, and the server's CPU seconds and bytes of peak RSS, for ``count`` receivers."""
    direct, codec = configuration.startswith("direct"), "normfloat4" if configuration.endswith("+nf4") else ""
    url = f"tcp://127.0.0.1:{free_port()}"
    names = ["server", *(f"site-{i + 1}" for i in range(count))]
    arguments = [url, str(mib), str(int(direct)), codec]
    peers = [Peer(["--peer", name, *arguments], environment(configuration), state_dict.__file__) for name in names]
    server, receivers = peers[0], peers[1:]
    try:
        for peer in peers:
            peer.answer()
        server.ask("idle")
        found: dict[str, float] = {}
        for _ in range(2):
            server.ask("lap")
            start = time.perf_counter()
            for receiver in receivers:
                receiver.tell("down")
            for receiver in receivers:
                receiver.answer()
            found["seconds"] = time.perf_counter() - start
        used = server.ask("used")
        return found | {"cpu": used["cpu"], "rss": used["rss"]}
    finally:
        for peer in peers:
            peer.close()


def show(runs: dict[tuple[str, int], list[dict[str, float]]], mib: int) -> None:
    title = f"{mib} MiB for each receiver, medians of {len(next(iter(runs.values())))} rounds"
    table = Table(title=title, title_justify="left")
    headings = ("", "receivers", "s", "GB/s in all", "x tcp", "server CPU s", "server peak RSS MiB")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    medians = {
        key: {name: statistics.median(r[name] for r in found) for name in found[0]} for key, found in runs.items()
    }
    for (name, count), m in medians.items():
        base = medians.get(("tcp", count))
        table.add_row(
            name,
            str(count),
            f"{m['seconds']:.2f}",
            f"{count * mib * MIB / m['seconds'] / 1e9:.2f}",
            f"{base['seconds'] / m['seconds']:.2f}" if base else "-",
            f"{m['cpu']:.2f}",
            f"{m['rss'] / MIB:.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--receivers", default="1,2,4,8")
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="of " + ",".join(CONFIGURATIONS))
    args = parser.parse_args()
    asked = [name for name in args.only.split(",") if name]
    if unknown := [name for name in asked if name not in CONFIGURATIONS]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    counts = [int(count) for count in args.receivers.split(",")]
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "torch"), highlight=False)
    runs: dict[tuple[str, int], list[dict[str, float]]] = {(name, count): [] for name in asked for count in counts}
    for _ in range(args.rounds):
        for name, count in runs:
            runs[name, count].append(run(name, count, args.mib))
    show(runs, args.mib)


if __name__ == "__main__":
    main()
