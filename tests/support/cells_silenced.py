"""A server's cell and a site's, each in a network of its own, whose connections for data are forgotten on the way while
nothing moves: cells_silenced.py FOLDER [PATIENCE], in a network namespace in which this process may do all.

What each transfer was is in FOLDER/results.json: before, and after all connections, or rails only, were forgotten, to
the site and from it. With PATIENCE, deadlines and idle times are as they are, and so many seconds pass before each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.fuel.utils import fobs

from nvflare_rdma.fabric import tcp
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.component import install
from nvflare_rdma.transfer import peers
from tests.support.namespaces import in_another_network, ip
from tests.support.two_cells import Lines, Records
from tests.support.waiting import eventually

SERVER, SITE = "10.9.0.1", "10.9.0.2"
URL = f"tcp://{SERVER}:8002"
MODEL = {"w": torch.arange(500_000).float()}
# As a NAT does that has forgotten a connection: what comes over it is dropped, either way. Needs no module of the
# kernel's. A network's own addresses are looked up after it.
FORGET = "rule add pref 50 ipproto tcp {} {} iif {} blackhole"
AFTER_THAT = ("rule add pref 100 lookup local", "rule delete pref 0")


def hasten(patience: str) -> None:
    """For a test's sake: a rail, or a link, is idle sooner, and has less time for its answer."""
    if not patience:
        peers._QUIET_SECONDS, peers._ANSWER_SECONDS = 0.2, 2.0
        tcp._IDLE_SECONDS, tcp._PROOF_SECONDS = 0.2, 2.0


def serve(folder: Path, patience: str) -> int:
    with in_another_network(__file__, str(folder), patience, "site") as site:
        assert site.stdin is not None
        ip(
            f"link add near type veth peer name far netns {site.pid}",
            f"address add {SERVER}/24 dev near",
            "link set near up",
            "link set lo up",
            *AFTER_THAT,
        )
        cell = Cell("server", URL, secure=False, credentials={})

        def forget(request):
            ip(*(FORGET.format("sport", port, "near") for port in request.payload["ports"]))
            return reply({})

        def put(request):
            return reply({"same": torch.equal(request.payload["w"], MODEL["w"])})

        for topic, answer in (("get", lambda request: reply(MODEL)), ("put", put), ("forget", forget)):
            cell.register_request_cb(channel="test", topic=topic, cb=answer)
        cell.start()
        install()
        print("go", file=site.stdin, flush=True)
        return site.wait()


def reply(payload: dict):
    return make_reply(ReturnCode.OK, "", payload)


class Site:
    def __init__(self, patience: str) -> None:
        self.patience = float(patience or 0.5)
        self.lines, self.records = Lines(), Records()
        logging.getLogger("nvflare_rdma").addHandler(self.lines)
        self.cell = Cell("site-1", URL, secure=False, credentials={})
        self.cell.start()
        eventually(lambda: self.cell.core_cell.is_cell_connected("server"))
        install()

    def request(self, topic: str, payload: dict):
        answer = self.cell.send_request(
            channel="test", topic=topic, target="server", request=new_cell_message({}, payload), timeout=400.0
        )
        assert answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK, answer.headers
        return answer.payload

    def move(self, topic: str) -> dict:
        began = time.monotonic()
        if topic == "get":
            same = torch.equal(self.request("get", {})["w"], MODEL["w"])
        else:
            same = self.request("put", MODEL)["same"]
        seconds = time.monotonic() - began
        (record,) = eventually(lambda: self.records.records)
        self.records.take()
        lines = self.lines.take()
        print(f"{topic}: {seconds:.1f} s", *lines, sep="\n    ", file=sys.stderr)
        return {"same": same, "path": record["path"], "seconds": seconds, "log": lines, "link": self.ports()[0]}

    def ports(self) -> list[int]:
        """This end's of the link's control stream, and of its rails."""
        link = shared().links.of(self.cell).find("server")
        sockets = [link._stream._sock, *link._rails.endpoint._sockets.values()]
        return [sock.getsockname()[1] for sock in sockets]

    def forget(self, ports: list[int]) -> None:
        time.sleep(self.patience)  # nothing moves for a while
        ip(*(FORGET.format("dport", port, "far") for port in ports))
        self.request("forget", {"ports": ports})


def ask(folder: Path, patience: str) -> int:
    print("ready", flush=True)
    assert sys.stdin.readline() == "go\n"
    ip(f"address add {SITE}/24 dev far", "link set far up", "link set lo up", *AFTER_THAT)
    os.environ["NVFLARE_RDMA_DATA_PORTS"] = "none"  # behind the NAT nobody listens
    site = Site(patience)
    results = {"before": site.move("get")}
    for topic in ("get", "put"):
        site.forget(site.ports())
        results[f"all, {topic}"] = site.move(topic)
    for topic in ("get", "put"):
        site.forget(site.ports()[1:])
        results[f"rails, {topic}"] = site.move(topic)
    (folder / "results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    status = 1
    try:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        fobs.register(TensorDecomposer)
        where, seconds, which = [*sys.argv[1:], "", ""][:3]
        hasten(seconds)
        status = (ask if which else serve)(Path(where), seconds)
    except BaseException:  # noqa: BLE001 - it is shown
        traceback.print_exc()
    os._exit(status)  # FLARE's threads would hold the process
