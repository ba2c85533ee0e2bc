"""`FetchModel`: what a site does. It asks the server for the file until it has it, and keeps it for other jobs."""

from __future__ import annotations

import os
import time
from pathlib import Path

from model import folder_of, header_digest, is_file_name
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from nvflare_rdma.streaming import FileRetriever


class FetchModel(Executor):
    """Fetches the file that the server names.

    Args:
        folder: where this site keeps models; see `folder_of`. What has come of a file before an interruption waits
            there, too, and the next attempt goes on from it, also that of another job.
        attempts: how often the server is asked.
        timeout: seconds that an attempt may take.
    """

    def __init__(self, folder: str = "models", attempts: int = 3, timeout: int = 8 * 3600) -> None:
        super().__init__()
        self.folder, self.attempts, self.timeout = folder, attempts, timeout
        self._folder = Path()
        self._retriever: FileRetriever | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's hook: be ready to receive before the first task comes."""
        if event_type == EventType.START_RUN:
            self._folder = folder_of(fl_ctx, self.folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._retriever = FileRetriever(source_dir="", dest_dir=str(self._folder))
            self._retriever.handle_event(event_type, fl_ctx)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """The one task of this job."""
        name = shareable["file"]
        if not is_file_name(name):
            return _reply(
                ReturnCode.BAD_TASK_DATA, f"was told of {name!r}, which is no name of a file, but leads elsewhere"
            )
        path, note = self._folder / name, self._folder / f".{name}.stamp"
        if path.is_file() and note.is_file() and note.read_text() == shareable["stamp"]:
            return _reply(ReturnCode.OK, f"has had {path.name} since an earlier run")
        began = time.monotonic()
        code = ReturnCode.ERROR
        for attempt in range(1, self.attempts + 1):
            if abort_signal.triggered:
                return make_reply(ReturnCode.TASK_ABORTED)
            assert self._retriever is not None
            code, came = self._retriever.retrieve_file("server", fl_ctx, self.timeout, path.name)
            if code == ReturnCode.OK:
                return self._keep(Path(came), path, note, shareable, time.monotonic() - began)
            self.log_warning(fl_ctx, f"attempt {attempt} of {self.attempts} to fetch {path.name}: {code}")
        return _reply(code, f"gave up after {self.attempts} attempts: {code}")

    def _keep(self, came: Path, path: Path, note: Path, wanted: Shareable, seconds: float) -> Shareable:
        """Give the file its name, if it is what the server has announced; its content has been compared on the way."""
        if came.stat().st_size != wanted["size"] or header_digest(came) != wanted["header"]:
            came.unlink()
            return _reply(ReturnCode.ERROR, f"has got a file that is not the {path.name} which was announced")
        note.unlink(missing_ok=True)
        os.replace(came, path)
        note.write_text(wanted["stamp"])
        return _reply(ReturnCode.OK, f"has got {path.name}, of {wanted['size']} bytes, in {seconds:.1f} s")


def _reply(code: str, said: str) -> Shareable:
    reply = make_reply(code)
    reply["said"] = said
    return reply
