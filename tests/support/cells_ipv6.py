"""A server's cell and a site's, each in a network of its own that has IPv6 only, with the driver between them:
cells_ipv6.py FOLDER, in a network namespace in which this process may do all, and mount. What moved between them, and
what the site and the server logged, is in FOLDER/results.json."""

from __future__ import annotations

import json
import logging
import os
import subprocess
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
from tests.support.namespaces import in_another_network, ip
from tests.support.two_cells import Lines, Records
from tests.support.waiting import eventually

SERVER, SITE = "fd00:9::1", "fd00:9::2"
#: As a name server tells of a host in two networks: only one of its addresses is here.
HOSTS = f"10.9.0.1 flserver\n{SERVER} flserver\n127.0.0.1 localhost\n"
URL = "rdma://flserver:8002"
MODEL = {"w": torch.arange(500_000).float()}


def log_lines() -> Lines:
    lines = Lines()
    logging.getLogger("nvflare_rdma").addHandler(lines)
    return lines


def serve(folder: Path) -> int:
    hosts = folder / "hosts"
    hosts.write_text(HOSTS)
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True, timeout=20)
    with in_another_network(__file__, str(folder), "site") as site:
        assert site.stdin is not None
        ip(
            f"link add near type veth peer name far netns {site.pid}",
            f"address add {SERVER}/64 dev near nodad",
            "link set near up",
            "link set lo up",
        )
        lines = log_lines()
        cell = Cell("server", URL, secure=False, credentials={})

        def put(request):
            named = shared().links.of(cell).invite("site-2")["hosts"]
            return reply({"same": torch.equal(request.payload["w"], MODEL["w"]), "log": lines.take(), "named": named})

        for topic, answer in (("get", lambda request: reply(MODEL)), ("put", put)):
            cell.register_request_cb(channel="test", topic=topic, cb=answer)
        cell.start()
        install()
        print("go", file=site.stdin, flush=True)
        return site.wait()


def reply(payload: dict):
    return make_reply(ReturnCode.OK, "", payload)


def ask(folder: Path) -> int:
    print("ready", flush=True)
    assert sys.stdin.readline() == "go\n"
    ip(f"address add {SITE}/64 dev far nodad", "link set far up", "link set lo up")
    lines, records = log_lines(), Records()
    cell = Cell("site-1", URL, secure=False, credentials={})
    cell.start()
    eventually(lambda: cell.core_cell.is_cell_connected("server"))
    install()

    def request(topic: str, payload: dict):
        message = new_cell_message({}, payload)
        answer = cell.send_request(channel="test", topic=topic, target="server", request=message, timeout=60.0)
        assert answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK, answer.headers
        return answer.payload

    got = request("get", {})
    link = shared().links.of(cell).find("server")
    results = {
        "get": torch.equal(got["w"], MODEL["w"]),
        "to": link._stream._sock.getpeername()[0] if link is not None else "",
        "frames": cell.core_cell.agents["server"].endpoint.conn_props["peer_addr"],
        "put": request("put", MODEL),
    }
    results["paths"] = [record["path"] for record in eventually(lambda: records.records[1:] and records.take())]
    (folder / "results.json").write_text(json.dumps({**results, "log": lines.take()}))
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
