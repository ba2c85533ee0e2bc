"""A server's cell and a site's, each in a network of its own, with a firewall before the server that drops what comes
to its data ports: cells_apart.py FOLDER, in a network namespace in which this process may do all. What the site got is
in FOLDER/results.json: first behind the firewall, then without it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey

from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.component import install
from nvflare_rdma.transfer import dialling
from tests.support import far_cells
from tests.support.far_cells import MODEL, FarSite, reply
from tests.support.namespaces import ip

SERVER, SITE = "10.9.0.1", "10.9.0.2"
URL = f"tcp://{SERVER}:8002"
# Drops packets as a firewall does, without an answer, and needs no module of the kernel's.
FIREWALL = f"rule {{}} pref 50 iif near ipproto tcp dport {os.environ['NVFLARE_RDMA_DATA_PORTS']} blackhole"


def serve(folder: Path) -> int:
    def network(site: int) -> list[str]:
        return [
            f"link add near type veth peer name far netns {site}",
            f"address add {SERVER}/24 dev near",
            "link set near up",
            "link set lo up",
            "rule add pref 100 lookup local",  # for this machine's own addresses: the firewall comes before it
            "rule delete pref 0",
            FIREWALL.format("add"),
        ]

    answers = {"get": lambda request: reply(MODEL), "open": lambda request: reply(ip(FIREWALL.format("delete")))}
    return far_cells.serve(__file__, [str(folder)], URL, network, lambda cell: answers)


def ask(folder: Path) -> int:
    site = FarSite(URL, f"address add {SITE}/24 dev far", "link set far up", "link set lo up")
    reasons: list[str] = []
    shared().ledger.subscribe(lambda record: reasons.append(record.reason))
    dialling.ADDRESS_SECONDS = 1.0  # for a test's sake
    install()

    def get() -> dict:
        got = site.request("get")
        code, model = got.get_header(MessageHeaderKey.RETURN_CODE), got.payload
        (reason,) = reasons
        reasons.clear()
        return {"code": code, "same": torch.equal(model["w"], MODEL["w"]), "log": site.lines.take(), "reason": reason}

    results = {"firewall": get(), "again": get()}
    site.request("open")
    dialling._AVOID_SECONDS = 0.0
    results["open"] = get()
    (folder / "results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    far_cells.run(serve, ask)
