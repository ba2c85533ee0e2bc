"""What `make test-verbs` leaves out, and what it makes of the results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import run_tests
import selection
import speed

TEST = "tests/verbs/test_faults.py::test_a_peer_that_is_killed"
COLLECTED = [f"{test}[{each}]" for test, parameters in selection.CHOSEN.items() for each in parameters]


def test_what_is_not_listed_runs_and_the_order_stays():
    others = ["tests/verbs/test_new.py::test_one", "tests/verbs/test_new.py::test_two[a]"]
    more = [*others, *COLLECTED, f"{TEST}[receiver-verbs-iwarp]", f"{TEST}[sender-verbs]"]
    assert selection.chosen(more) == [*others, *COLLECTED]


def test_a_test_that_is_gone_or_renamed_is_noticed():
    with pytest.raises(ValueError, match=r"test_a_peer_that_is_killed\[receiver-verbs\]"):
        selection.chosen([test for test in COLLECTED if test != f"{TEST}[receiver-verbs]"])


def test_each_group_keeps_its_own():
    groups = {"verbs": COLLECTED[:9], "conformance": [*COLLECTED[9:], f"{TEST}[sender-verbs]"]}
    assert run_tests.choose(groups) == {"verbs": COLLECTED[:9], "conformance": COLLECTED[9:]}


CASE = '<testcase classname="c" name="n">{}</testcase>'
SKIPPED = CASE.format('<skipped message="no iWARP (siw) device"/>')


@pytest.mark.parametrize(
    ("cases", "collected", "siw", "passed"),
    [
        ([CASE.format("")] * 2, 2, True, True),
        ([CASE.format("")] * 2, 3, True, False),
        ([CASE.format(""), CASE.format('<failure message="wrong"/>')], 2, True, False),
        ([CASE.format(""), SKIPPED], 2, True, False),
        ([CASE.format(""), SKIPPED], 2, False, True),
    ],
    ids=["all passed", "one did not run", "one failed", "one skipped", "one skipped for want of siw"],
)
def test_only_if_all_have_passed_the_run_has(tmp_path, cases, collected, siw, passed):
    junit = tmp_path / "junit.xml"
    junit.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert (run_tests.judge(junit, collected, siw) == []) == passed


def test_limits_grow_with_the_time_that_the_work_takes(tmp_path, monkeypatch, capsys):
    for seconds, factor, limits in (
        (speed.REFERENCE / 2, "1.00", ("RDMA_TEST_PATIENCE=5 PYTEST_TIMEOUT=300", "faulthandler_timeout=150")),
        (speed.REFERENCE * 2.5, "2.50", ("RDMA_TEST_PATIENCE=13 PYTEST_TIMEOUT=750", "faulthandler_timeout=375")),
        (speed.REFERENCE * 20, "20.00", ("RDMA_TEST_PATIENCE=20 PYTEST_TIMEOUT=1200", "faulthandler_timeout=600")),
    ):
        clock = iter((0.0, seconds))
        monkeypatch.setattr(speed.time, "monotonic", lambda clock=clock: next(clock))
        monkeypatch.setattr(sys, "argv", ["speed.py", str(tmp_path / "speed")])
        speed.main()
        monkeypatch.undo()
        assert (tmp_path / "speed").read_text() == f"{factor}\n"
        told = capsys.readouterr().out
        assert all(limit in told for limit in limits)
