"""One blob, one way, through FLARE's streaming between two processes: rdma beside FLARE's tcp and grpc drivers.
`upgraded` is our driver on FLARE's scheme tcp (`rdma_upgrade`), `mixed` the same with a sender that has FLARE's own.

    python benchmarks/driver_blob.py [--sizes 64,256,1024] [--rounds 5] [--only tcp,grpc,rdma-tcp,rdma-tcp+best]

Each driver runs as it comes and, as NAME+best, with FLARE's streaming window at 16 MiB and a malloc that keeps
freed memory. The clock runs from `Cell.send_blob` in the client to the whole blob in the server's callback.

Every round starts a fresh pair of processes for every configuration in turn, so that a noisy moment hits all of
them and none inherits memory. A pair sends the blob twice: the second transfer is what the tables show, the first
one, which meets cold memory, is noted beside it. Peak RSS is what VmHWM grew by from the idle, connected process
(the sender's payload is there already) over both transfers. CPU is user and system time of the second one.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import zlib
from typing import Any

from measuring import (
    BEST_ENVIRONMENT,
    MIB,
    Meter,
    Peer,
    command_line,
    free_port,
    machine,
    obey,
    pattern,
    versions,
    wait_until,
)
from rich.console import Console
from rich.table import Table

from nvflare_rdma.cli import driver_path
from nvflare_rdma.fabric import probe
from nvflare_rdma.settings import Settings

CHANNEL, TOPIC = "bench", "blob"
OURS = {"rdma-tcp": "tcp", "rdma-shm": "shm", "upgraded": "tcp"}  # with the fabric it is held to
BASES = ("tcp", "grpc", "mixed", *OURS)
SCHEMES = {"rdma-tcp": "rdma", "rdma-shm": "rdma", "grpc": "grpc"}  # else tcp
CONFIGURATIONS = tuple(base + suffix for suffix in ("", "+best") for base in BASES)
TIMEOUT = 120.0
console = Console(width=150)


# -- in the two processes ----------------------------------------------------------------------------------


class Side:
    """The server receives, the client sends."""

    def __init__(self, role: str, url: str, nbytes: int) -> None:
        from nvflare.fuel.f3.cellnet.cell import Cell

        self._arrived = threading.Event()
        self._blob: Any = None
        self._at = 0.0
        self._data = pattern(nbytes) if role == "client" else bytearray()
        self._cell = Cell(fqcn="server" if role == "server" else "site-1", root_url=url, secure=False, credentials={})
        self._cell.register_blob_cb(CHANNEL, TOPIC, self._receive)
        self._cell.start()
        if role == "client":
            wait_until(lambda: self._cell.core_cell.is_cell_connected("server"), f"a connection over {url}")
        self._meter = Meter()

    def _receive(self, future: Any) -> None:
        self._blob = future.result()
        self._at = time.monotonic()  # the same clock in all processes of a machine
        self._arrived.set()

    def idle(self) -> dict[str, Any]:
        self._meter = Meter()
        return {}

    def arm(self) -> dict[str, Any]:
        self._blob = None
        self._arrived.clear()
        self._meter.lap()
        return {}

    def send(self) -> dict[str, Any]:
        from nvflare.fuel.f3.message import Message

        self._meter.lap()
        start = time.monotonic()
        future = self._cell.send_blob(CHANNEL, TOPIC, "server", Message({}, self._data))
        future.result(timeout=TIMEOUT)
        return {"at": start} | self._meter.read()

    def received(self) -> dict[str, Any]:
        if not self._arrived.wait(TIMEOUT):
            raise SystemExit("the blob did not arrive")
        return {"at": self._at} | self._meter.read() | {"digest": zlib.crc32(self._blob)}

    def digest(self) -> dict[str, Any]:
        return {"digest": zlib.crc32(self._data)}

    def serve(self) -> None:
        obey({name: getattr(self, name) for name in ("idle", "arm", "send", "received", "digest")})
        self._cell.stop()


# -- the parent --------------------------------------------------------------------------------------------


def environment(configuration: str, role: str) -> dict[str, str]:
    base, _, best = configuration.partition("+")
    chosen = {}
    if base in OURS or (base == "mixed" and role == "server"):
        chosen["NVFLARE_COMM_DRIVER_PATH"] = driver_path()
        chosen["NVFLARE_RDMA_FABRICS"] = OURS.get(base, "tcp")
        chosen["NVFLARE_RDMA_UPGRADE"] = str(base not in SCHEMES)
    return chosen | (BEST_ENVIRONMENT if best else {})


def run_pair(configuration: str, nbytes: int) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the second transfer of a fresh pair."""
    base = configuration.partition("+")[0]
    arguments = [f"{SCHEMES.get(base, 'tcp')}://127.0.0.1:{free_port()}", str(nbytes)]
    peers = [
        Peer(["--peer", role, *arguments], environment(configuration, role), __file__) for role in ("server", "client")
    ]
    server, client = peers
    try:
        for peer in peers:
            peer.answer()
        for peer in peers:
            peer.ask("idle")
        expected = client.ask("digest")["digest"]
        transfers = []
        for _ in range(2):
            server.ask("arm")
            sent = client.ask("send")
            got = server.ask("received")
            if got["digest"] != expected:
                raise SystemExit(f"{configuration}: what arrived differs from what was sent")
            transfers.append(
                {"seconds": got["at"] - sent["at"]}
                | {f"tx_{key}": sent[key] for key in ("cpu", "rss", "faults", "switches")}
                | {f"rx_{key}": got[key] for key in ("cpu", "rss", "faults", "switches")}
            )
        return transfers[0], transfers[1]
    finally:
        for peer in peers:
            peer.close()


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def show(mib: int, rounds: int, warm: dict[str, dict[str, float]], first: dict[str, dict[str, float]]) -> None:
    gib = mib / 1024
    table = Table(title=f"{mib} MiB, medians of {rounds} rounds", title_justify="left")
    headings = ("", "s", "GB/s", "x tcp", "x grpc", "first s", "CPU s/GiB tx", "rx", "peak RSS MiB tx", "rx")
    for heading in (*headings, "faults k tx", "rx", "switches tx", "rx"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, m in warm.items():
        to = [f"{warm[b]['seconds'] / m['seconds']:.2f}" if b in warm else "-" for b in ("tcp", "grpc")]
        table.add_row(
            name,
            f"{m['seconds']:.3f}",
            f"{mib * MIB / m['seconds'] / 1e9:.2f}",
            *to,
            f"{first[name]['seconds']:.3f}",
            *(f"{m[side + '_cpu'] / gib:.2f}" for side in ("tx", "rx")),
            *(f"{m[side + '_rss'] / MIB:.0f}" for side in ("tx", "rx")),
            *(f"{m[side + '_faults'] / 1000:.0f}" for side in ("tx", "rx")),
            *(f"{m[side + '_switches']:.0f}" for side in ("tx", "rx")),
        )
    console.print(table)


def goals(mib: int, warm: dict[str, dict[str, float]]) -> None:
    """What the project wants of each of its fabrics at the largest size."""

    def line(what: str, value: float, least: float | None = None, most: float | None = None) -> None:
        met = value >= least if least is not None else value <= (most or 0.0)
        limit = f"goal >= {least:g}" if least is not None else f"goal <= {most:g}"
        console.print(f"  {'met    ' if met else 'NOT met'}  {what}: {value:.2f} ({limit})", highlight=False)

    console.print(f"Goals at {mib} MiB{'' if mib == 1024 else ' (they are stated for 1024)'}")
    for ours in (name for name in OURS if name in warm):
        m = warm[ours]
        for other, least in (("tcp", 2.0), ("grpc", 2.5)):
            if other in warm:
                line(f"{ours} / {other}, both as they come, speed", warm[other]["seconds"] / m["seconds"], least=least)
        for other in ("tcp+best", "grpc+best"):
            for own in (ours, ours + "+best"):
                if other in warm and own in warm:
                    line(f"{own} / {other}, speed", warm[other]["seconds"] / warm[own]["seconds"], least=1.0)
        if "tcp" in warm:
            tcp = warm["tcp"]
            both = [run["tx_cpu"] + run["rx_cpu"] for run in (m, tcp)]
            line(f"{ours} / tcp, CPU of both sides", both[0] / both[1], most=1.0)
            for side, name in (("tx", "sender"), ("rx", "receiver")):
                # Sender growth is a few MiB: compared in MiB rather than as a ratio of noise.
                growth = (m[side + "_rss"] - tcp[side + "_rss"]) / MIB
                line(f"{ours} - tcp, peak RSS of the {name} in MiB", growth, most=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="64,256,1024", help="MiB, comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        Side(args.peer[0], args.peer[1], int(args.peer[2])).serve()
        return
    asked = [name for name in args.only.split(",") if name]
    if unknown := [name for name in asked if name not in CONFIGURATIONS]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "grpcio", "numpy"), highlight=False)
    console.print("+best: " + " ".join(f"{k}={v}" for k, v in BEST_ENVIRONMENT.items()), highlight=False)
    available = probe(Settings().fabric_options)
    for base, fabric in OURS.items():
        if not available[fabric].usable and any(name.startswith(base) for name in asked):
            console.print(f"{base} is skipped: {available[fabric].reason}", highlight=False)
            asked = [name for name in asked if not name.startswith(base)]
    sizes = sorted(int(size) for size in args.sizes.split(","))
    warm: dict[str, dict[str, float]] = {}
    # In a virtual machine, memory that no process has used yet is far slower to get than later on.
    bytearray(3 * sizes[-1] * MIB)
    for mib in sizes:
        first_runs: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
        warm_runs: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
        for _ in range(args.rounds):
            for name in asked:
                first, second = run_pair(name, mib * MIB)
                first_runs[name].append(first)
                warm_runs[name].append(second)
        warm = {name: medians(runs) for name, runs in warm_runs.items()}
        show(mib, args.rounds, warm, {name: medians(runs) for name, runs in first_runs.items()})
    goals(sizes[-1], warm)


if __name__ == "__main__":
    main()
