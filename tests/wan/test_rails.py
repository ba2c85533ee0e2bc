"""A link opens as many rails as its path needs, and few where that is short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.apart import found_apart


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_apart(Path(__file__).with_name("rails.py"), tmp_path_factory.mktemp("rails"), 200)


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
