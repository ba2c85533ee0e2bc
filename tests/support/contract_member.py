"""A FLARE cell in a process of its own that takes, gives and passes on messages with arrays:

    contract_member.py NAME flare|ours URL CREDENTIALS    a site, until its stdin ends
    contract_member.py NAME parent URL CREDENTIALS        a trainer below it, as FLARE starts one

`contract_server` tells it what to do. It knows no torch, which takes long to load.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import threading

sys.modules["torch"] = None

import numpy as np  # noqa: E402
from nvflare.apis.signal import Signal  # noqa: E402
from nvflare.app_common.decomposers import numpy_decomposers  # noqa: E402
from nvflare.app_common.np.np_downloader import ArrayDownloadable  # noqa: E402
from nvflare.client.cell.bootstrap import BOOTSTRAP_FILE_ENV_VAR  # noqa: E402
from nvflare.fuel.f3.cellnet.cell import Cell  # noqa: E402
from nvflare.fuel.f3.cellnet.defs import ReturnCode  # noqa: E402
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message  # noqa: E402
from nvflare.fuel.f3.streaming.download_service import DownloadService  # noqa: E402
from nvflare.fuel.utils.fobs.decomposers.via_downloader import materialize_lazy_download_refs  # noqa: E402

from nvflare_rdma.streaming.component import install  # noqa: E402
from nvflare_rdma.streaming.trainer import hand_on  # noqa: E402
from nvflare_rdma.transfer import sender  # noqa: E402

DEADLINE = 40.0
CHANNEL = "contracts"
_LAST = 700_000


def model(kind: int) -> dict[str, np.ndarray]:
    """More than FLARE sends at a time. The size of the last array is another for each kind."""
    return {**{f"a{i}": np.full(300_000, i, np.float32) for i in range(4)}, "last": np.arange(_LAST + kind)}


def same(got: dict, kind: int) -> bool:
    sent = model(kind)
    return got.keys() == sent.keys() and all(np.array_equal(got[name], sent[name]) for name in sent)


class Gates:
    """Where the last array of a kind waits on its way out, on FLARE's path and on ours."""

    def __init__(self) -> None:
        self.made = 0  # bytes of an array, on FLARE's path
        self._shut: dict[int, threading.Event] = {}
        self._reached: dict[int, threading.Semaphore] = {}
        produce, offer = ArrayDownloadable.produce_item, sender.OfferThread._offer

        @functools.wraps(produce)
        def produce_item(it, index):
            self.made += 1
            self._wait(it.base_obj[it.keys[index]].size)
            return produce(it, index)

        @functools.wraps(offer)
        def _offer(it, wanted):
            self._wait(wanted.item.shape[0])
            return offer(it, wanted)

        ArrayDownloadable.produce_item, sender.OfferThread._offer = produce_item, _offer

    def shut(self, kind: int) -> None:
        self._reached[_LAST + kind], self._shut[_LAST + kind] = threading.Semaphore(0), threading.Event()

    def open(self, kind: int) -> None:
        self._shut[_LAST + kind].set()

    def await_reached(self, kind: int, times: int = 1) -> None:
        """``times``: on our path each receiver has an offer of its own; FLARE makes the bytes once for all."""
        for _ in range(times):
            assert self._reached[_LAST + kind].acquire(timeout=DEADLINE)

    def _wait(self, size: int) -> None:
        if size in self._shut:
            self._reached[size].release()
            self._shut[size].wait(DEADLINE)


class Member:
    """A cell, and what others may ask of it."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.gates = Gates()
        self.abort = Signal()
        for topic in ("ready", "take", "relay", "abort", "give", "shut", "reached", "died"):
            cell.register_request_cb(channel=CHANNEL, topic=topic, cb=functools.partial(self._serve, topic))
        # What comes is not downloaded before `land`, which learns how that ends.
        cell.decode_pass_through_topics |= {(CHANNEL, "take"), (CHANNEL, "relay"), (CHANNEL, "give")}
        cell.start()

    def ask(self, target: str, topic: str, timeout: float = DEADLINE, **what) -> dict:
        request = new_cell_message({}, what)
        reply = self.cell.send_request(channel=CHANNEL, topic=topic, target=target, request=request, timeout=timeout)
        return reply.payload

    def land(self, payload: dict, kind: int) -> dict:
        """Download what ``payload`` refers to: whether it is what was sent, or the error."""
        try:
            return {"same": same(materialize_lazy_download_refs(payload, self.cell, self.abort)["model"], kind)}
        except RuntimeError as error:
            return {"error": str(error)}

    def _serve(self, topic, request):
        return make_reply(ReturnCode.OK, "", getattr(self, f"on_{topic}")(**request.payload))

    def on_take(self, kind, **payload):
        self.abort = Signal()
        return self.land(payload, kind)

    def on_relay(self, kind, **payload):
        return self.ask(f"{self.cell.get_fqcn()}.trainer", "take", kind=kind, **payload)

    def on_abort(self):
        self.abort.trigger("the job was aborted")
        return {}

    def on_give(self, kind):
        return {"model": model(kind)}

    def on_ready(self):
        return {}

    def on_shut(self, kind):
        self.gates.shut(kind)
        return {}

    def on_reached(self, kind):
        self.gates.await_reached(kind)
        return {}

    def on_died(self, refs):
        """As FLARE's site job says it of its trainer."""
        source = f"{self.cell.get_fqcn()}.trainer"
        return DownloadService.notify_source_failure(self.cell, ["server"], source, refs, "the trainer has died")


def start(name: str, way: str, url: str, credentials: str = "{}", **environment: str) -> subprocess.Popen:
    command = [sys.executable, __file__, name, way, url, credentials]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **environment})


class Site(Member):
    """Has a trainer, if it is the first."""

    def __init__(self, name: str, way: str, url: str, credentials: dict[str, str]) -> None:
        super().__init__(Cell(name, url, secure=bool(credentials), credentials=credentials))
        DownloadService.initialize(self.cell)
        if way == "ours":
            install()
            hand_on(self.cell)
        if name == "site-1":
            self.cell.make_internal_listener("tcp", {"host": "localhost", "listen_host": "127.0.0.1"})
            below = self.cell.get_internal_listener_url()
            self._trainer = start(f"{name}.trainer", "parent", below, **{BOOTSTRAP_FILE_ENV_VAR: __file__})
            self.cell.register_request_cb(channel=CHANNEL, topic="kill", cb=functools.partial(self._serve, "kill"))

    def on_kill(self):
        self._trainer.kill()
        return {"status": self._trainer.wait(DEADLINE)}

    def end(self) -> None:
        if self.cell.get_fqcn() == "site-1":
            self.on_kill()


def main() -> None:
    name, way, url, credentials = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(process)d %(asctime)s %(message)s")
    numpy_decomposers.register()
    if way == "parent":
        Member(Cell(name, None, secure=False, credentials={}, parent_url=url, create_internal_listener=False))
        threading.Event().wait()  # until it is killed
    site = Site(name, way, url, json.loads(credentials))
    sys.stdin.read()
    site.end()
    os._exit(0)  # FLARE's threads would hold the process


if __name__ == "__main__":
    main()
