"""A process is killed in the middle of a transfer: the other side says so at once, and why."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading

import pytest

from nvflare_rdma.errors import TransferError
from nvflare_rdma.transfer import Meter, Meters, Service, TensorContent, pull
from tests.support.calls import Server, call
from tests.support.data_channels import shared
from tests.support.direct_transfers import new
from tests.support.processes import SMALL, environment
from tests.support.tcp_pair import DEADLINE
from tests.support.transfer_peer import TENSORS
from tests.support.waiting import eventually

NO_GOODBYE = "the peer closed the connection without a goodbye, as when its process ends"


@pytest.fixture
def peer(tmp_path):
    """Starts the other side, which a test then kills."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SMALL / "transfer_peer.py"), what, str(tmp_path / what), str(tmp_path / "here")]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=SMALL, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def lines(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_a_receiver_that_is_killed(cell, peer, records, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    links = cell("server")
    moved, go_on = threading.Event(), threading.Event()

    def hold(*what) -> None:
        moved.set()
        assert go_on.wait(DEADLINE)

    meters = Meters("server", ledger=shared.ledger)
    service = Service(TensorContent(TENSORS), lambda: links, hold, meters, patience=0.2)
    answering = Server(tmp_path / "here", lambda do, key, request, receiver: service.answer(request, receiver))
    process = peer("pull")
    assert moved.wait(DEADLINE)
    process.send_signal(signal.SIGKILL)
    eventually(lambda: links.find("site-1") is None, DEADLINE)
    go_on.set()
    eventually(lambda: records, DEADLINE)
    (record,) = records
    assert (record.direction, record.peer, record.fabric, record.path) == ("sent", "site-1", "tcp", "direct")
    assert record.failed
    assert NO_GOODBYE in record.outcome
    assert "it has not asked again" in record.outcome
    assert lines(caplog, "connection lost: " + NO_GOODBYE)
    assert lines(caplog, "sending to site-1 broke off")
    assert not lines(caplog, "Errno 9")
    service.close()
    answering.close()
    assert len(records) == 1


def test_a_sender_that_is_killed(cell, peer, records, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nvflare_rdma")
    links, process = cell("site-1"), peer("serve")
    meter = Meter("received", "site-1", "server", ledger=shared.ledger)

    def ask(request):
        try:
            return call(tmp_path / "serve", "ask", "", request, "site-1")
        except OSError as error:
            raise TransferError("server can't be asked") from error

    def kill_in_the_middle(done) -> None:
        if done.items:
            process.send_signal(signal.SIGKILL)

    with pytest.raises(TransferError) as failed:
        pull(links, "server", ask, new, progress=kill_in_the_middle, meter=meter)
    meter.end(failure=str(failed.value))
    (record,) = records
    assert (record.direction, record.peer, record.fabric) == ("received", "server", "tcp")
    assert record.outcome.startswith("failed: ")
    for said in (NO_GOODBYE, "items did not come from server: the link broke", "asked again: server can't be asked"):
        assert said in record.outcome
    assert lines(caplog, "connection lost: " + NO_GOODBYE)
    assert "Errno 9" not in record.outcome
