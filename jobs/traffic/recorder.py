"""`TrafficRecorder`: what each round of a job moved and how long that took, one JSON line at a time.

Every process of the job appends to `traffic.jsonl` in its own run folder; `summary` reads the lines of all of them.
Line kinds:

- ``bytes`` (server): `sent`, `received` and `retransmitted` payload bytes over TCP since the last boundary, as the
  kernel counted them for the server's process (see `tcp_counters`). A round reaches from its ROUND_STARTED to the
  next one's, or to the end of the workflow, so task polls, task checks and heartbeats are in it. `round` is null for
  what came before the first round and after the last: starting and ending the job.
- ``task`` (site): seconds of one task. `pull` is the request that brought the task, from asking to having all its
  tensors (BEFORE_PULL_TASK..AFTER_PULL_TASK); `send` is from the check that the server still wants the result to its
  acknowledgement (BEFORE_SEND_TASK_RESULT..AFTER_SEND_TASK_RESULT); `decode` and `encode` are the site's task data
  and task result filters. Requests that brought no task are not in `pull`.
- ``serve`` (server): seconds the server itself spent on one site's task inside that site's pull and send windows:
  `encode` (task data filters), `decode` (task result filters), `accept` (aggregating the result).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from traffic.summary import FILE_NAME
from traffic.tcp_counters import TcpByteCounter, WireBytes

# (event that opens a window, event that closes it, name of its seconds)
_SITE_WINDOWS = (
    (EventType.BEFORE_PULL_TASK, EventType.AFTER_PULL_TASK, "pull"),
    (EventType.BEFORE_TASK_DATA_FILTER, EventType.AFTER_TASK_DATA_FILTER, "decode"),
    (EventType.BEFORE_TASK_RESULT_FILTER, EventType.AFTER_TASK_RESULT_FILTER, "encode"),
    (EventType.BEFORE_SEND_TASK_RESULT, EventType.AFTER_SEND_TASK_RESULT, "send"),
)
_SERVER_WINDOWS = (
    (EventType.BEFORE_TASK_DATA_FILTER, EventType.AFTER_TASK_DATA_FILTER, "encode"),
    (EventType.BEFORE_TASK_RESULT_FILTER, EventType.AFTER_TASK_RESULT_FILTER, "decode"),
    (EventType.BEFORE_PROCESS_SUBMISSION, EventType.AFTER_PROCESS_SUBMISSION, "accept"),
)


class TrafficRecorder(FLComponent):
    """Job component for the server and the sites; takes no arguments (see the module's text for what it writes)."""

    def __init__(self) -> None:
        super().__init__()
        self._counter = TcpByteCounter()
        self._mark = WireBytes()
        self._round: int | None = None
        self._windows = _Windows()
        self._file: str | None = None
        self._lock = threading.Lock()
        self._is_server = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's hook: each event is looked up in the tables above."""
        if event_type == EventType.START_RUN:
            self._start(fl_ctx)
        elif self._file is None:
            return
        elif self._is_server:
            self._on_server(event_type, fl_ctx)
        else:
            self._on_site(event_type, fl_ctx)

    def _start(self, fl_ctx: FLContext) -> None:
        workspace = fl_ctx.get_engine().get_workspace()
        self._file = os.path.join(workspace.get_run_dir(fl_ctx.get_job_id()), FILE_NAME)
        self._is_server = fl_ctx.get_process_type() in ("SJ", "SP")
        if self._is_server:
            self._counter.start()

    def _on_server(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.ROUND_STARTED:
            self._boundary(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        elif event_type == EventType.END_WORKFLOW:
            self._boundary(None)
        elif event_type == EventType.END_RUN:
            self._boundary(None)
            self._counter.stop()
        else:
            closed = self._windows.see(event_type, _SERVER_WINDOWS)
            if closed:
                name, seconds = closed
                self._write(kind="serve", round=self._round, site=_peer(fl_ctx), seconds={name: seconds})

    def _boundary(self, next_round: int | None) -> None:
        total = self._counter.total()
        moved, self._mark = total - self._mark, total
        self._write(kind="bytes", round=self._round, **asdict(moved))
        self._round = next_round

    def _on_site(self, event_type: str, fl_ctx: FLContext) -> None:
        closed = self._windows.see(event_type, _SITE_WINDOWS)
        if event_type == EventType.BEFORE_TASK_DATA_FILTER:  # the last pull brought this task
            self._windows.keep("pull")
            self._round = _task_round(fl_ctx)
        if closed and closed[0] != "pull":
            self._windows.keep(closed[0], closed[1])
            if closed[0] == "send":
                self._write(
                    kind="task",
                    round=self._round,
                    site=fl_ctx.get_identity_name(),
                    seconds=self._windows.take(),
                )

    def _write(self, **line: Any) -> None:
        assert self._file is not None
        with self._lock, open(self._file, "a") as out:
            out.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")


class _Windows:
    """Open windows per thread (FLARE serves sites in several threads), and the seconds kept for one task."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._opened = threading.local()
        self._last: dict[str, float] = {}
        self._kept: dict[str, float] = {}

    def see(self, event_type: str, table: tuple[tuple[str, str, str], ...]) -> tuple[str, float] | None:
        """Open or close the window of `event_type`; returns (name, seconds) of one that it closed."""
        opened = self._opened.__dict__
        for before, after, name in table:
            if event_type == before:
                opened[name] = self._clock()
            elif event_type == after and name in opened:
                self._last[name] = self._clock() - opened.pop(name)
                return name, round(self._last[name], 6)
        return None

    def keep(self, name: str, seconds: float | None = None) -> None:
        """Note `seconds` (default: the window's last) for the task at hand."""
        if seconds is None:
            seconds = round(self._last.get(name, 0.0), 6)
        self._kept[name] = seconds

    def take(self) -> dict[str, float]:
        """The kept seconds by name; starts anew."""
        kept, self._kept = self._kept, {}
        return kept


def _peer(fl_ctx: FLContext) -> str | None:
    peer = fl_ctx.get_peer_context()
    return peer.get_identity_name() if peer else None


def _task_round(fl_ctx: FLContext) -> int | None:
    data = fl_ctx.get_prop(FLContextKey.TASK_DATA)
    return data.get_header(AppConstants.CURRENT_ROUND) if data is not None else None
