"""Cells of a server's job and of a site's, whose process ends when the server asks for its result: cells_ended.py
FOLDER. What became of it is in FOLDER/results.json."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.net_agent import NetAgent
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming import absence, component, requests
from nvflare_rdma.streaming.decomposers import STATE_KEY, Served
from nvflare_rdma.transfer import patience
from tests.support.processes import free_port
from tests.support.waiting import eventually

RESULTS = {"channel": "server_command", "topic": "submit_update"}
SITE, JOB, LIVING = "site-1", "site-1.job", "site-2.job"


def start(name: str, url: str, **more: object) -> Cell:
    cell = Cell(name, url, secure=False, credentials={}, **more)
    NetAgent(cell)
    cell.start()
    return cell


def server(folder: Path) -> None:
    absence._ANSWER_SECONDS, patience._ENDED_EVERY, requests._ANSWER_SECONDS = 1.0, 0.5, {"describe": 2.0}
    component.Absences = functools.partial(absence.Absences, grace=1.0)
    url = f"tcp://127.0.0.1:{free_port()}"
    parent = start("server", url, create_internal_listener=True)
    cell = start("server.job", url, parent_url=parent.get_internal_listener_url())
    ended: list[str] = []
    got: list[float] = []
    outcomes: dict[str, str] = {}
    shared().ledger.subscribe(lambda record: outcomes.update({record.peer: record.outcome}))

    def submit(request):
        got.append(float(request.payload["w"].sum()))
        return make_reply(ReturnCode.OK)

    component.install(ended=ended.append)
    cell.register_request_cb(**RESULTS, cb=submit)
    eventually(lambda: cell.core_cell.is_cell_connected("server"))

    def run_elsewhere(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, __file__, name, url], stdin=subprocess.PIPE)

    site_s_parent, job = run_elsewhere(SITE), run_elsewhere(JOB)
    assert job.wait(60) == 0, "it has not been asked for its result"
    eventually(lambda: JOB in ended, 60)
    eventually(lambda: JOB in outcomes, 60)
    code = run_elsewhere(LIVING).wait(60)
    results = {"ended": sorted(set(ended)), "got": got, "outcomes": outcomes, "code": code}
    (folder / "results.json").write_text(json.dumps(results))
    site_s_parent.kill()
    sys.stdout.flush()
    os._exit(0)


def site(name: str, url: str) -> None:
    cell = start(name, url)
    eventually(lambda: cell.core_cell.is_cell_connected("server"))
    if name == SITE:
        sys.stdin.read()
    component.install()
    if name == JOB:
        produce = Served.produce

        def end(served, state, requester):
            if state and STATE_KEY in state:
                os._exit(0)
            return produce(served, state, requester)

        Served.produce = end
    message = new_cell_message({}, {"w": np.ones(1 << 20)})
    answer = cell.send_request(**RESULTS, target="server.job", request=message, timeout=60.0)
    os._exit(answer.get_header(MessageHeaderKey.RETURN_CODE) != ReturnCode.OK)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    if len(sys.argv) == 2:
        server(Path(sys.argv[1]))
    site(*sys.argv[1:])
