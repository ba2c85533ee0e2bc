"""Two FLARE cells that send each other tensors: two_cells.py FOLDER [CREDENTIALS]. What happened is in
FOLDER/results.json; CREDENTIALS is JSON of each cell's, for TLS between them.

One process, as FLARE's own tests have it; the bytes still go through sockets or shared memory.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from nvflare.apis.signal import Signal
from nvflare.app_common.utils.tensor_disk_offload_context import _TENSOR_DISK_OFFLOAD_ROOT_DIR
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.fuel.f3.streaming.download_service import OBJ_DOWNLOADER_CHANNEL
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import FOBSContextKey

from nvflare_rdma.accumulate import is_encoded_tensor
from nvflare_rdma.codecs import get_codec, was_decoded
from nvflare_rdma.codecs.marks import marked
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.component import install
from nvflare_rdma.transfer.sender import OfferThread
from tests.support.encoded import as_encoded
from tests.support.processes import free_port
from tests.support.waiting import eventually

MODEL = {
    **{f"w{i}": torch.randn(500, 1000) for i in range(5)},
    "bfloat16": torch.randn(300, 300).bfloat16(),
    "scalar": torch.tensor(5.0),
    "empty": torch.empty(0, 4),
    "array": np.arange(500_000),
    "half": np.ones((3, 5), np.float16),
}


#: To be encoded on its way.
WEIGHTS = torch.randn(800, 1000)
FEW_BITS = {"w": marked(WEIGHTS, get_codec("normfloat4")), "b": torch.ones(3)}
#: What comes of them, in full precision.
RAW = torch.from_numpy(as_encoded(WEIGHTS, "normfloat4")).reshape(WEIGHTS.shape)
#: Together no more than a description may have in it.
ADAPTER = {f"w{i}": torch.full((8, 768), float(i)) for i in range(10)}
#: Small tensors, which are more than that together.
MANY = {f"w{i}": marked(torch.randn(100, 100 + i), get_codec("normfloat4")) for i in range(60)}
#: What the codec can't carry: it is sent exact.
DIVERGED = torch.randn(400, 1000)
DIVERGED[399, 999] = torch.nan


#: Of 8 and 4 bits, not encoded by anybody here.
NARROW = {
    name: torch.randint(0, 256, (300, 400), dtype=torch.uint8).view(getattr(torch, name))
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
}


def same(got: dict) -> bool:
    def equal(a, b) -> bool:
        if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool(torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b))

    return got.keys() == MODEL.keys() and all(equal(got[name], MODEL[name]) for name in MODEL)


class Lines(logging.Handler):
    """What this package has logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken


class Records:
    """What the transfers of both cells have done."""

    def __init__(self) -> None:
        self.records: list[dict] = []
        shared().ledger.subscribe(lambda record: self.records.append(record.as_dict()))

    def take(self) -> list[dict]:
        taken, self.records = self.records, []
        return taken


class Pair:
    def __init__(self, credentials: dict[str, dict[str, str]]) -> None:
        secure = bool(credentials)
        url = f"{'stcp' if secure else 'tcp'}://127.0.0.1:{free_port()}"
        self.server = Cell("server", url, secure=secure, credentials=credentials.get("server", {}))
        self.site = Cell("site-1", url, secure=secure, credentials=credentials.get("site-1", {}))
        for cell in (self.server, self.site):
            cell.start()
        eventually(lambda: self.site.core_cell.is_cell_connected("server"))
        self.got: dict = {}
        self.begin()
        self.server.register_request_cb(channel="test", topic="get", cb=lambda request: self.reply({"model": MODEL}))
        self.server.register_request_cb(channel="test", topic="few", cb=lambda request: self.reply(FEW_BITS))
        self.server.register_request_cb(channel="test", topic="adapter", cb=lambda request: self.reply(ADAPTER))
        self.server.register_request_cb(channel="test", topic="many", cb=lambda request: self.reply(MANY))
        self.server.register_request_cb(channel="test", topic="narrow", cb=lambda request: self.reply(NARROW))
        self.server.register_request_cb(channel="test", topic="put", cb=self.put)
        self.server.register_request_cb(channel="test", topic="put few", cb=self.put_few_bits)

    @staticmethod
    def reply(payload: dict):
        return make_reply(ReturnCode.OK, "", payload)

    def put(self, request):
        return self.reply({"same": same(request.payload["model"])})

    def put_few_bits(self, request):
        """What the server has got, and what it adds of it, as an aggregator does."""
        got, wanted = request.payload, torch.ones_like(WEIGHTS)
        wanted.add_(RAW, alpha=0.5)
        result = {
            "encoded": {name: is_encoded_tensor(value) for name, value in got.items()},
            "held": shared().holdings.held,
            "on disk": shared().holdings.on_disk,
            "noted": was_decoded(got["w"]),
            "sum": torch.equal(torch.ones_like(WEIGHTS).add_(got["w"], alpha=0.5), wanted),
            "exact": bool(torch.equal(got["diverged"].clone().nan_to_num(), DIVERGED.nan_to_num())),
        }
        return self.reply({**result, "figures": shared().holdings.take()})

    def begin(self) -> None:
        """Have `finished` and `done` tell of the server's next message, and of no earlier one: one that was aborted may
        end only when the next has begun, or never."""
        self.finished, self.done = finished, done = threading.Event(), []

        def complete(tx_id: str, status: str, objects: list) -> None:
            done.append([status, len(objects)])
            finished.set()

        self.server.update_fobs_context({FOBSContextKey.DOWNLOAD_COMPLETE_CB: complete})

    def get(self, abort: Signal | None = None, secure: bool = False) -> dict:
        """``secure``: as FLARE has it, encrypted from end to end."""
        self.begin()
        reply = self.site.send_request(
            channel="test",
            topic="get",
            target="server",
            request=new_cell_message({}, {}),
            timeout=60.0,
            abort_signal=abort,
            secure=secure,
        )
        result = {"code": reply.get_header(MessageHeaderKey.RETURN_CODE)}
        if isinstance(reply.payload, dict):
            result["same"] = same(reply.payload["model"])
            result["finished"] = self.finished.wait(30.0) and self.done[-1]
        return result

    def get_few_bits(self) -> dict:
        self.begin()
        request = new_cell_message({}, {})
        reply = self.site.send_request(channel="test", topic="few", target="server", request=request, timeout=60.0)
        got = reply.payload["w"]
        decoded = {name: was_decoded(value) for name, value in reply.payload.items()}
        result = {"kind": type(got).__name__, "finished": self.finished.wait(30.0), "decoded": decoded}
        if result["kind"] != "Tensor":
            result["files"] = sum(len(files) for _, _, files in os.walk(self.folder))
            got = got.materialize()
        return {**result, "error": float((got - WEIGHTS).abs().max())}

    def get_many(self) -> dict:
        self.begin()
        request = new_cell_message({}, {})
        reply = self.site.send_request(channel="test", topic="many", target="server", request=request, timeout=60.0)
        error = max(float((reply.payload[name] - tensor).abs().max()) for name, tensor in MANY.items())
        return {"error": error, "count": len(reply.payload), "finished": self.finished.wait(30.0)}

    def get_narrow(self) -> dict:
        self.begin()
        request = new_cell_message({}, {})
        try:
            reply = self.site.send_request(
                channel="test", topic="narrow", target="server", request=request, timeout=60.0
            )
        except Exception as error:  # noqa: BLE001 - whatever FLARE makes of it
            return {"failed": str(error)}
        finally:
            assert self.finished.wait(30.0)

        def equal(name: str, tensor: torch.Tensor) -> bool:
            got = reply.payload[name]
            got = got.materialize() if type(got).__name__ == "_LazyRef" else got
            as_it_was = got.dtype == tensor.dtype and got.shape == tensor.shape
            return as_it_was and torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))

        return {
            "same": {name: equal(name, tensor) for name, tensor in NARROW.items()},
            "kind": type(reply.payload["float8_e4m3fn"]).__name__,
        }

    def get_few_bits_to_disk(self) -> dict:
        return self.to_disk(self.get_few_bits)

    def to_disk(self, get: Callable[[], dict]) -> dict:
        """As a workflow with ``enable_tensor_disk_offload`` has it."""
        self.folder = tempfile.mkdtemp(dir=sys.argv[1])
        to_disk = {FOBSContextKey.TENSOR_DISK_OFFLOAD: True, _TENSOR_DISK_OFFLOAD_ROOT_DIR: self.folder}
        self.site.update_fobs_context(to_disk)
        try:
            result = get()
            gc.collect()
            return {**result, "left": os.listdir(self.folder)}
        finally:
            self.site.update_fobs_context(dict.fromkeys(to_disk))

    def asked_of_the_sender(self, topic: str) -> list[list[str]]:
        """Pull one message, and give the requests about its download that the site sends: "plain" for one that is a
        single message, "stream" for one that FLARE makes a byte stream of. What expects no answer is not counted."""
        asked: list[str] = []

        def note(message) -> None:
            headers = message.headers
            if headers.get(StreamHeaderKey.CHANNEL) == OBJ_DOWNLOADER_CHANNEL:
                if headers.get(StreamHeaderKey.STREAM_REQ_ID) and not headers.get(StreamHeaderKey.SEQUENCE):
                    asked.append("stream")
            elif headers.get(MessageHeaderKey.CHANNEL) == OBJ_DOWNLOADER_CHANNEL:
                asked.append("plain")

        self.begin()
        self.site.core_cell.add_outgoing_request_filter("*", "*", note)
        request = new_cell_message({}, {})
        self.site.send_request(channel="test", topic=topic, target="server", request=request, timeout=60.0)
        self.finished.wait(30.0)
        return list(asked)

    def send(self) -> dict:
        request = new_cell_message({}, {"model": MODEL})
        reply = self.site.send_request(channel="test", topic="put", target="server", request=request, timeout=60.0)
        return reply.payload

    def send_few_bits(self) -> dict:
        return self.send_result({**FEW_BITS, "diverged": marked(DIVERGED, get_codec("normfloat4"))})

    def send_large(self) -> dict:
        """More than a server has memory for whose budget is a MiB, in full precision."""
        shared().holdings.start(1 << 20)
        return self.send_result({"w": RAW, "b": torch.ones(3), "diverged": DIVERGED})

    def send_result(self, payload: dict) -> dict:
        request = new_cell_message({}, payload)
        reply = self.site.send_request(channel="test", topic="put few", target="server", request=request, timeout=60.0)
        return reply.payload


def main() -> None:
    fobs.register(TensorDecomposer)
    lines = Lines()
    logging.getLogger("nvflare_rdma").addHandler(lines)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    pair, results, records = Pair(json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}), {}, Records()
    install()
    theirs, own = shared().links.of(pair.server), shared().links.of(pair.site)
    known = shared().links._links

    events: list[dict] = []
    pair.site.update_fobs_context({FOBSContextKey.STREAM_PROGRESS_CB: lambda **event: events.append(event)})
    results["down"] = {**pair.get(), "log": lines.take(), "records": records.take()}
    results["progress"] = [
        {key: event[key] for key in ("transfer_id", "sequence", "bytes_done", "items_done", "state")}
        for event in events
    ]
    pair.site.update_fobs_context({FOBSContextKey.STREAM_PROGRESS_CB: None})
    results["again"] = {**pair.get(), "log": lines.take(), "records": records.take()}
    if len(sys.argv) > 2 and json.loads(sys.argv[2]):
        results["encrypted"] = {**pair.get(secure=True), "log": lines.take(), "records": records.take()}
    results["few bits"] = {**pair.get_few_bits(), "records": records.take()}
    results["many"] = {**pair.get_many(), "records": records.take()}
    results["asked"] = {topic: pair.asked_of_the_sender(topic) for topic in ("few", "adapter")}
    records.take()
    results["few bits on disk"] = {**pair.get_few_bits_to_disk(), "records": records.take(), "log": lines.take()}
    results["narrow"], results["narrow on disk"] = pair.get_narrow(), pair.to_disk(pair.get_narrow)
    lines.take(), records.take()
    results["few bits up"] = pair.send_few_bits()
    shared().holdings.start(1 << 26)
    results["few bits up, to be added"] = pair.send_few_bits()
    results["full precision up, to be added"] = pair.send_large()
    results["few bits to a site"] = pair.get_few_bits()
    gc.collect()
    results["held afterwards"] = shared().holdings.held + shared().holdings.on_disk
    shared().holdings.stop()
    shared().holdings.stop()
    lines.take(), records.take()
    results["up"] = {**pair.send(), "log": lines.take(), "records": records.take()}

    knows, OfferThread.has_arrived = OfferThread.has_arrived, lambda self, timeout: False
    results["a sender that has not heard what arrived"] = {**pair.get(), "log": lines.take()}
    OfferThread.has_arrived = knows
    records.take()

    abort = Signal()
    props = {FOBSContextKey.STREAM_PROGRESS_CB: lambda **event: abort.trigger("the job was aborted")}
    pair.site.update_fobs_context(props)
    try:
        results["aborted"] = pair.get(abort)
    except RuntimeError as error:
        results["aborted"] = {"error": str(error), "records": records.take()}
    pair.site.update_fobs_context({FOBSContextKey.STREAM_PROGRESS_CB: None})

    known["site-1"] = None
    results["a receiver without this package"] = {**pair.get(), "log": lines.take(), "records": records.take()}
    known["site-1"] = own
    known["server"] = None
    results["a sender that has ended its channels"] = {**pair.get(), "log": lines.take(), "records": records.take()}
    results["narrow without a direct way"] = {**pair.get_narrow(), "log": lines.take()}
    records.take()
    known["server"] = theirs
    shared().links.stop()
    os.environ["NVFLARE_RDMA_DATA_PORTS"] = "none"
    install()
    results["no door on either side"] = {**pair.get(), "log": lines.take(), "records": records.take()}

    results["many relayed"] = {**pair.get_many(), "records": records.take()}
    shared().holdings.start(1 << 26)
    results["few bits relayed, to be added"] = pair.send_few_bits()
    shared().holdings.stop()
    records.take()
    results["few bits relayed"] = {**pair.get_few_bits(), "records": records.take()}
    results["few bits relayed to disk"] = {**pair.get_few_bits_to_disk(), "records": records.take()}

    results["narrow relayed"], results["narrow relayed to disk"] = pair.get_narrow(), pair.to_disk(pair.get_narrow)
    (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001 - it is shown
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # FLARE's threads would hold the process
