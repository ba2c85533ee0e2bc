"""What FLARE promises of messages with arrays, between a server, two sites and a trainer: contract_server.py FOLDER
flare|ours [CREDENTIALS]. What happened is in FOLDER/results.json; CREDENTIALS is JSON of each cell's, for TLS.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nvflare.app_common.decomposers import numpy_decomposers
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.streaming.download_service import DownloadService
from nvflare.fuel.utils.fobs import FOBSContextKey
from nvflare.fuel.utils.fobs.decomposers.via_downloader import _collect_lazy_download_refs

from nvflare_rdma.runtime import this_runtime
from nvflare_rdma.streaming.component import install
from tests.support.contract_member import CHANNEL, DEADLINE, Member, model, start
from tests.support.processes import free_port
from tests.support.waiting import eventually

TRAINER = "site-1.trainer"
EVERYONE, ABORTED, BUDGETS, PASSED, GIVEN, DIED = range(6)
#: A receiver may not begin, or may do nothing, for so many seconds.
LIMITS = {"NVFLARE_STREAMING_RECEIVER_ACQUIRE_TIMEOUT": "3", "NVFLARE_STREAMING_RECEIVER_IDLE_TIMEOUT": "3"}


class Server(Member):
    def __init__(self, url: str, credentials: dict[str, str]) -> None:
        super().__init__(Cell("server", url, secure=bool(credentials), credentials=credentials))
        self._pool = ThreadPoolExecutor(8)
        self._events: list[dict] = []
        self._done: dict[int, list] = {}
        own = {FOBSContextKey.DOWNLOAD_COMPLETE_CB: self._complete, FOBSContextKey.STREAM_PROGRESS_CB: self._progress}
        self.cell.update_fobs_context(own)
        DownloadService.initialize(self.cell)

    def _complete(self, tx_id: str, status: str, objects: list) -> None:
        sizes = {array.size for thing in objects for array in thing.values()}
        self._done.setdefault(max(sizes) - model(0)["last"].size, []).append((tx_id, status))

    def _progress(self, **event) -> None:
        self._events.append(event)

    def send(self, kind: int, *targets: str, topic: str = "take") -> Future:
        """Each target's answer, later."""

        def broadcast() -> dict:
            headers = {MessageHeaderKey.PASS_THROUGH: topic == "relay"}  # then others are the receivers
            request = new_cell_message(headers, {"kind": kind, "model": model(kind)})
            kinds = {"channel": CHANNEL, "topic": topic, "targets": list(targets), "timeout": DEADLINE}
            return {
                name: reply.payload for name, reply in self.cell.broadcast_request(request=request, **kinds).items()
            }

        return self._pool.submit(broadcast)

    def outcome(self, kind: int) -> dict:
        """Of the one transaction for a message of this kind, once it is over."""
        eventually(lambda: self._done.get(kind), DEADLINE)
        [(tx_id, status)] = self._done[kind]
        outcome = eventually(lambda: DownloadService.get_transaction_outcome(tx_id), DEADLINE)
        [ref] = outcome.refs
        events = [event for event in self._events if event["transfer_id"] == ref.ref_id]
        progress: dict = {}
        for event in events:
            progress.setdefault(event["receiver_id"], []).append((event["sequence"], event["bytes_done"]))
        rises = all(a < b and c <= d for told in progress.values() for (a, c), (b, d) in itertools.pairwise(told))
        last = {event["receiver_id"]: [event["state"], event["bytes_done"]] for event in events}
        return {
            "callback": status,
            "outcome": outcome.status,
            "receivers": dict(ref.receiver_statuses),
            "progress": last,
            "rises": rises,
        }

    def failed_so_far(self, kind: int) -> list[str]:
        """Receivers that a transaction that is not over knows to have failed."""
        with DownloadService._tx_lock:
            refs = [ref for tx in DownloadService._tx_table.values() for ref in tx.snapshot_refs()]
        found = [ref for ref in refs if model(kind)["last"].size in {a.size for a in ref.obj.base_obj.values()}]
        return [
            name for ref in found for name, status in ref.snapshot_receiver_statuses().items() if status == "failed"
        ]

    def pull(self, kind: int) -> tuple[Future, list[str]]:
        """Have the trainer send: what it comes to, later, and FLARE's references."""
        payload, refs = self.ask(TRAINER, "give", kind=kind), []
        _collect_lazy_download_refs(payload, refs, set())
        return self._pool.submit(self.land, payload, kind), sorted({ref.ref_id for ref in refs})


def run(server: Server, sites: dict, offers: int) -> dict:
    """``offers``: of an array that two sites receive."""
    found: dict = {}
    answers = server.send(EVERYONE, "site-1", "site-2").result(DEADLINE)
    found["everyone"] = {**server.outcome(EVERYONE), "answers": answers}

    server.gates.shut(ABORTED)
    answers = server.send(ABORTED, "site-1", "site-2")
    server.gates.await_reached(ABORTED, offers)
    server.ask("site-2", "abort")
    # Before anything else goes out: it is the receiver that says so.
    eventually(lambda: server.failed_so_far(ABORTED) == ["site-2"], DEADLINE)
    server.gates.open(ABORTED)
    found["aborted"] = {**server.outcome(ABORTED), "answers": answers.result(DEADLINE)}

    # No site-3 is there, and site-2 freezes when it has the most.
    server.gates.shut(BUDGETS)
    late = server.send(BUDGETS, "site-1", "site-2", "site-3")
    server.gates.await_reached(BUDGETS, offers)
    sites["site-2"].send_signal(signal.SIGSTOP)
    server.gates.open(BUDGETS)

    answers = server.send(PASSED, "site-1", topic="relay").result(DEADLINE)
    found["passed on"] = {"answers": answers, **server.outcome(PASSED)}
    found["given"] = server.pull(GIVEN)[0].result(DEADLINE)

    server.ask(TRAINER, "shut", kind=DIED)
    answer, refs = server.pull(DIED)
    server.ask(TRAINER, "reached", kind=DIED)
    server.ask("site-1", "kill")
    server.ask("site-1", "died", refs=refs)
    found["died"] = answer.result(DEADLINE)

    found["budgets"] = server.outcome(BUDGETS)
    sites["site-2"].send_signal(signal.SIGCONT)
    found["budgets"]["answers"] = late.result(DEADLINE)
    return found


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    credentials = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(process)d %(asctime)s %(message)s")
    os.environ.update(LIMITS)
    numpy_decomposers.register()
    url = f"{'stcp' if credentials else 'tcp'}://127.0.0.1:{free_port()}"
    server = Server(url, credentials.get("server", {}))
    if way == "ours":
        install()
    sites = {name: start(name, way, url, json.dumps(credentials.get(name, {}))) for name in ("site-1", "site-2")}
    try:
        for name in sites:
            eventually(lambda name=name: server.cell.core_cell.is_cell_connected(name), DEADLINE)
        while server.ask(TRAINER, "ready", 1.0) is None:
            assert sites["site-1"].poll() is None
            threading.Event().wait(0.1)
        results = run(server, sites, 2 if way == "ours" else 1)
        eventually(lambda: not any(thread.name == "rdma-offers" for thread in threading.enumerate()), DEADLINE)
        results["made on FLARE's own path"] = server.gates.made
        results["budget left in use"] = this_runtime().context.budget.in_use
        (folder / "results.json").write_text(json.dumps(results))
    finally:
        for process in sites.values():
            process.send_signal(signal.SIGCONT)
            process.stdin.close()
            process.wait(DEADLINE)


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001 - it is shown
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # FLARE's threads would hold the process
