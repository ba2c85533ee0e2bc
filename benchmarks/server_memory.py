"""What a server holds while the results of many sites come in: FLARE's own way, its disk offload, and `RdmaTransfer`.

    python benchmarks/server_memory.py [--mib 475] [--sites 1,2,4,8,16] [--only nf4,raw,...] [--one-by-one]

A server process with a FLARE cell holds a global model, and adds each result to a sum with FLARE's
`WeightedAggregationHelper` as its FedAvg does, in the call that brings the result. A second process has the cells of
all sites, which send their results, of the model's size, at the same time, or one after the other. The tensors have the
shapes of Llama-3.2-1B's layers, float32, in 255 tensors. Every line has fresh processes.

    flare     FLARE alone, raw            offload   the same with FLARE's tensors on disk
    raw       RdmaTransfer, raw           nf4       RdmaTransfer, normfloat4
    memory    raw, and decoded, nf4, with `accumulate=False`: results are tensors in memory as they come

Without `accumulate=False` results wait as they came until they are added, and on disk what the memory budget (64 MiB)
has no room for.

The peak is what the server's VmHWM grew by since it was ready and had no model, in models: the global model and the sum
are two of them. A workflow's own copies (FLARE deep-copies a task's data, and its persistor has a model) are not in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from typing import Any

from measuring import MIB, Measured, Meter, Peer, command_line, free_port, machine, obey, versions, wait_until
from rich.console import Console
from rich.table import Table
from state_dict import make_model

CONFIGURATIONS = ("flare", "offload", "memory", "raw", "decoded", "nf4")
ENCODED = ("decoded", "nf4")
CODEC = "normfloat4"
TIMEOUT = 600.0
console = Console(width=130)


def open_cell(name: str, url: str) -> Any:
    from nvflare.app_opt.pt.decomposers import TensorDecomposer
    from nvflare.fuel.f3.cellnet.cell import Cell
    from nvflare.fuel.utils import fobs

    fobs.register(TensorDecomposer)
    return Cell(fqcn=name, root_url=url, secure=False, credentials={})


def prepare(configuration: str) -> None:
    """Install the transfer, and load compiled code."""
    if configuration in ("flare", "offload"):
        return
    from nvflare_rdma.codecs import get_codec, warm_up
    from nvflare_rdma.runtime import shared
    from nvflare_rdma.settings import load_settings
    from nvflare_rdma.streaming.component import install

    install()
    if configuration in ("raw", "nf4"):
        shared().holdings.start(load_settings().rdma_memory_budget_bytes)  # as `RdmaTransfer` does at a server
    warm_up([get_codec(CODEC)]).join()


class Server(Measured):
    """Adds what comes, one result at a time."""

    def __init__(self, configuration: str, url: str, mib: int) -> None:
        import torch  # noqa: F401 - it belongs to the empty server
        from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

        self._mib = mib
        self._model: dict[str, Any] = {}
        self._helper = WeightedAggregationHelper()
        self._cell = open_cell("server", url)
        self._cell.register_request_cb(channel="bench", topic="result", cb=self._take)
        self._cell.start()
        if configuration == "offload":
            self._to_disk()
        prepare(configuration)

    def _to_disk(self) -> None:
        from nvflare.app_common.utils.tensor_disk_offload_context import _TENSOR_DISK_OFFLOAD_ROOT_DIR
        from nvflare.fuel.utils.fobs import FOBSContextKey

        self._folder = tempfile.TemporaryDirectory()
        where = {FOBSContextKey.TENSOR_DISK_OFFLOAD: True, _TENSOR_DISK_OFFLOAD_ROOT_DIR: self._folder.name}
        self._cell.update_fobs_context(where)

    def begin(self) -> dict[str, Any]:
        self._meter = Meter()
        self._model = make_model(self._mib)
        return {}

    def _take(self, request: Any) -> Any:
        from nvflare.fuel.f3.cellnet.defs import ReturnCode
        from nvflare.fuel.f3.cellnet.utils import make_reply

        name, data = request.payload["site"], request.payload["model"]
        self._helper.add(data=data, weight=2.0, contributor_name=name, contribution_round=0)
        return make_reply(ReturnCode.OK, "", {})

    def end(self) -> dict[str, Any]:
        """What was held, and whether the mean is right: all results are the model's values."""
        import torch

        peak = self._meter.read()["rss"]
        mean, tolerance = self._helper.get_result(), 0.16  # half the widest gap of normfloat4, of values up to 1
        right = all(torch.allclose(mean[name], value, rtol=0, atol=tolerance) for name, value in self._model.items())
        return {"peak": peak, "right": right}


class Sites:
    """The cells of all sites, which have one model."""

    def __init__(self, configuration: str, url: str, mib: int, count: int) -> None:
        from nvflare_rdma.codecs import get_codec, marked

        model = make_model(mib)
        encoded = configuration in ENCODED
        self._model = {key: marked(t, get_codec(CODEC)) for key, t in model.items()} if encoded else model
        self._cells = [open_cell(f"site-{i + 1}", url) for i in range(count)]
        for cell in self._cells:
            cell.start()
        prepare(configuration.replace("nf4", "decoded").replace("raw", "memory"))
        for cell in self._cells:
            wait_until(lambda c=cell: c.core_cell.is_cell_connected("server"), f"a connection over {url}")

    def send(self, one_by_one: bool) -> dict[str, Any]:
        start, failures = time.perf_counter(), list[str]()
        threads = [threading.Thread(target=self._send, args=(i, failures)) for i in range(len(self._cells))]
        for thread in threads:
            thread.start()
            if one_by_one:
                thread.join()
        for thread in threads:
            thread.join()
        return {"seconds": time.perf_counter() - start, "failures": failures}

    def _send(self, i: int, failures: list[str]) -> None:
        from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
        from nvflare.fuel.f3.cellnet.utils import new_cell_message

        message = new_cell_message({}, {"site": f"site-{i + 1}", "model": self._model})
        reply = self._cells[i].send_request(
            channel="bench", topic="result", target="server", request=message, timeout=TIMEOUT
        )
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if code != ReturnCode.OK:
            failures.append(str(code))


def measure(configuration: str, mib: int, count: int, one_by_one: bool) -> dict[str, Any]:
    url = f"tcp://127.0.0.1:{free_port()}"
    common = ["--configuration", configuration, "--url", url, "--mib", str(mib), "--sites", str(count)]
    server = Peer(["--role", "server", *common], {}, __file__)
    server.answer()
    sites = Peer(["--role", "sites", *common], {}, __file__)
    try:
        sites.answer()
        server.ask("begin")
        sent = sites.ask(f"send {'true' if one_by_one else 'false'}")
        return {**sent, **server.ask("end")}
    finally:
        sites.close()
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=475)
    parser.add_argument("--sites", default="1,2,4,8,16")
    parser.add_argument("--only", default=",".join(CONFIGURATIONS))
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--role", choices=["server", "sites"], help=argparse.SUPPRESS)
    parser.add_argument("--configuration", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    counts = [int(n) for n in arguments.sites.split(",")]
    if arguments.role == "server":
        server = Server(arguments.configuration, arguments.url, arguments.mib)
        obey({"begin": server.begin, "end": server.end})
        return
    if arguments.role == "sites":
        sites = Sites(arguments.configuration, arguments.url, arguments.mib, counts[0])
        obey({"send": sites.send})
        return
    console.print(f"{machine()}\n{versions('torch', 'nvflare')}\n{command_line()}", highlight=False)
    table = Table("sites", *arguments.only.split(","), title="peak of the server, in models (seconds)")
    for count in counts:
        row = []
        for configuration in arguments.only.split(","):
            found = measure(configuration, arguments.mib, count, arguments.one_by_one)
            wrong = "" if found["right"] and not found["failures"] else f" WRONG {found['failures']}"
            row.append(f"{found['peak'] / MIB / arguments.mib:.2f} ({found['seconds']:.1f}){wrong}")
        table.add_row(str(count), *row)
        print(count, row, file=sys.stderr)
    console.print(table)


if __name__ == "__main__":
    main()
