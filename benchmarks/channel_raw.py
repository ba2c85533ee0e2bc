"""The channel alone, without FLARE: a link between two processes, beside what the machine can do at best.

    python benchmarks/channel_raw.py [--mib 1024] [--rounds 3] [--chunks 256,1024,4096] [--rails 1,2,4]

In every round the references and all links take turns. The references are a bare Python `sendall`/`recv_into`
loop over loopback TCP and `process_vm_readv`, between two processes, with the same chunk size and into memory
that is warm. A link sends the same number of bytes as messages of --message MiB, clear and sealed (TLS control
stream, AES-256-GCM chunks); what arrives is compared in a transfer that is not timed. CPU seconds and peak RSS
growth are of both processes together, and of the links only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from channel_peers import serve
from measuring import MIB, Peer, command_line, free_port, machine, versions
from rich.console import Console
from rich.table import Table

KIB = 1024
#: Fabric -> the reference its speed is measured against, and the least ratio that is wanted.
GOALS = {
    "tcp": ("tcp loop", 0.80),
    "shm-direct": ("process_vm_readv", 0.60),
    "shm-memfd": ("process_vm_readv", 0.0),  # only shown
}
SEALED_GOAL = 0.50
console = Console(width=150)


def timed(sender: Peer, receiver: Peer) -> float:
    receiver.tell("receive")
    sent = sender.ask("send")
    return float(receiver.answer()["at"] - sent["at"])


def pair(kind: str, options: dict[str, Any]) -> tuple[Peer, Peer]:
    text = json.dumps(options | {"port": free_port()})
    receiver = Peer(["--peer", kind, "receive", text], {}, __file__)
    receiver.answer()  # it listens
    sender = Peer(["--peer", kind, "send", text], {}, __file__)
    sender.answer()
    receiver.answer()
    return sender, receiver


def run_link(options: dict[str, Any]) -> dict[str, float]:
    """One warm transfer of a fresh pair."""
    sender, receiver = peers = pair("link", options)
    try:
        for peer in peers:
            peer.ask("idle")
        timed(sender, receiver)  # warm-up
        receiver.tell("receive_one")
        if sender.ask("send_one") != receiver.answer():
            raise SystemExit(f"what arrived differs from what was sent: {options}")
        for peer in peers:
            peer.ask("lap")
        seconds = timed(sender, receiver)
        used = [peer.ask("used") for peer in peers]
        return {"seconds": seconds, "cpu": sum(u["cpu"] for u in used), "rss": sum(u["rss"] for u in used)}
    finally:
        for peer in peers:
            peer.close()


def run_references(options: dict[str, Any]) -> dict[str, float]:
    """Seconds of each reference; inf for one that this machine refuses."""
    sender, receiver = peers = pair("loop", options)
    try:
        timed(sender, receiver)  # warm-up
        loop = timed(sender, receiver)
        where = sender.ask("expose")
        for _ in range(2):
            read = receiver.ask(f"read {where['pid']} {where['address']}")
        if "refused" in read:
            console.print(f"process_vm_readv is refused: {read['refused']}", highlight=False)
        return {"tcp loop": loop, "process_vm_readv": read.get("seconds", float("inf"))}
    finally:
        for peer in peers:
            peer.close()


def variants(fabric: str, rails: list[int]) -> list[tuple[int, bool]]:
    """Rails, and whether chunks are sealed. Shared memory has one rail, and nothing to seal."""
    return [(count, sealed) for count in rails for sealed in (False, True)] if fabric == "tcp" else [(1, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--message", type=int, default=64, help="MiB of one message")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", default="256,1024,4096", help="KiB, comma-separated")
    parser.add_argument("--rails", default="1,2,4")
    parser.add_argument("--fabrics", default=",".join(GOALS))
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        serve(args.peer[0], args.peer[1], json.loads(args.peer[2]))
        return
    chunks = [int(chunk) * KIB for chunk in args.chunks.split(",")]
    rails = [int(count) for count in args.rails.split(",")]
    fabrics = args.fabrics.split(",")
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare-rdma", "cryptography", "numpy"), highlight=False)
    base = {"total": args.mib * MIB, "message": args.message * MIB}
    bytearray(4 * args.message * MIB)  # so that a virtual machine's host has given us memory already
    references: dict[tuple[int, str], list[float]] = {}
    links: dict[tuple[str, int, int, bool], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for chunk in chunks:
            for name, seconds in run_references(base | {"chunk": chunk}).items():
                references.setdefault((chunk, name), []).append(seconds)
            for fabric in fabrics:
                for count, sealed in variants(fabric, rails):
                    options = base | {"fabric": fabric, "rails": count, "chunk": chunk, "sealed": sealed}
                    links.setdefault((fabric, chunk, count, sealed), []).append(run_link(options))
    show(args, references, links)


def show(
    args: argparse.Namespace,
    references: dict[tuple[int, str], list[float]],
    links: dict[tuple[str, int, int, bool], list[dict[str, float]]],
) -> None:
    total = args.mib * MIB
    limit = {key: statistics.median(seconds) for key, seconds in references.items()}
    title = f"{args.mib} MiB in messages of {args.message} MiB, medians of {args.rounds} rounds, GB/s"
    table = Table(title=title, title_justify="left")
    for heading in ("fabric", "chunk KiB", "rails", "tcp loop", "process_vm", "clear", "sealed"):
        table.add_column(heading, justify="right")
    for heading in ("clear / reference", "sealed / clear", "CPU s/GiB clear", "sealed", "RSS MiB clear", "sealed"):
        table.add_column(heading, justify="right")
    best: dict[str, tuple[float, float, int, int]] = {}
    for (fabric, chunk, count, is_sealed), runs in links.items():
        if is_sealed:
            continue
        clear = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        sealed_runs = links.get((fabric, chunk, count, True))
        sealed = {key: statistics.median(run[key] for run in sealed_runs) for key in runs[0]} if sealed_runs else None
        ratio = limit[chunk, GOALS[fabric][0]] / clear["seconds"]
        both = clear["seconds"] / sealed["seconds"] if sealed else 0.0
        best[fabric] = max(best.get(fabric, (0.0, 0.0, 0, 0)), (ratio, both, chunk, count))
        speeds = [limit[chunk, name] for name in ("tcp loop", "process_vm_readv")] + [clear["seconds"]]
        table.add_row(
            *(fabric, str(chunk // KIB), str(count)),
            *(f"{total / seconds / 1e9:.2f}" for seconds in speeds),
            f"{total / sealed['seconds'] / 1e9:.2f}" if sealed else "",
            *(f"{ratio:.2f}", f"{both:.2f}" if sealed else ""),
            *(f"{m['cpu'] / (args.mib / 1024):.2f}" if m else "" for m in (clear, sealed)),
            *(f"{m['rss'] / MIB:.0f}" if m else "" for m in (clear, sealed)),
        )
    console.print(table)
    for fabric, (ratio, both, chunk, count) in best.items():
        reference, goal = GOALS[fabric]
        console.print(f"{fabric}: best with rdma_chunk_bytes={chunk}, rdma_rails={count}", highlight=False)
        goals = [(f"{fabric} / {reference}", ratio, goal)]
        if both:
            goals.append(("sealed / clear", both, SEALED_GOAL))
        for what, value, least in goals:
            met = "met    " if value >= least else "NOT met"
            console.print(f"  {met}  {what}: {value:.2f} (goal >= {least:.2f})", highlight=False)


if __name__ == "__main__":
    main()
