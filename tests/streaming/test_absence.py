"""What tells that a peer has ended, and that a result is still on its way."""

from __future__ import annotations

import json

import pytest

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
