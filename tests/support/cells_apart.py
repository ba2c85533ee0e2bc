"""A server's cell and a site's, each in a network of its own, with a firewall before the server that drops what comes
to its data ports: cells_apart.py FOLDER, in a network namespace in which this process may do all. What the site got is
in FOLDER/results.json: first behind the firewall, then without it."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.fuel.utils import fobs

from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.component import install
from nvflare_rdma.transfer import peers
from tests.support.namespaces import in_another_network, ip
from tests.support.two_cells import Lines
from tests.support.waiting import eventually

SERVER, SITE = "10.9.0.1", "10.9.0.2"
URL = f"tcp://{SERVER}:8002"
MODEL = {"w": torch.arange(500_000).float()}
# Drops packets as a firewall does, without an answer, and needs no module of the kernel's.
FIREWALL = f"rule {{}} pref 50 iif near ipproto tcp dport {os.environ['NVFLARE_RDMA_DATA_PORTS']} blackhole"


def serve(folder: Path) -> int:
    with in_another_network(__file__, str(folder), "site") as site:
        assert site.stdin is not None
        ip(
            f"link add near type veth peer name far netns {site.pid}",
            f"address add {SERVER}/24 dev near",
            "link set near up",
            "link set lo up",
            "rule add pref 100 lookup local",  # for this machine's own addresses: the firewall comes before it
            "rule delete pref 0",
            FIREWALL.format("add"),
        )
        cell = Cell("server", URL, secure=False, credentials={})
        cell.register_request_cb(channel="test", topic="get", cb=lambda request: reply(MODEL))
        cell.register_request_cb(channel="test", topic="open", cb=lambda request: reply(ip(FIREWALL.format("delete"))))
        cell.start()
        install()
        print("go", file=site.stdin, flush=True)
        return site.wait()


def reply(payload: dict | None):
    return make_reply(ReturnCode.OK, "", payload)


def ask(folder: Path) -> int:
    print("ready", flush=True)
    assert sys.stdin.readline() == "go\n"
    ip(f"address add {SITE}/24 dev far", "link set far up", "link set lo up")
    lines, reasons = Lines(), []
    logging.getLogger("nvflare_rdma").addHandler(lines)
    shared().ledger.subscribe(lambda record: reasons.append(record.reason))
    cell = Cell("site-1", URL, secure=False, credentials={})
    cell.start()
    eventually(lambda: cell.core_cell.is_cell_connected("server"))
    peers._ADDRESS_SECONDS = 1.0  # for a test's sake
    install()

    def request(topic: str):
        message = new_cell_message({}, {})
        return cell.send_request(channel="test", topic=topic, target="server", request=message, timeout=60.0)

    def get() -> dict:
        got = request("get")
        code, model = got.get_header(MessageHeaderKey.RETURN_CODE), got.payload
        (reason,) = reasons
        reasons.clear()
        return {"code": code, "same": torch.equal(model["w"], MODEL["w"]), "log": lines.take(), "reason": reason}

    results = {"firewall": get(), "again": get()}
    request("open")
    peers._AVOID_SECONDS = 0.0
    results["open"] = get()
    (folder / "results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    status = 1
    try:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        fobs.register(TensorDecomposer)
        status = (ask if sys.argv[2:] else serve)(Path(sys.argv[1]))
    except BaseException:  # noqa: BLE001 - it is shown
        traceback.print_exc()
    os._exit(status)  # FLARE's threads would hold the process
