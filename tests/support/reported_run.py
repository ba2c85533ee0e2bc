"""A job's run with a `TransferReporter`, in an engine that keeps what is fired; no job runs."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

from nvflare.apis.analytix import AnalyticsData
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from nvflare_rdma.metrics.reporting import TransferReporter


class ReportedRun:
    """The run of one process. Records of `ledger` whose cell is `cell` go to the folder of the job in `folder`."""

    def __init__(self, folder, process_type, cell, ledger, job="job-1"):
        self.folder = os.path.join(folder, job)
        self.fired: list[tuple] = []
        self._contexts = FLContextManager(self, cell.split(".")[0], job, {}, {})
        self._cell = cell
        self.ctx = self.new_context()
        self.ctx.set_prop(FLContextKey.PROCESS_TYPE, process_type, private=True, sticky=False)
        self.more: dict[str, float] = {}
        self.reporter = TransferReporter(FLComponent(), self.ctx, ledger, lambda: self.more)

    def new_context(self):
        return self._contexts.new_context()

    def get_cell(self):
        return SimpleNamespace(get_fqcn=lambda: self._cell)

    def get_workspace(self):
        return SimpleNamespace(get_run_dir=lambda job_id: self.folder)

    def fire_event(self, event_type, fl_ctx):
        data = AnalyticsData.from_dxo(from_shareable(fl_ctx.get_prop(FLContextKey.EVENT_DATA)))
        self.fired.append((event_type, data.tag, data.value, data.step))

    def scalars(self, step):
        taken, self.fired = self.fired, []
        assert all((event, at) == ("analytix_log_stats", step) for event, _, _, at in taken)
        return {tag: value for _, tag, value, _ in taken}

    def round(self, number):
        self.ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=False)
        self.reporter.handle_event(AppEventType.ROUND_STARTED, self.ctx)

    def pull(self):
        self.reporter.handle_event(EventType.BEFORE_PULL_TASK, self.ctx)

    def task(self, number):
        data = Shareable()
        data.set_header(AppConstants.CURRENT_ROUND, number)
        self.ctx.set_prop(FLContextKey.TASK_DATA, data, private=True, sticky=False)
        self.reporter.handle_event(EventType.BEFORE_TASK_DATA_FILTER, self.ctx)

    def lines(self):
        path = os.path.join(self.folder, "nvflare_rdma", "transfers.jsonl")
        return [json.loads(line) for line in open(path)] if os.path.exists(path) else []
