"""A server and two sites that stream containers and files: stream_cells.py FOLDER. What happened is in
FOLDER/results.json. "own" in a name: that side has FLARE's streamers, not ours; the sites are asked in parallel."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import torch
from nvflare.apis.event_type import EventType
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.app_common.streamers import container_streamer, file_streamer
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from safetensors.torch import save_file

from nvflare_rdma.errors import SourceError
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming import ContainerRetriever, ContainerStreamer, FileRetriever, FileStreamer
from nvflare_rdma.streaming.component import install
from nvflare_rdma.streaming.streams.messages import KEY, PREFIX, Said
from tests.support.file_transfers import as_received
from tests.support.processes import free_port
from tests.support.stream_engine import StreamEngine
from tests.support.two_cells import Lines
from tests.support.waiting import eventually

SITES = ["site-1", "site-2"]
STATE = OrderedDict(
    [
        ("weight", torch.randn(300, 400)),
        ("array", np.arange(50_000)),
        (7, "seven"),
        ("nested", {"deep": torch.randn(200, 300), "n": [1, 2.5, None, b"bytes"]}),
        ("sparse", "not a tensor"),
        ("scalar", torch.tensor(5.0)),
        ("tied", None),
    ]
)
STATE["tied"] = STATE["weight"]
CONTAINERS = {
    "dict": dict(STATE),
    "ordered": STATE,
    "list": list(STATE.values()),
    "deque": deque([1, torch.ones(30_000)]),
    "set": {1, "two", 3.0},
    "tensors": [torch.full((20_000,), float(i)) for i in range(10)],
    "many": list(range(10_000)),
    "narrow": {
        name: torch.randint(0, 256, (300, 400), dtype=torch.uint8).view(getattr(torch, name))
        for name in ("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
    },
    "large texts": {str(i): "x" * 400_000 for i in range(8)},
}


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.element_size() == 1 and a.dtype == b.dtype:  # torch compares not all types of 8 bits
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | deque):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.results = folder, Lines(), {}
        logging.getLogger("nvflare_rdma").addHandler(self.lines)
        url = f"tcp://127.0.0.1:{free_port()}"
        self.server = StreamEngine("server", url)
        self.sites = {name: StreamEngine(name, url) for name in SITES}
        for site in self.sites.values():
            eventually(lambda site=site: site.cell.core_cell.is_cell_connected("server"))
        self.done: dict[str, dict] = {}
        self.consumed: list = []
        self.lock = threading.Lock()

    def register(self, containers=ContainerStreamer, files=FileStreamer) -> None:
        for name, site in self.sites.items():
            to = self.folder / name
            to.mkdir(exist_ok=True)
            context = site.new_context()
            containers.register_stream_processing(context, "app", "container", self.received, site=name)
            files.register_stream_processing(context, "app", "file", str(to), self.received, self.chunk, site=name)

    def received(self, stream_ctx, fl_ctx, site):
        with self.lock:
            assert site not in self.done, "called twice"
            self.done[site] = dict(stream_ctx)
        return f"thanks from {site}"

    def chunk(self, reply, stream_ctx, fl_ctx, site):
        with self.lock:
            self.consumed.append([site, reply[0], FileStreamer.get_file_size(stream_ctx)])

    def container(self, container, targets=SITES, streamer=ContainerStreamer) -> dict:
        self.done.clear()
        sent = {"mine": 5}
        code = streamer.stream_container("app", "container", sent, targets, container, self.server.new_context())
        return {
            "result": list(code),
            "same": [same(ContainerStreamer.get_result(self.done.get(site, {})), container) for site in targets],
            **self.contexts(targets, sent),
        }

    def file(self, path: Path, targets=SITES, streamer=FileStreamer, content=None, **kinds) -> dict:
        """``content``: what is to arrive, if it is not the file's."""
        self.done.clear()
        self.consumed.clear()
        sent = {"mine": 5}
        context = self.server.new_context()
        code, replies = streamer.stream_file("app", "file", sent, targets, str(path), context, **kinds)
        places = [FileStreamer.get_file_location(self.done.get(site, {})) for site in targets]
        ends = {site: reply.get_header("ObjectStreamer.END_RESULT") for site, reply in (replies or {}).items()}
        content = content or path.read_bytes()
        return {
            "result": [code, ends],
            "same": [bool(place) and Path(place).is_file() and Path(place).read_bytes() == content for place in places],
            "folders": [
                bool(place) and Path(place).parent == self.folder / s for place, s in zip(places, targets, strict=True)
            ],
            "left": [sorted(p.name for p in (self.folder / site).glob(".*")) for site in targets],
            "consumed": list(self.consumed),
            **self.contexts(targets, sent),
        }

    def contexts(self, targets, sent) -> dict:
        def plain(context: dict) -> dict:
            return {k: v for k, v in context.items() if isinstance(v, str | int) and "location" not in k}

        return {
            "contexts": [plain(self.done.get(site, {})) for site in targets],
            "sent": plain(sent),
            "log": self.lines.take(),
        }

    def encoded(self, path: Path, other: Path) -> dict:
        """A safetensors file, also by retrieving, and a file that is none."""
        records: list = []
        stop = shared().ledger.subscribe(records.append)
        result = self.file(path, content=as_received(path.read_bytes(), "normfloat4"), quantization_type="NormFloat4")
        stop()
        result["records"] = [record.as_dict() for record in records]
        try:
            self.file(other, quantization_type="normfloat4")
        except SourceError as error:
            result["refused"] = [str(error), list(self.done)]
        retrievers = {}
        for name, engine in {"server": self.server, **self.sites}.items():
            made = FileRetriever(str(path.parent), "encoded", dest_dir=str(self.folder), quantization_type="normfloat4")
            made.handle_event(EventType.START_RUN, engine.new_context())
            retrievers[name] = made
        context = self.sites["site-2"].new_context()
        found = [retrievers["site-2"].retrieve_file("server", context, 30.0, it.name) for it in (path, other)]
        result["retrieved"] = [
            [code, place and Path(place).read_bytes() == as_received(path.read_bytes(), "normfloat4")]
            for code, place in found
        ]
        return result

    def retrieve(self, folder: Path, data: Path) -> dict:
        """Site 2 from the server."""
        engines = {"server": self.server, **self.sites}
        containers = {name: ContainerRetriever("containers") for name in engines}
        files = {name: FileRetriever(str(folder), "files", dest_dir=str(self.folder)) for name in engines}
        containers["server"].add_container("model", STATE)
        for kind in (containers, files):
            for name, retriever in kind.items():
                retriever.handle_event(EventType.START_RUN, engines[name].new_context())
        context = self.sites["site-2"].new_context()
        code, got = containers["site-2"].retrieve_container("server", context, 30.0, "model")
        file_code, place = files["site-2"].retrieve_file("server", context, 30.0, data.name)
        codes = [
            containers["site-2"].retrieve_container("server", context, 30.0, "other")[0],
            files["site-2"].retrieve_file("server", context, 30.0, "../" + data.name)[0],
        ]
        same_file = Path(place).read_bytes() == data.read_bytes()
        return {"same": [same(got, STATE), same_file], "codes": [code, file_code, *codes], "log": self.lines.take()}


def main() -> None:
    folder = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    fobs.register(TensorDecomposer)
    fobs.register(NumpyArrayDecomposer)
    data, empty = folder / "data.bin", folder / "empty.bin"
    data.write_bytes(os.urandom(3_000_001))
    empty.touch()
    job = Job(folder)
    job.register()
    results = job.results
    results["before"] = [job.container(STATE, ["site-1"]), job.file(data, ["site-1"])]  # no RdmaTransfer anywhere
    install()
    for name, container in CONTAINERS.items():
        results[name] = job.container(container)
    records: list = []
    stop = shared().ledger.subscribe(records.append)
    job.container(CONTAINERS["dict"]), job.file(data)
    stop()
    results["records"] = [record.as_dict() for record in records if record.kind != "tensors"]
    results["file"], results["empty"] = job.file(data), job.file(empty)
    results["retrieved"] = job.retrieve(folder, data)

    model = folder / "model.safetensors"
    save_file({"weight": torch.randn(500, 300), "bias": torch.randn(100), "steps": torch.arange(9)}, model)
    results["encoded"] = job.encoded(model, data)

    own = shared().links._links["site-2"]
    shared().links._links["site-2"] = None
    results["mixed"] = [job.container(STATE), job.file(data)]
    results["exact"] = job.file(model, ["site-2"], quantization_type="normfloat4")
    shared().links._links["site-2"] = own

    os.rename(folder / "site-1", folder / "gone")  # its disk fails
    results["disk"] = job.file(data)
    os.rename(folder / "gone", folder / "site-1")

    job.sites["site-1"].abort.trigger("enough")
    results["aborted"] = [job.container(STATE), job.file(data)]
    job.sites["site-1"].abort.reset()

    results["own sender"] = [
        job.container(STATE, streamer=container_streamer.ContainerStreamer),
        job.file(data, streamer=file_streamer.FileStreamer),
    ]
    table = job.sites["site-1"].streamer.registry.reg
    for key in [key for key in table if key.startswith(PREFIX)]:
        del table[key]
    results["own receiver"] = [job.container(STATE), job.file(data)]
    job.lines.take()

    results["hostile"] = hostile(job)
    results["tables"] = [len(engine.streamer.tx_table) for engine in (job.server, *job.sites.values())]
    shared().links.stop()
    (folder / "results.json").write_text(json.dumps(results))
    for engine in (*job.sites.values(), job.server):
        engine.stop()
    os._exit(0)


def hostile(job: Job) -> dict:
    """What a sender may say to site 2: what each is answered with, and the return code that the callback got."""
    from nvflare.apis.shareable import Shareable
    from nvflare.apis.streaming import ObjectProducer

    class Says(ObjectProducer):
        def __init__(self, messages: list) -> None:
            self.messages, self.codes = iter(messages), []

        def produce(self, stream_ctx, fl_ctx):
            message = next(self.messages, None)
            said = Said(message) if isinstance(message, dict) else message
            return (None, 0.0) if message is None else (Shareable({KEY: said}), 10.0)

        def process_replies(self, replies, stream_ctx, fl_ctx):
            reply = replies["site-2"]
            self.codes.append((reply.get(KEY) or {}).get("state") or reply.get_return_code())

    start = {"do": "start", "stream": "nobody's", "timeout": 12.0}
    dict_ctx = {"ContainerStreamer.type": "dict", "ContainerStreamer.size": 3, PREFIX + "portions": 1}
    cases = {
        "nothing": ("container", dict_ctx, [None]),
        "unknown": ("container", dict_ctx, [{"do": "dance"}]),
        "no start": ("container", dict_ctx, [{"do": "wait"}]),
        "malformed start": ("container", dict_ctx, [{"do": "start", "stream": 5}]),
        "class": ("container", {**dict_ctx, "ContainerStreamer.type": "subprocess.Popen"}, [start]),
        "no class": ("container", {**dict_ctx, "ContainerStreamer.type": "no.such.thing"}, [start]),
        "size": ("container", {**dict_ctx, "ContainerStreamer.size": "many"}, [start]),
        "ends early": ("container", dict_ctx, [start, {"do": "end"}]),
        "unknown stream": ("container", dict_ctx, [start, {"do": "wait"}, {"do": "end"}]),
        "file name": (
            "file",
            {"FileStreamer.file_size": 5, "Streamer.file_name": "../x", PREFIX + "file": {}},
            [start],
        ),
        "file identity": ("file", {"FileStreamer.file_size": 5, "Streamer.file_name": "x"}, [start]),
    }
    found = {}
    for name, (topic, context, messages) in cases.items():
        job.done.clear()
        says = Says(messages)
        job.server.stream_objects(PREFIX + "app", topic, context, ["site-2"], says, job.server.new_context())
        found[name] = [says.codes, {site: ctx.get("__RC__") for site, ctx in job.done.items()}]
    return found


if __name__ == "__main__":
    main()
