"""What tells that a peer has ended, and that a result is still on its way."""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ServerCommandNames
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey

from nvflare_rdma.flare_compat import sender_of_result
from nvflare_rdma.streaming import absence, decomposers
from nvflare_rdma.streaming.absence import EndedSites
from tests.support.processes import SMALL, WITHOUT_TORCH, run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    done = run(SMALL / "cells_absent.py", str(folder), timeout=100, **WITHOUT_TORCH)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return json.loads((folder / "results.json").read_text())


def test_a_process_has_ended_where_its_parent_answers_and_it_does_not(found):
    assert not found["both"]
    assert found["parent"]
    assert not found["for now"], "FLARE may still be connecting it again"


def test_a_process_that_is_stopped_has_not_ended(found):
    assert not found["stopped"], "the kernel keeps its connection with its parent"


def test_a_host_that_does_not_answer_at_all_may_come_back(found):
    assert not found["neither"]
    assert not found["root"], "a process without a parent"


def test_a_result_that_is_on_its_way_is_waited_for(found):
    assert found["requests"] == 1


def test_a_result_whose_process_has_ended_is_lost_and_the_server_goes_on(tmp_path):
    """FLARE's own path would ask the dead process for forty minutes, and the server's would end itself then."""
    done = run(SMALL / "cells_ended.py", str(tmp_path), timeout=100, **WITHOUT_TORCH)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["ended"] == ["site-1.job"]
    assert found["outcomes"]["site-1.job"].endswith("its process has ended, as its parent shows")
    assert found["code"] == 0
    assert found["got"] == [float(1 << 20)], "the other site's, once"
    assert "tensors from site-1.job will not come" in log
    assert "own path" not in log


class Engine:
    """FLARE's, of a server's job: `contexts` know of the workflow that runs, if any."""

    def __init__(self, workflow=None) -> None:
        self.workflow = workflow
        self.clients = [Client("site-1", "token"), Client("site-2", "token")]
        self.clients[0].set_fqcn("relay.site-1")

    def get_clients(self):
        return self.clients

    def new_context(self):
        context = FLContext()
        told = getattr(self.workflow, "controller", None)
        runner = SimpleNamespace(
            current_wf=self.workflow,
            handle_dead_job=lambda site, fl_ctx: told.communicator.process_dead_client_report(site, fl_ctx),
        )
        context.set_prop(FLContextKey.RUNNER, runner, private=True, sticky=False)
        return contextlib.nullcontext(context)


def workflow(grace: float):
    communicator = WFCommServer()
    communicator._dead_client_grace = grace
    return SimpleNamespace(controller=SimpleNamespace(communicator=communicator))


def dead(engine):
    return engine.workflow.controller.communicator._dead_clients


def asks_for_a_task(sites, site):
    peer, context = FLContext(), FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, site, private=False, sticky=False)
    context.set_peer_context(peer)
    sites.handle_event(EventType.BEFORE_PROCESS_TASK_REQUEST, context)


@pytest.mark.parametrize(("grace", "left"), [(3660.0, 60.0), (60.0, 60.0), (5.0, 5.0)])
def test_a_workflow_waits_a_minute_for_a_site_that_has_ended_and_not_the_patience(grace, left):
    engine = Engine(workflow(grace))
    sites = EndedSites(engine, "job")
    before = time.time()
    sites.add("relay.site-1.job")
    counted_from = dead(engine)["site-1"].report_time
    assert before <= counted_from + grace - left <= time.time()
    sites.add("relay.site-1.job")
    assert dead(engine)["site-1"].report_time == counted_from, "a later report lengthens nothing"


@pytest.mark.parametrize(
    "peer", ["site-2.job.trainer", "site-2.another", "site-2", "server.job", "job", "site-1.job", "site-1.site-2.job"]
)
def test_only_a_site_s_process_of_this_job_is_told_of(peer):
    engine = Engine(workflow(60.0))
    EndedSites(engine, "job").add(peer)
    assert not dead(engine)


def test_a_site_that_lived_meanwhile_and_has_ended_now_is_told_of_again():
    engine = Engine(workflow(60.0))
    sites = EndedSites(engine, "job")
    for peer, name in [("relay.site-1.job", "site-1"), ("site-2.job", "site-2")] * 2:
        sites.add(peer)
        assert list(dead(engine)) == [name]
        dead(engine).clear()


def test_each_workflow_is_told_once_and_the_first_one_when_it_runs():
    engine = Engine()
    sites = EndedSites(engine, "job")
    sites.add("relay.site-1.job")
    asks_for_a_task(sites, "site-2")
    for _ in range(2):
        engine.workflow = workflow(60.0)
        asks_for_a_task(sites, "site-2")
        assert list(dead(engine)) == ["site-1"]
        dead(engine).clear()
        asks_for_a_task(sites, "site-2")
        assert not dead(engine)


def test_a_site_that_asks_for_a_task_lives():
    engine = Engine(workflow(60.0))
    sites = EndedSites(engine, "job")
    sites.add("relay.site-1.job")
    asks_for_a_task(sites, "site-1")
    engine.workflow = workflow(60.0)
    asks_for_a_task(sites, "site-2")
    assert not dead(engine)


def test_an_absence_does_not_count_for_a_later_one(monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr(absence, "answers", lambda cell, name, seconds: False)
    monkeypatch.setattr(absence, "connected_to", lambda cell, name, seconds: ["server"])
    absences = absence.Absences(None, ended=ended.append, clock=lambda: now[0])
    assert not absences.has_ended("site-1.job")
    now[0] = 3600.0  # it was back, and nobody has asked
    assert not absences.has_ended("site-1.job")
    for now[0] in (3630.0, 3660.0):
        assert not absences.has_ended("site-1.job")
    assert not ended
    now[0] = 3691.0
    assert absences.has_ended("site-1.job")
    now[0] = 7200.0
    assert not absences.has_ended("site-2.job")
    assert list(absences._known) == ["site-2.job"], "names that a peer makes up are not kept"
    assert ended == ["site-1.job"]


def test_a_result_has_a_sender_and_other_messages_are_none():
    headers = {MessageHeaderKey.ORIGIN: "site-1.job", StreamHeaderKey.CHANNEL: CellChannel.SERVER_COMMAND}
    headers[StreamHeaderKey.TOPIC] = ServerCommandNames.SUBMIT_UPDATE
    assert sender_of_result(Message(headers)) == "site-1.job"
    assert not sender_of_result(Message({**headers, StreamHeaderKey.TOPIC: "get_task"}))
    assert not sender_of_result(Message({**headers, StreamHeaderKey.CHANNEL: "aux_communication"}))
    assert not sender_of_result(None)


@pytest.mark.parametrize(
    ("submitter", "source", "ended", "lost"),
    [
        ("site-1.job", "site-1.job", [], True),
        ("site-1.job", "site-1.job.trainer", ["site-1.job"], True),
        ("site-1.job", "site-1.job.trainer", [], False),  # its job process waits for an answer
        ("site-1.job", "site-1.job2", ["site-1.job"], False),
        ("site-2.job", "site-1.job", ["site-1.job", "site-2.job"], False),
        ("", "site-1.job", [""], False),
    ],
)
def test_a_result_is_lost_where_nobody_waits_for_an_answer(submitter, source, ended, lost):
    assert decomposers._nobody_waits(submitter, source, SimpleNamespace(has_ended=ended.__contains__)) is lost


def test_a_trainer_ends_with_its_job_process(monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr(absence, "answers", lambda cell, name, seconds: name == "site-1")
    monkeypatch.setattr(absence, "connected_to", lambda cell, name, seconds: [] if name == "site-1" else None)
    absences = absence.Absences(None, ended=ended.append, clock=lambda: now[0])
    for now[0] in (0.0, 45.0):
        assert not absences.has_ended("site-1.job.trainer")
    now[0] = 91.0
    assert absences.has_ended("site-1.job.trainer")
    assert ended == ["site-1.job"]
