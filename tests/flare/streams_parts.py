"""Parts of `streams_job.py`: FLARE copies this file into the job."""

from __future__ import annotations

import os
from pathlib import Path

from nvflare.apis.controller_spec import Task
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply

from nvflare_rdma.streaming import FileStreamer

SITES = ("site-1", "site-2")


def send(fl_ctx, folder: str, targets: list[str]) -> None:
    name = fl_ctx.get_identity_name()
    source = Path(folder) / f"from-{name}"
    if not source.exists():
        source.write_bytes(os.urandom(300_000))
    code, _ = FileStreamer.stream_file("app", "file", {}, targets, str(source), fl_ctx)
    print("STREAMED", name, *targets, code, flush=True)


class Server(Controller):
    """Has the sites send files, and then sends one to both of them."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def start_controller(self, fl_ctx) -> None:
        FileStreamer.register_stream_processing(fl_ctx, "app", "file", self.folder)

    def control_flow(self, abort_signal, fl_ctx) -> None:
        for name in ("ready", "send"):
            task = Task(name, Shareable(), timeout=100)
            self.broadcast_and_wait(task, fl_ctx, min_responses=len(SITES), abort_signal=abort_signal)
        send(fl_ctx, self.folder, list(SITES))

    def stop_controller(self, fl_ctx) -> None:
        """Nothing is left to stop."""


class Site(Executor):
    """Sends a file to the other site and to the server."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def handle_event(self, event_type, fl_ctx) -> None:
        if event_type == EventType.START_RUN:
            FileStreamer.register_stream_processing(fl_ctx, "app", "file", self.folder)

    def execute(self, task_name, shareable, fl_ctx, abort_signal) -> Shareable:
        if task_name == "send":
            for target in sorted({*SITES, "server"} - {fl_ctx.get_identity_name()}):
                send(fl_ctx, self.folder, [target])
        return make_reply(ReturnCode.OK)
