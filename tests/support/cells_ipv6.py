"""A server's cell and a site's, each in a network of its own that has IPv6 only, with the driver between them:
cells_ipv6.py FOLDER, in a network namespace in which this process may do all, and mount. What moved between them, and
what the site and the server logged, is in FOLDER/results.json."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode

from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.component import install
from tests.support import far_cells
from tests.support.far_cells import MODEL, FarSite, log_lines, reply
from tests.support.two_cells import Records
from tests.support.waiting import eventually

SERVER, SITE = "fd00:9::1", "fd00:9::2"
#: As a name server tells of a host in two networks: only one of its addresses is here.
HOSTS = f"10.9.0.1 flserver\n{SERVER} flserver\n127.0.0.1 localhost\n"
URL = "rdma://flserver:8002"


def serve(folder: Path) -> int:
    hosts = folder / "hosts"
    hosts.write_text(HOSTS)
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True, timeout=20)

    def network(site: int) -> list[str]:
        return [
            f"link add near type veth peer name far netns {site}",
            f"address add {SERVER}/64 dev near nodad",
            "link set near up",
            "link set lo up",
        ]

    def topics(cell: Cell) -> dict:
        lines = log_lines()

        def put(request):
            named = shared().links.of(cell).invite("site-2")["hosts"]
            return reply({"same": torch.equal(request.payload["w"], MODEL["w"]), "log": lines.take(), "named": named})

        return {"get": lambda request: reply(MODEL), "put": put}

    return far_cells.serve(__file__, [str(folder)], URL, network, topics)


def ask(folder: Path) -> int:
    site, records = FarSite(URL, f"address add {SITE}/64 dev far nodad", "link set far up", "link set lo up"), Records()
    install()

    def request(topic: str, payload: dict):
        answer = site.request(topic, payload)
        assert answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK, answer.headers
        return answer.payload

    got = request("get", {})
    link = shared().links.of(site.cell).find("server")
    results = {
        "get": torch.equal(got["w"], MODEL["w"]),
        "to": link._stream._sock.getpeername()[0] if link is not None else "",
        "frames": site.cell.core_cell.agents["server"].endpoint.conn_props["peer_addr"],
        "put": request("put", MODEL),
    }
    results["paths"] = [record["path"] for record in eventually(lambda: records.records[1:] and records.take())]
    (folder / "results.json").write_text(json.dumps({**results, "log": site.lines.take()}))
    return 0


if __name__ == "__main__":
    far_cells.run(serve, ask)
