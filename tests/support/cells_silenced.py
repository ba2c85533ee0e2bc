"""A server's cell and a site's, each in a network of its own, whose connections for data are forgotten on the way while
nothing moves: cells_silenced.py FOLDER [PATIENCE], in a network namespace in which this process may do all.

What each transfer was is in FOLDER/results.json: before, and after all connections, or rails only, were forgotten, to
the site and from it. With PATIENCE, deadlines and idle times are as they are, and so many seconds pass before each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode

from nvflare_rdma.fabric import tcp
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.component import install
from nvflare_rdma.transfer import peers
from tests.support import far_cells
from tests.support.far_cells import MODEL, FarSite, reply
from tests.support.namespaces import ip
from tests.support.two_cells import Records
from tests.support.waiting import eventually

SERVER, SITE = "10.9.0.1", "10.9.0.2"
URL = f"tcp://{SERVER}:8002"
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
    hasten(patience)

    def network(site: int) -> list[str]:
        return [
            f"link add near type veth peer name far netns {site}",
            f"address add {SERVER}/24 dev near",
            "link set near up",
            "link set lo up",
            *AFTER_THAT,
        ]

    def forget(request):
        ip(*(FORGET.format("sport", port, "near") for port in request.payload["ports"]))
        return reply({})

    def put(request):
        return reply({"same": torch.equal(request.payload["w"], MODEL["w"])})

    answers = {"get": lambda request: reply(MODEL), "put": put, "forget": forget}
    return far_cells.serve(__file__, [str(folder), patience], URL, network, lambda cell: answers)


class Site(FarSite):
    def __init__(self, patience: str) -> None:
        super().__init__(URL, f"address add {SITE}/24 dev far", "link set far up", "link set lo up", *AFTER_THAT)
        self.patience = float(patience or 0.5)
        self.records = Records()
        install()

    def ask(self, topic: str, payload: dict):
        answer = self.request(topic, payload, timeout=400.0)
        assert answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK, answer.headers
        return answer.payload

    def move(self, topic: str) -> dict:
        began = time.monotonic()
        same = torch.equal(self.ask("get", {})["w"], MODEL["w"]) if topic == "get" else self.ask("put", MODEL)["same"]
        seconds = time.monotonic() - began
        (record,) = eventually(lambda: self.records.records)
        self.records.take()
        lines = self.lines.take()
        print(f"{topic}: {seconds:.1f} s", *lines, sep="\n    ", file=sys.stderr)
        return {"same": same, "path": record["path"], "seconds": seconds, "log": lines, "link": self.ports()[0]}

    def ports(self) -> list[int]:
        """This end's of the link's control stream, and of its rails that have not broken."""
        link = shared().links.of(self.cell).find("server")
        endpoint = link._rails.endpoint
        rails = [sock for rail, sock in endpoint._sockets.items() if rail not in endpoint._down]
        sockets = [link._stream._sock, *rails]
        return [sock.getsockname()[1] for sock in sockets]

    def forget(self, ports: list[int]) -> None:
        time.sleep(self.patience)  # nothing moves for a while
        ip(*(FORGET.format("dport", port, "far") for port in ports))
        self.ask("forget", {"ports": ports})


def ask(folder: Path, patience: str) -> int:
    hasten(patience)
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
    far_cells.run(serve, ask, "")
