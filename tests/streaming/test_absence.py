"""What tells that a peer has ended, and that a result is still on its way."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.wf_comm_server import WFCommServer

from nvflare_rdma.flare_compat import report_ended
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


def reported(grace: float):
    """A workflow of FLARE's that has heard of a site's end, with that `dead_client_grace_period`."""
    communicator = WFCommServer()
    communicator._dead_client_grace = grace
    workflow = SimpleNamespace(controller=SimpleNamespace(communicator=communicator))
    runner = SimpleNamespace(current_wf=workflow, handle_dead_job=communicator.process_dead_client_report)
    context = FLContext()
    context.set_prop(FLContextKey.RUNNER, runner, private=True, sticky=False)
    report_ended(context, "site-1", 60.0)
    return communicator, context


@pytest.mark.parametrize(("grace", "left"), [(3660.0, 60.0), (60.0, 60.0), (5.0, 5.0)])
def test_a_workflow_waits_a_minute_for_a_site_that_has_ended_and_not_the_patience(grace, left):
    communicator, context = reported(grace)
    counted_from = communicator._dead_clients["site-1"].report_time
    assert counted_from + grace == pytest.approx(time.time() + left, abs=30)
    report_ended(context, "site-1", 3600.0)
    assert communicator._dead_clients["site-1"].report_time == counted_from, "a later report lengthens nothing"


def test_a_sign_of_life_of_such_a_site_counts_as_always():
    communicator, context = reported(3600.0)
    communicator.client_is_active("site-1", "it has asked for a task", context)
    assert not communicator._dead_clients


def test_nobody_is_told_before_a_workflow_runs():
    context = FLContext()
    report_ended(context, "site-1", 60.0)
    context.set_prop(FLContextKey.RUNNER, SimpleNamespace(current_wf=None), private=True, sticky=False)
    report_ended(context, "site-1", 60.0)
