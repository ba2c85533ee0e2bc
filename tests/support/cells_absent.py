"""A server's cell, a site's and its job's, each in a process of its own, of which the last two end one after the other;
and a result that takes longer than the request that brings it: cells_absent.py FOLDER. What happened is in
FOLDER/results.json."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.net_agent import NetAgent
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from nvflare_rdma.flare_compat import answers, connected_to, wait_for_results
from nvflare_rdma.streaming import absence
from nvflare_rdma.streaming.absence import Absences
from tests.support.processes import free_port
from tests.support.waiting import eventually

#: Calls of `moving` until the server answers.
CALLS = 3


def start(name: str, url: str, **more: object) -> Cell:
    cell = Cell(name, url, secure=False, credentials={}, **more)
    NetAgent(cell)
    cell.start()
    return cell


def run_elsewhere(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__, *arguments], stdin=pipe, stdout=pipe, text=True)


def server(folder: Path) -> None:
    absence._ANSWER_SECONDS = 2.0
    url = f"tcp://127.0.0.1:{free_port()}"
    cell = start("server", url)
    result: Future = Future()
    requests = []

    def submit(request):
        requests.append(request)
        return result

    cell.register_request_cb(channel="server_command", topic="submit_update", cb=submit)
    cell.register_request_cb(channel="test", topic="over", cb=lambda _: result.set_result(make_reply(ReturnCode.OK)))
    site = run_elsewhere("site-1", url)
    assert site.stdout is not None
    job = run_elsewhere("site-1.job", url, site.stdout.readline().strip())
    at_once, patient = Absences(cell, 0.0), Absences(cell, 3600.0)
    eventually(lambda: answers(cell, "site-1.job", 1.0) and answers(cell, "site-1", 1.0))
    found = {"both": at_once.has_ended("site-1.job"), "root": at_once.has_ended("site-1")}
    result.result(60)
    found["requests"] = len(requests)
    eventually(lambda: "site-1.job" in (connected_to(cell, "site-1", 1.0) or []))
    job.send_signal(signal.SIGSTOP)
    found["stopped"] = at_once.has_ended("site-1.job")
    job.kill()
    eventually(lambda: "site-1.job" not in (connected_to(cell, "site-1", 1.0) or ["site-1.job"]))
    eventually(lambda: not answers(cell, "site-1.job", 1.0))
    # A parent that takes too long for its answer is asked again, as `Absences` has it.
    found["parent"] = eventually(lambda: at_once.has_ended("site-1.job"))
    found["for now"] = patient.has_ended("site-1.job")
    site.kill()
    eventually(lambda: not answers(cell, "site-1", 1.0))
    found["neither"] = at_once.has_ended("site-1.job")
    (folder / "results.json").write_text(json.dumps(found))
    os._exit(0)


def hand_in(cell: Cell) -> None:
    """A result that takes longer than the request's time; `moving` says that it is on its way."""
    calls = 0

    def moving() -> bool:
        nonlocal calls
        calls += 1
        if calls == CALLS:
            cell.fire_and_forget(channel="test", topic="over", targets="server", message=new_cell_message({}, {}))
        return calls <= CALLS

    wait_for_results(cell, moving)
    wait_for_results(cell, lambda: False)  # the second time it does nothing
    message = new_cell_message({}, {})
    where = {"channel": "server_command", "target": "server", "topic": "submit_update"}
    answer = cell.send_request(**where, request=message, timeout=1.0)
    assert answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK, answer.headers


if __name__ == "__main__":
    if len(sys.argv) == 2:
        server(Path(sys.argv[1]))
    if sys.argv[1] == "site-1":
        made = start("site-1", sys.argv[2], create_internal_listener=True)
        print(made.get_internal_listener_url(), flush=True)
    else:
        made = start(sys.argv[1], sys.argv[2], parent_url=sys.argv[3])
    eventually(lambda: answers(made, "server", 1.0))
    if sys.argv[1] == "site-1.job":
        hand_in(made)
    sys.stdin.read()
    os._exit(0)
