"""Transfers of a job's run, where FLARE's users look: lines in the run's folder, stats pools, and analytics.

- `nvflare_rdma/transfers.jsonl` in the run's folder of each process: one JSON line per transfer (`TransferRecord`)
  with its round, null outside of rounds.
- FLARE's stats pools: see `pools`.
- Totals of each round on the server (ROUND_STARTED to the next one, or to the end of the workflow), and of each task on
  a site (what brought the task and what sent its result), fired as FLARE's own analytics are: a local event, which
  `ConvertToFedEvent` on a site takes to the server's receivers; and published on FLARE's data bus as job metrics, which
  `StatsDReporter` takes. Names are `rdma/...`, the step is the round; nothing is fired where nothing was moved.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvflare.apis.analytix import AnalyticsDataType, TrackConst
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.fuel.data_event.data_bus import DataBus
from nvflare.metrics.metrics_keys import MetricKeys, MetricTypes
from nvflare.metrics.metrics_publisher import publish_app_metrics

from nvflare_rdma.logs import get_logger
from nvflare_rdma.metrics.names import TRANSFERS_FILE
from nvflare_rdma.metrics.pools import add_to_pools
from nvflare_rdma.transfer import Ledger, TransferRecord, total

log = get_logger(__name__)

#: After which a round's, or a task's, totals are complete.
_SERVER_ENDS = (AppEventType.ROUND_STARTED, EventType.END_WORKFLOW)
_SITE_ENDS = (EventType.AFTER_SEND_TASK_RESULT,)


class TransferReporter:
    """Shows the transfers of one run, which `ledger` has the records of.

    `component` fires the analytics events. `more` gives figures beside those of the transfers.
    `handle_event` has to see all events of the run, from START_RUN on.
    """

    def __init__(
        self, component: FLComponent, fl_ctx: FLContext, ledger: Ledger, more: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        engine = fl_ctx.get_engine()
        self._component = component
        self._more = more
        self._engine = engine
        self._cell = engine.get_cell().get_fqcn()
        self._job = fl_ctx.get_job_id()
        self._site = fl_ctx.get_identity_name()
        self._is_server = fl_ctx.get_process_type() in ("SJ", "SP")
        self._lines = _Lines(os.path.join(engine.get_workspace().get_run_dir(self._job), *TRANSFERS_FILE))
        self._lock = threading.Lock()
        self._round: int | None = None
        self._records: list[TransferRecord] = []
        #: While a site pulls a task nobody knows its round: what comes then is written afterwards.
        self._pulling = False
        self._unwritten: list[TransferRecord] = []
        self._unsubscribe = ledger.subscribe(self._ended)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take an event of the run: it says when a round or a task is over."""
        if self._is_server:
            if event_type in _SERVER_ENDS:
                self._report()
                started = event_type == AppEventType.ROUND_STARTED
                self._round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND) if started else None
        elif event_type == EventType.BEFORE_PULL_TASK:
            self._pull(True, None)
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER:
            self._pull(False, _task_round(fl_ctx))
        elif event_type in _SITE_ENDS:
            self._report()

    def close(self) -> None:
        """End the report: the run is over."""
        self._unsubscribe()
        self._pull(False, None)

    def _ended(self, record: TransferRecord) -> None:
        if not record.is_of(self._cell):
            return
        add_to_pools(record)
        with self._lock:
            self._records.append(record)
            if self._pulling:
                self._unwritten.append(record)
            else:
                self._lines.write({"round": self._round, **record.as_dict()})

    def _pull(self, pulling: bool, task_round: int | None) -> None:
        with self._lock:
            self._pulling, self._round = pulling, task_round
            for record in self._unwritten:
                self._lines.write({"round": task_round, **record.as_dict()})
            self._unwritten.clear()

    def _report(self) -> None:
        with self._lock:
            records, self._records = self._records, []
        if not records:
            return
        values = {**figures_of(records), **self._more()}
        step = {} if self._round is None else {TrackConst.GLOBAL_STEP_KEY: self._round}
        for name, value in values.items():
            dxo = create_analytic_dxo(f"rdma/{name}", value, AnalyticsDataType.SCALAR, **step)
            with self._engine.new_context() as fl_ctx:
                send_analytic_dxo(self._component, dxo, fl_ctx)
        tags = {"job_id": self._job, "site": self._site}
        publish_app_metrics({**values, MetricKeys.type: MetricTypes.GAUGE}, "rdma", tags, DataBus())


def figures_of(records: Sequence[TransferRecord]) -> dict[str, float]:
    """The figures of several transfers together, by name: bytes, seconds, bytes a second, numbers of chunks and
    transfers, and the largest relative error of a tensor that was sent."""
    values: dict[str, float] = {}
    for direction in ("sent", "received"):
        sums = total(record for record in records if record.direction == direction)
        if sums.transfers:
            values |= {
                f"{direction}_raw_bytes": sums.raw_bytes,
                f"{direction}_wire_bytes": sums.wire_bytes,
                f"{direction}_seconds": round(sums.seconds, 6),
                f"{direction}_goodput": round(sums.goodput),
                f"{direction}_resent_chunks": sums.resent_chunks,
            }
    errors = [record.relative_error for record in records if record.relative_error is not None]
    if errors:
        values["sent_relative_error"] = max(errors)
    return {
        **values,
        "direct_transfers": sum(record.path == "direct" for record in records),
        "flare_transfers": sum(record.path == "flare" for record in records),
        "failed_transfers": sum(record.failed for record in records),
        "budget_peak_bytes": max(record.budget_peak_bytes for record in records),
    }


class _Lines:
    """A file of JSON lines. A line that can't be written is lost; the log says so once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._failed = False

    def write(self, line: dict[str, Any]) -> None:
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(self._path, "a") as out:
                out.write(json.dumps(line) + "\n")
        except OSError as error:
            if not self._failed:
                log.warning("can't write a transfer to %s, so that lines will be missing there: %s", self._path, error)
            self._failed = True


def _task_round(fl_ctx: FLContext) -> int | None:
    data = fl_ctx.get_prop(FLContextKey.TASK_DATA)
    return data.get_header(AppConstants.CURRENT_ROUND) if data is not None else None
