"""Keeps the scalars that FLARE's analytics receivers would show."""

from __future__ import annotations

import json
import os

from nvflare.apis.analytix import AnalyticsData
from nvflare.apis.dxo import from_shareable
from nvflare.app_common.widgets.streaming import AnalyticsReceiver


class ScalarReceiver(AnalyticsReceiver):
    """[origin, tag, value, step] a line, in scalars.jsonl of the run's folder. FLARE's own needs tensorboard."""

    def __init__(self):
        super().__init__()
        self._path = ""

    def initialize(self, fl_ctx):
        run_dir = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
        self._path = os.path.join(run_dir, "scalars.jsonl")

    def save(self, fl_ctx, shareable, record_origin):
        data = AnalyticsData.from_dxo(from_shareable(shareable))
        with open(self._path, "a") as out:
            out.write(json.dumps([record_origin, data.tag, data.value, data.step]) + "\n")

    def finalize(self, fl_ctx):
        pass
