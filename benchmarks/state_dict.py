"""A state dict from a server to a client and back: FLARE's own tensor path, over its tcp and grpc, beside ours.

    python benchmarks/state_dict.py [--mib 1024] [--rounds 5] [--only tcp,grpc,tcp+best,direct-shm,...]

Two processes with a FLARE cell each and 255 float32 tensors in the shapes of Llama-3.2-1B's layers, scaled.
``down``: the client asks, and the clock runs until it has all tensors of the answer. ``up``: it sends the model, and
the clock runs until the server's answer, which it gives when it has all of it; it is compared then. FLARE's messages go
over its tcp driver in every configuration but grpc; ``direct`` has `RdmaTransfer`'s data channels, held to one fabric.
``+best``: FLARE's streaming window at 16 MiB and a malloc that keeps freed memory. ``+nf4``: tensors are marked as
`ModelQuantizer` does with ``normfloat4``, which is encoded and decoded on the way.

Every round starts a fresh pair of processes for every configuration in turn. A pair moves the model three times each
way: the last transfer is what the table shows, the first one, which meets cold memory, is noted beside it. Peak RSS is
what VmHWM grew by from just before the first transfer (of this way) to its end: for who receives that is the model and
what it takes besides. CPU and page faults are of the last transfer, of both processes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

from measuring import (
    BEST_ENVIRONMENT,
    MIB,
    Measured,
    Meter,
    Peer,
    command_line,
    free_port,
    machine,
    obey,
    versions,
    wait_until,
)
from rich.console import Console
from rich.table import Table

CONFIGURATIONS = ("tcp", "grpc", "tcp+best", "direct-shm", "direct-tcp", "direct-shm+nf4", "direct-tcp+nf4")
TIMEOUT = 300.0
TURNS = 3
LAYERS = 28  # and 9 tensors each, and three more: 255
console = Console(width=150)


def model_shapes(mib: int) -> dict[str, tuple[int, ...]]:
    """255 tensors of ``mib`` MiB in all: Llama's projections, norms, embedding and head, narrower. The head has as many
    rows as are left."""
    width, values = 8, mib * MIB // 4
    while sum(map(math.prod, _shapes(width + 8))) <= values:
        width += 8
    shapes = dict(zip(_names(), _shapes(width), strict=True))
    rows, columns = shapes["head"]
    left = max(values - sum(map(math.prod, shapes.values())), 0)
    return shapes | {"head": (rows + -(-left // columns), columns)}


def make_model(mib: int) -> dict[str, Any]:
    """Tensors of `model_shapes`, with random values."""
    import torch

    torch.manual_seed(0)
    return {name: torch.rand(shape) for name, shape in model_shapes(mib).items()}


def _names() -> list[str]:
    parts = ("q", "k", "v", "o", "gate", "up", "down", "input_norm", "post_norm")
    return [f"layers.{i}.{part}" for i in range(LAYERS) for part in parts] + ["embed", "norm", "head"]


def _shapes(width: int) -> list[tuple[int, ...]]:
    w = width
    layer = [(w, w), (w // 4, w), (w // 4, w), (w, w), (4 * w, w), (4 * w, w), (w, 4 * w), (w,), (w,)]
    return [*(shape for _ in range(LAYERS) for shape in layer), (8 * w, w), (w,), (8 * w, w)]


class Side(Measured):
    """The server (``role``) holds the model; a site, called by its role, fetches it and sends it back."""

    def __init__(self, role: str, url: str, mib: int, direct: bool, codec: str) -> None:
        from nvflare.app_opt.pt.decomposers import TensorDecomposer
        from nvflare.fuel.f3.cellnet.cell import Cell
        from nvflare.fuel.utils import fobs

        fobs.register(TensorDecomposer)
        self._is_server = role == "server"
        self._codec = codec
        self._model: dict[str, Any] = make_model(mib) if self._is_server else {}
        self._marked: tuple[Any, dict[str, Any]] = None, {}
        self._got: dict[str, Any] = {}
        self._cell = Cell(fqcn=role, root_url=url, secure=False, credentials={})
        self._cell.register_request_cb(channel="bench", topic="get", cb=self._give)
        self._cell.register_request_cb(channel="bench", topic="put", cb=self._take)
        self._cell.start()
        if direct:
            from nvflare_rdma.streaming.component import install

            install()
        if not self._is_server:
            wait_until(lambda: self._cell.core_cell.is_cell_connected("server"), f"a connection over {url}")
        if codec:
            # Compiled code and its compiler come to some 100 MiB, once in a process.
            import numpy as np

            from nvflare_rdma.codecs import get_codec

            made, values = get_codec(codec), np.zeros(1 << 16, np.float32)
            made.encode_into(values, buffer := np.empty(made.encoded_nbytes(values.size), np.uint8))
            made.decode_into(buffer, values)
        self._meter = Meter()

    def _give(self, request: Any) -> Any:
        return self._reply({"model": self._to_send()})

    def _to_send(self) -> dict[str, Any]:
        if not self._codec:
            return self._model
        from nvflare_rdma.codecs import get_codec, marked

        codec, (model, found) = get_codec(self._codec), self._marked
        if model is not self._model:  # once for all receivers, as `ModelQuantizer` does
            found = {name: marked(tensor, codec) for name, tensor in self._model.items()}
            self._marked = self._model, found
        return found

    def _take(self, request: Any) -> Any:
        self._got = request.payload["model"]
        return self._reply({})

    def _equal(self, got: Any, sent: Any) -> bool:
        import torch

        # Twice through 4 bits: half the widest gap of its table, of values up to 1, and again.
        return bool(torch.allclose(got, sent, rtol=0, atol=0.31) if self._codec else torch.equal(got, sent))

    @staticmethod
    def _reply(payload: dict[str, Any]) -> Any:
        from nvflare.fuel.f3.cellnet.defs import ReturnCode
        from nvflare.fuel.f3.cellnet.utils import make_reply

        return make_reply(ReturnCode.OK, "", payload)

    def _request(self, topic: str, payload: dict[str, Any]) -> Any:
        from nvflare.fuel.f3.cellnet.utils import new_cell_message

        request = new_cell_message({}, payload)
        return self._cell.send_request(
            channel="bench", topic=topic, target="server", request=request, timeout=TIMEOUT
        ).payload

    def down(self) -> dict[str, Any]:
        self._model, self._marked = {}, (None, {})  # the last one; a site has trained it, and loads the next
        start = time.perf_counter()
        self._model = self._request("get", {})["model"]
        return {"seconds": time.perf_counter() - start}

    def up(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._request("put", {"model": self._to_send()})
        return {"seconds": time.perf_counter() - start}

    def check(self) -> dict[str, Any]:
        got, self._got = self._got, {}
        equal = got.keys() == self._model.keys() and all(self._equal(got[name], self._model[name]) for name in got)
        return {"equal": equal}

    def serve(self) -> None:
        obey({name: getattr(self, name) for name in ("idle", "lap", "used", "down", "up", "check")})
        self._cell.stop()


def environment(configuration: str) -> dict[str, str]:
    base, _, best = configuration.partition("+")
    chosen = {"NVFLARE_RDMA_FABRICS": base.removeprefix("direct-")} if base.startswith("direct") else {}
    return chosen | (BEST_ENVIRONMENT if best == "best" else {})


def run_pair(configuration: str, mib: int) -> dict[str, dict[str, float]]:
    """``down`` and ``up``: the last transfer, with the first one's seconds."""
    direct = configuration.startswith("direct")
    scheme = "grpc" if configuration.startswith("grpc") else "tcp"
    arguments = [
        f"{scheme}://127.0.0.1:{free_port()}",
        str(mib),
        str(int(direct)),
        "normfloat4" if configuration.endswith("+nf4") else "",
    ]
    peers = [Peer(["--peer", role, *arguments], environment(configuration), __file__) for role in ("server", "site-1")]
    server, client = peers
    try:
        for peer in peers:
            peer.answer()
        found: dict[str, dict[str, float]] = {"down": {}, "up": {}}
        for turn in range(TURNS):
            for way, of in found.items():
                for peer in peers:
                    peer.ask("idle")
                moved = client.ask(way)
                used = {"server": server.ask("used"), "client": client.ask("used")}
                if way == "up" and not server.ask("check")["equal"]:
                    raise SystemExit(f"{configuration}: what came back differs from what was sent")
                for side, u in used.items():
                    of |= {f"{side}_{key}": u[key] for key in (("cpu", "faults") if turn else ("rss",))}
                of["seconds" if turn else "first"] = moved["seconds"]
        return found
    finally:
        for peer in peers:
            peer.close()


def show(runs: dict[str, list[dict[str, dict[str, float]]]], mib: int) -> None:
    title = f"{mib} MiB, medians of {len(next(iter(runs.values())))} rounds"
    table = Table(title=title, title_justify="left")
    headings = ("", "way", "s", "GB/s", "x tcp", "x grpc", "first s", "CPU s server", "client")
    for heading in (*headings, "faults k server", "client", "peak RSS MiB server", "client"):
        table.add_column(heading, justify="left" if heading in ("", "way") else "right")
    medians = {
        (name, way): {key: statistics.median(run[way][key] for run in found) for key in found[0][way]}
        for way in ("down", "up")
        for name, found in runs.items()
    }
    for (name, way), m in medians.items():
        to = [
            f"{medians[other, way]['seconds'] / m['seconds']:.2f}" if (other, way) in medians else "-"
            for other in ("tcp", "grpc")
        ]
        table.add_row(
            name,
            way,
            f"{m['seconds']:.3f}",
            f"{mib * MIB / m['seconds'] / 1e9:.2f}",
            *to,
            f"{m['first']:.3f}",
            *(f"{m[side + '_cpu']:.2f}" for side in ("server", "client")),
            *(f"{m[side + '_faults'] / 1000:.0f}" for side in ("server", "client")),
            *(f"{m[side + '_rss'] / MIB:.0f}" for side in ("server", "client")),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--peer", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        role, url, mib, direct, codec = args.peer
        Side(role, url, int(mib), direct == "1", codec).serve()
        return
    asked = [name for name in args.only.split(",") if name]
    if unknown := [name for name in asked if name not in CONFIGURATIONS]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare", "nvflare-rdma", "torch", "grpcio"), highlight=False)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in asked}
    for _ in range(args.rounds):
        for name in asked:
            runs[name].append(run_pair(name, args.mib))
    show(runs, args.mib)


if __name__ == "__main__":
    main()
