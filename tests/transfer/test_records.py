from __future__ import annotations

import dataclasses
import json
import logging
import threading
from types import SimpleNamespace

import pytest

from nvflare_rdma.transfer.records import Ledger, Meter, Meters, total
from tests.support.transfer_records import record


@pytest.fixture
def ledger():
    made = Ledger()
    made.got = []
    made.subscribe(made.got.append)
    return made


def test_goodput_is_raw_bytes_a_second():
    assert record().goodput == 2000.0
    assert record(seconds=0.0).goodput == 0.0


def test_a_record_is_json():
    line = json.loads(json.dumps(record().as_dict()))
    assert line == {**dataclasses.asdict(record()), "goodput": 2000}


def test_a_meter_makes_one_record(ledger):
    meter = Meter("received", "site-1.job", "server.job", "file", ledger)
    meter.wire_bytes, meter.resent_chunks, meter.fabric = 50, 1, "tcp"
    meter.budget = SimpleNamespace(peak=9)
    meter.end(items=2, raw_bytes=100)
    meter.end(failure="too late")
    (got,) = ledger.got
    assert got.seconds >= 0
    expected = record(
        direction="received",
        cell="site-1.job",
        peer="server.job",
        kind="file",
        raw_bytes=100,
        wire_bytes=50,
        resent_chunks=1,
        fabric="tcp",
        budget_peak_bytes=9,
        seconds=got.seconds,
        time=got.time,
    )
    assert got == expected


def test_the_first_reason_to_fall_back_counts(ledger):
    meter = Meter("received", "a", "b", ledger=ledger)
    meter.fabric = "tcp"
    meter.fall_back("a firewall")
    meter.fall_back("nobody asked")
    meter.end(1, 2)
    (got,) = ledger.got
    assert (got.path, got.reason, got.fabric, got.outcome) == ("flare", "a firewall", "", "done")


def test_a_fallback_that_fails_is_recorded_with_the_fabric_that_broke(ledger):
    meter = Meter("received", "a", "b", ledger=ledger)
    meter.fabric = "tcp"
    meter.fall_back("the link broke")
    meter.end(failure="nobody answered")
    (got,) = ledger.got
    assert (got.path, got.reason, got.fabric, got.outcome) == (
        "flare",
        "the link broke",
        "tcp",
        "failed: nobody answered",
    )


def test_a_receiver_says_what_came_and_how(ledger, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    meter = Meter("received", "site-1", "server", ledger=ledger)
    meter.wire_bytes, meter.fabric, meter.way = 50, "tcp", "tcp, TLS, port 8002"
    meter.end(items=2, raw_bytes=100)
    (line,) = caplog.messages
    assert line.startswith("received 2 tensors from server directly: 100 bytes, 50 on the way, in ")
    assert line.endswith(" s over tcp, TLS, port 8002")
    for quiet in (Meter("sent", "a", "b"), Meter("received", "a", "b"), Meter("received", "a", "b")):
        quiet.fall_back("a firewall")
    quiet.end(1, 2)
    Meter("received", "a", "b").end(failure="broken")
    Meter("sent", "a", "b").end(1, 2)
    assert len(caplog.messages) == 1


def test_what_failed_has_brought_nothing(ledger):
    Meter("sent", "a", "b", ledger=ledger).end(failure="the disk is full")
    (got,) = ledger.got
    assert got.failed
    assert (got.outcome, got.items, got.raw_bytes, got.goodput) == ("failed: the disk is full", 0, 0, 0.0)


def test_a_sender_has_a_meter_for_each_receiver(ledger):
    meters = Meters("server", ledger=ledger)
    assert meters.find("x") is None
    assert meters.begin("x") is meters.begin("x") is meters.find("x")
    meters.begin("y")
    meters.end("x", 1, 10)
    meters.end("x", 1, 10)
    meters.end("unknown")
    assert meters.find("x") is None
    meters.close("the job ended")
    meters.close("the job ended")
    assert [(got.peer, got.outcome) for got in ledger.got] == [("x", "done"), ("y", "failed: the job ended")]


def test_a_failing_subscriber_disturbs_nobody_and_is_logged_once(ledger, caplog):
    def fail(record):
        raise OSError("no disk")

    unsubscribe = ledger.subscribe(fail)
    after = []
    ledger.subscribe(after.append)
    with caplog.at_level(logging.WARNING):
        ledger.record(record())
        ledger.record(record())
    assert len(ledger.got) == len(after) == 2
    assert len(caplog.records) == 1
    assert "no disk" in caplog.text
    unsubscribe()
    ledger.record(record())
    assert len(caplog.records) == 1


def test_who_has_unsubscribed_hears_no_more(ledger):
    heard = []
    unsubscribe = ledger.subscribe(heard.append)
    ledger.record(record())
    unsubscribe()
    unsubscribe()
    ledger.record(record())
    assert len(heard) == 1


def test_records_of_several_threads_all_arrive(ledger):
    threads = [threading.Thread(target=lambda: [ledger.record(record()) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert len(ledger.got) == 400


def test_time_that_transfers_share_counts_once():
    sums = total([record(time=10.0, seconds=2.0), record(time=11.0, seconds=2.0), record(time=20.0, seconds=1.0)])
    assert sums.seconds == pytest.approx(4.0)
    assert (sums.transfers, sums.raw_bytes, sums.wire_bytes, sums.resent_chunks) == (3, 3000, 750, 9)
    assert sums.goodput == pytest.approx(750.0)
    within = total([record(time=10.0, seconds=8.0), record(time=9.0, seconds=1.0)])
    assert within.seconds == pytest.approx(8.0)
    assert total([]).goodput == 0.0
