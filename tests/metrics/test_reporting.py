from __future__ import annotations

import json
import logging

import pytest

pytest.importorskip("nvflare")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedTopic
from nvflare.fuel.data_event.data_bus import DataBus
from nvflare.fuel.f3.stats_pool import StatsPoolManager

from nvflare_rdma.metrics import pools
from nvflare_rdma.metrics.reporting import figures_of
from nvflare_rdma.transfer.records import Ledger
from tests.support.reported_run import ReportedRun
from tests.support.transfer_records import record

ledger = Ledger()


@pytest.fixture
def run(tmp_path):
    made = []

    def make(process_type, cell, folder=tmp_path):
        made.append(ReportedRun(str(folder), process_type, cell, ledger))
        return made[-1]

    yield make
    for it in made:
        it.reporter.close()


@pytest.fixture(autouse=True)
def no_pools():
    before = dict(StatsPoolManager.pools)
    StatsPoolManager.pools.clear()
    yield
    StatsPoolManager.pools.clear()
    StatsPoolManager.pools.update(before)


def test_a_server_reports_each_round(run):
    server = run("SJ", "server.job-1")
    ledger.record(record(cell="server.job-1"))
    server.round(0)
    assert server.scalars(None)["rdma/sent_raw_bytes"] == 1000
    ledger.record(record(cell="server.job-1"))
    ledger.record(record(cell="server.job-1", direction="received", path="flare", reason="a firewall"))
    ledger.record(record(cell="server"))  # the simulator's
    server.round(1)
    first = server.scalars(0)
    assert "rdma/results_held_peak_bytes" not in first
    assert (first["rdma/sent_raw_bytes"], first["rdma/received_raw_bytes"]) == (2000, 1000)
    assert (first["rdma/direct_transfers"], first["rdma/flare_transfers"]) == (2, 1)
    server.round(2)
    assert server.scalars(1) == {}, "nothing was moved in it"
    ledger.record(record(cell="server.job-1", outcome="failed: it broke", raw_bytes=0))
    server.more = {"results_held_peak_bytes": 77}
    server.reporter.handle_event(EventType.END_WORKFLOW, server.ctx)
    last = server.scalars(2)
    assert (last["rdma/failed_transfers"], last["rdma/results_held_peak_bytes"]) == (1, 77)
    assert [line["round"] for line in server.lines()] == [None, 0, 0, 0, 2]


def test_a_site_reports_each_task_with_what_brought_it(run):
    site = run("CJ", "site-1.job-1")
    site.reporter.handle_event(EventType.BEFORE_PULL_TASK, site.ctx)
    ledger.record(record(cell="site-1.job-1", direction="received"))
    assert site.lines() == [], "its round is not known yet"
    site.task(4)
    assert [line["round"] for line in site.lines()] == [4]
    ledger.record(record(cell="site-1.job-1"))
    assert [(line["round"], line["direction"]) for line in site.lines()] == [(4, "received"), (4, "sent")]
    site.reporter.handle_event(EventType.AFTER_SEND_TASK_RESULT, site.ctx)
    scalars = site.scalars(4)
    assert (scalars["rdma/sent_raw_bytes"], scalars["rdma/received_raw_bytes"]) == (1000, 1000)
    assert scalars["rdma/budget_peak_bytes"] == 7
    site.reporter.handle_event(EventType.BEFORE_PULL_TASK, site.ctx)
    ledger.record(record(cell="site-1.job-1", outcome="failed: the job ended"))
    site.reporter.close()
    assert [line["round"] for line in site.lines()] == [4, 4, None]


def test_other_runs_of_the_process_are_not_reported(run):
    one = run("SJ", "server.job-1")
    for cell in ("server.job-2", "server.job-11", "site-1.job-1", ""):
        ledger.record(record(cell=cell))
    assert one.lines() == []
    ledger.record(record(cell="server.job-1"))
    one.reporter.close()
    ledger.record(record(cell="server.job-1"))
    assert len(one.lines()) == 1


def test_a_folder_that_cannot_be_written_is_said_once_and_the_run_goes_on(run, tmp_path, caplog):
    (tmp_path / "job-1").write_text("no folder")
    server = run("SJ", "server.job-1")
    with caplog.at_level(logging.WARNING):
        ledger.record(record(cell="server.job-1"))
        ledger.record(record(cell="server.job-1"))
    (said,) = caplog.records
    assert str(tmp_path / "job-1") in said.getMessage()
    server.round(0)
    assert server.scalars(None)["rdma/sent_raw_bytes"] == 2000


def test_flares_stats_pools_have_the_transfers(run):
    run("SJ", "server.job-1")
    ledger.record(record(cell="server.job-1", fabric="tcp", raw_bytes=10_000_000))
    ledger.record(record(cell="server.job-1", fabric="tcp", raw_bytes=0, outcome="failed: it broke"))
    ledger.record(record(cell="server.job-1", fabric="", direction="received", path="flare", resent_chunks=0))
    _, table = StatsPoolManager.get_table()
    assert [name for name, *_ in table] == ["rdma_goodput", "rdma_transfer_counters", "rdma_transfer_time"]
    headers, rows = StatsPoolManager.get_pool(pools.COUNTERS).get_table()
    assert headers == ["category", "transfers", "failed", "raw_bytes", "wire_bytes", "resent_chunks"]
    assert rows == [
        ["received flare", "1", "0", "1000", "250", "0"],
        ["sent direct tcp", "2", "1", "10000000", "500", "6"],
    ]
    headers, rows = StatsPoolManager.get_pool(pools.TIME).get_table("max")
    assert ["sent direct tcp", "5.000e-01", "5.000e-01"] in rows
    headers, rows = StatsPoolManager.get_pool(pools.GOODPUT).get_table("avg")
    assert headers == ["category", "<1", "10-50", "overall"]
    assert ["sent direct tcp", "", "2.000e+01", "2.000e+01"] in rows
    assert json.dumps(StatsPoolManager.to_dict())


def test_flares_data_bus_has_a_rounds_totals_as_job_metrics(run):
    published = []

    def take(topic, metrics, data_bus):
        published.extend(metrics)

    server, bus = run("SJ", "server.job-1"), DataBus()
    bus.subscribe([ReservedTopic.APP_METRICS], take)
    try:
        ledger.record(record(cell="server.job-1"))
        server.round(0)
    finally:
        bus.unsubscribe(ReservedTopic.APP_METRICS, take)
    (sent,) = [metric for metric in published if metric["metric_name"] == "rdma_sent_raw_bytes"]
    assert (sent["value"], sent["type"]) == (1000, "gauge")
    assert sent["tags"] == {"job_id": "job-1", "site": "server"}


def test_the_largest_relative_error_of_what_was_sent_is_a_figure():
    values = figures_of([record(relative_error=0.02), record(relative_error=0.09), record()])
    assert values["sent_relative_error"] == 0.09
    assert "sent_relative_error" not in figures_of([record()])


def test_only_directions_that_were_used_have_figures():
    values = figures_of([record()])
    assert values["sent_goodput"] == 2000
    assert values["sent_seconds"] == 0.5
    assert not any(name.startswith("received") for name in values)
