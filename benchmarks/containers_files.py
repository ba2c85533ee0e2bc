"""A container and a file from a server to a client: FLARE's ContainerStreamer and FileStreamer beside ours.

    python benchmarks/containers_files.py [--mib 1024] [--rounds 5] [--only flare,direct-shm,direct-tcp]
    python benchmarks/containers_files.py --flat 1,2,4,8

Two processes with a FLARE cell each, FLARE's own stream runner on it, and its tcp driver. The container is the state
dict of `state_dict.py`; the file has random bytes, is in the page cache and goes to the same file system; ours is
synced to disk before the clock stops, FLARE's is not. Every round starts a fresh pair of processes for every
configuration in turn; a pair moves each twice. The second transfer is what the table shows; CPU is of it, peak RSS is
what VmHWM grew by from the idle, connected process over both. What arrives is compared.

``--flat``: ours alone, once for each size in GiB, with a memory budget of 64 MiB: what peak RSS grew by, for a receiver
of a container beyond the container. Containers go up to 4 GiB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import xxhash
from measuring import MIB, Measured, Meter, Peer, command_line, free_port, machine, obey, versions, wait_until
from rich.console import Console
from rich.table import Table
from state_dict import make_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIGURATIONS = ("flare", "direct-shm", "direct-tcp")
KINDS = ("container", "file")
BUDGET_MIB = 64
MAX_CONTAINER_GIB = 4
console = Console(width=150)


class Side(Measured):
    """The server streams, the client receives."""

    def __init__(self, role: str, url: str, direct: bool, folder: str, kind: str, mib: int) -> None:
        from nvflare.app_common.streamers import container_streamer, file_streamer
        from nvflare.app_opt.pt.decomposers import TensorDecomposer
        from nvflare.fuel.utils import fobs

        from tests.support.stream_engine import StreamEngine

        fobs.register(TensorDecomposer)
        self._containers, self._files = container_streamer.ContainerStreamer, file_streamer.FileStreamer
        if direct:
            from nvflare_rdma import streaming

            self._containers, self._files = streaming.ContainerStreamer, streaming.FileStreamer
        self._folder, self._kind = Path(folder), kind
        self._model: Any = None
        self._location = ""
        self._is_server = is_server = role == "server"
        self._engine = StreamEngine("server" if is_server else "site-1", url)
        if is_server and kind == "container":
            self._model = make_model(mib)
        elif not is_server:
            wait_until(lambda: self._engine.cell.core_cell.is_cell_connected("server"), f"a connection over {url}")
        if direct:
            from nvflare_rdma.streaming.component import install

            install()
        if not is_server:
            context = self._engine.new_context()
            self._containers.register_stream_processing(context, "bench", "container", self._received)
            self._files.register_stream_processing(context, "bench", "file", folder, self._received)
        self._meter = Meter()

    def _received(self, stream_ctx: Any, fl_ctx: Any) -> None:
        self._model = self._containers.get_result(stream_ctx)
        self._location = self._files.get_file_location(stream_ctx)

    def stream(self) -> dict[str, Any]:
        start, context = time.perf_counter(), self._engine.new_context()
        if self._kind == "container":
            code, _ = self._containers.stream_container("bench", "container", {}, ["site-1"], self._model, context)
        else:
            name = str(self._folder / "source")
            code, _ = self._files.stream_file("bench", "file", {}, ["site-1"], name, context, chunk_timeout=60.0)
        return {"seconds": time.perf_counter() - start, "code": code}

    def check(self) -> dict[str, Any]:
        """A digest of what was sent, or has come, which is then removed."""
        digest = xxhash.xxh3_128()
        if self._kind == "container":
            for name, tensor in self._model.items():
                digest.update(name.encode())
                digest.update(tensor.numpy().reshape(-1).view("u1"))
            if not self._is_server:
                self._model = None
        else:
            with open(self._location or self._folder / "source", "rb") as file:
                while block := file.read(MIB):
                    digest.update(block)
            if self._location:
                os.unlink(self._location)
        return {"digest": digest.hexdigest()}

    def serve(self) -> None:
        obey({name: getattr(self, name) for name in ("idle", "lap", "used", "stream", "check")})
        self._engine.stop()


def run_pair(configuration: str, kind: str, mib: int, folder: str, transfers: int = 2) -> dict[str, float]:
    """The last transfer, with the first one's seconds."""
    direct = configuration.startswith("direct")
    chosen = {"NVFLARE_RDMA_FABRICS": configuration.removeprefix("direct-")} if direct else {}
    chosen["NVFLARE_RDMA_MEMORY_BUDGET_BYTES"] = str(BUDGET_MIB * MIB)
    arguments = [f"tcp://127.0.0.1:{free_port()}", str(int(direct)), folder, kind, str(mib)]
    peers = [Peer(["--peer", role, *arguments], chosen, __file__) for role in ("server", "client")]
    server, client = peers
    found: dict[str, float] = {}
    try:
        for peer in peers:
            peer.answer()
        for peer in peers:
            peer.ask("idle")
        for _ in range(transfers):
            for peer in peers:
                peer.ask("lap")
            moved = server.ask("stream")
            used = {"server": server.ask("used"), "client": client.ask("used")}
            if moved["code"] != "OK" or server.ask("check") != client.ask("check"):
                raise SystemExit(f"{configuration}: {kind}: {moved['code']}, or what came differs")
            found = {"first": found.get("first", moved["seconds"]), "seconds": moved["seconds"]}
            found |= {f"{side}_{key}": u[key] for side, u in used.items() for key in ("cpu", "rss")}
        return found
    finally:
        for peer in peers:
            peer.close()


def make_file(folder: str, mib: int) -> None:
    with open(Path(folder) / "source", "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())  # or its writing goes on while the clock runs


def compare(args: argparse.Namespace, asked: list[str], folder: str) -> None:
    make_file(folder, args.mib)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {(kind, name): [] for kind in KINDS for name in asked}
    for _ in range(args.rounds):
        for kind, name in runs:
            runs[kind, name].append(run_pair(name, kind, args.mib, folder))
    table = Table(title=f"{args.mib} MiB, medians of {args.rounds} rounds", title_justify="left")
    headings = ("", "", "s", "GB/s", "x FLARE", "first s", "CPU s server", "client", "peak RSS MiB server", "client")
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    medians = {
        which: {key: statistics.median(r[key] for r in found) for key in found[0]} for which, found in runs.items()
    }
    for (kind, name), m in medians.items():
        base = medians.get((kind, "flare"))
        table.add_row(
            kind,
            name,
            f"{m['seconds']:.3f}",
            f"{args.mib * MIB / m['seconds'] / 1e9:.2f}",
            f"{base['seconds'] / m['seconds']:.1f}" if base else "-",
            f"{m['first']:.3f}",
            *(f"{m[side + '_cpu']:.2f}" for side in ("server", "client")),
            *(f"{m[side + '_rss'] / MIB:.0f}" for side in ("server", "client")),
        )
    console.print(table)


def flat(sizes: list[int], asked: list[str], folder: str) -> None:
    table = Table(title=f"Peak RSS growth in MiB, budget {BUDGET_MIB} MiB", title_justify="left")
    for heading in ("", "", "GiB", "s", "GB/s", "sender", "receiver", "receiver beyond the container"):
        table.add_column(heading, justify="left" if not heading else "right")
    for kind in KINDS:
        for size in sizes:
            if kind == "container" and size > MAX_CONTAINER_GIB:
                continue
            if kind == "file":
                make_file(folder, size * 1024)
            for name in asked:
                m = run_pair(name, kind, size * 1024, folder, transfers=1)
                beyond = m["client_rss"] / MIB - (size * 1024 if kind == "container" else 0)
                speed = f"{size * 1024 * MIB / m['seconds'] / 1e9:.2f}"
                grown = (f"{m[side + '_rss'] / MIB:.0f}" for side in ("server", "client"))
                table.add_row(kind, name, str(size), f"{m['seconds']:.2f}", speed, *grown, f"{beyond:.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--flat", help="sizes in GiB")
    parser.add_argument("--folder", help="where files are made; the system's folder for temporary files by default")
    parser.add_argument("--peer", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        role, url, direct, folder, kind, mib = args.peer
        Side(role, url, direct == "1", folder, kind, int(mib)).serve()
        return
    asked = [name for name in args.only.split(",") if name]
    if unknown := [name for name in asked if name not in CONFIGURATIONS]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "torch", "xxhash"), highlight=False)
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
        if args.flat:
            flat([int(size) for size in args.flat.split(",")], [name for name in asked if name != "flare"], folder)
        else:
            compare(args, asked, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
