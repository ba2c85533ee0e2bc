"""A link opens as many rails as its path needs, and few where that is short."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.processes import ROOT, environment
from tests.wan import wire


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if reason := wire.why_not():
        pytest.skip(f"no wires here: {reason}")
    folder = tmp_path_factory.mktemp("rails")
    command = wire.apart(sys.executable, str(ROOT / "tests" / "wan" / "rails.py"), str(folder))
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("where", ["far", "near", "here"])
def test_few_rails_are_opened_before_much_is_to_be_moved(found, where):
    assert found[where]["right"]
    assert found[where]["opened"] == found[where]["after little"] == [2, 2]


def test_a_long_and_lossy_path_gets_as_many_rails_as_both_sides_allow(found):
    assert found["far"]["after much"] == [12, 12]
    assert found["far"]["granted over"] == list(range(12))


@pytest.mark.parametrize("where", ["near", "here"])
def test_a_short_path_gets_no_more(found, where):
    assert found[where]["after much"] == [2, 2]
