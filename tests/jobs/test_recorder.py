from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from traffic.recorder import TrafficRecorder
from traffic.tcp_counters import WireBytes


class Run:
    """A recorder in a job process; `events` are fired at it with a clock that this test sets."""

    def __init__(self, folder, process_type, name):
        workspace = SimpleNamespace(get_run_dir=lambda job_id: str(folder))
        self.ctx = FLContext()
        self.ctx.set_prop(FLContextKey.PROCESS_TYPE, process_type)
        self.ctx.set_prop("__identity_name__", name)
        self.ctx.get_engine = lambda: SimpleNamespace(get_workspace=lambda: workspace)
        self.folder = folder
        self.now = 0.0
        self.recorder = TrafficRecorder()
        self.recorder._windows._clock = lambda: self.now
        self.fire(EventType.START_RUN)

    def fire(self, event, at=0.0):
        self.now = at
        self.recorder.handle_event(event, self.ctx)

    def lines(self):
        lines = [json.loads(text) for text in (self.folder / "traffic.jsonl").read_text().splitlines()]
        for line in lines:
            del line["time"]
        return lines


def test_site_records_the_pull_that_brought_the_task(tmp_path):
    run = Run(tmp_path, "CJ", "site-1")
    data = Shareable()
    data.set_header(AppConstants.CURRENT_ROUND, 4)
    run.ctx.set_prop(FLContextKey.TASK_DATA, data, private=True, sticky=False)
    run.fire(EventType.BEFORE_PULL_TASK, 1)
    run.fire(EventType.AFTER_PULL_TASK, 51)  # brought nothing
    run.fire(EventType.BEFORE_PULL_TASK, 100)
    run.fire(EventType.AFTER_PULL_TASK, 103)
    run.fire(EventType.BEFORE_TASK_DATA_FILTER, 104)
    run.fire(EventType.AFTER_TASK_DATA_FILTER, 105)
    run.fire(EventType.BEFORE_TASK_RESULT_FILTER, 200)
    run.fire(EventType.AFTER_TASK_RESULT_FILTER, 202)
    run.fire(EventType.BEFORE_SEND_TASK_RESULT, 203)
    run.fire(EventType.AFTER_SEND_TASK_RESULT, 210)
    seconds = {"pull": 3.0, "decode": 1.0, "encode": 2.0, "send": 7.0}
    assert run.lines() == [{"kind": "task", "round": 4, "site": "site-1", "seconds": seconds}]


def test_server_counts_bytes_between_round_boundaries(tmp_path, monkeypatch):
    run = Run(tmp_path, "SJ", "server")
    totals = [WireBytes(10, 1), WireBytes(110, 21), WireBytes(310, 51), WireBytes(311, 53)]
    monkeypatch.setattr(run.recorder._counter, "total", lambda: totals.pop(0))
    run.ctx.set_prop(AppConstants.CURRENT_ROUND, 0)
    run.fire(AppEventType.ROUND_STARTED)
    run.ctx.set_prop(AppConstants.CURRENT_ROUND, 1)
    run.fire(AppEventType.ROUND_STARTED)
    run.fire(EventType.END_WORKFLOW)
    run.fire(EventType.END_RUN)
    assert [(line["round"], line["sent"], line["received"]) for line in run.lines()] == [
        (None, 10, 1),
        (0, 100, 20),
        (1, 200, 30),
        (None, 1, 2),
    ]
    assert run.recorder._counter._thread is None


def test_server_records_its_share_of_a_sites_windows(tmp_path):
    run = Run(tmp_path, "SJ", "server")
    peer = FLContext()
    peer.set_prop("__identity_name__", "site-2")
    run.ctx.set_peer_context(peer)
    run.recorder._round = 5
    run.fire(EventType.BEFORE_TASK_DATA_FILTER, 1)
    run.fire(EventType.AFTER_TASK_DATA_FILTER, 3)
    run.fire(EventType.BEFORE_PROCESS_SUBMISSION, 10)
    run.fire(EventType.AFTER_PROCESS_SUBMISSION, 14)
    run.recorder._counter.stop()
    assert run.lines() == [
        {"kind": "serve", "round": 5, "site": "site-2", "seconds": {"encode": 2.0}},
        {"kind": "serve", "round": 5, "site": "site-2", "seconds": {"accept": 4.0}},
    ]


def test_nothing_is_written_before_the_run_starts():
    TrafficRecorder().handle_event(EventType.BEFORE_PULL_TASK, FLContext())
