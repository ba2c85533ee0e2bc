"""Some cases of each fuzz target, the same each time; `make fuzz` runs others, for as long as one likes."""

from __future__ import annotations

import logging
import random

import pytest

from tests.fuzz import run
from tests.fuzz.target import TARGETS, Show, Target

#: So many take a second or two.
CASES = {"connection": 4000, "codecs": 300, "journals": 100}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_what_is_declared_is_raised(name, caplog):
    caplog.set_level(logging.CRITICAL)
    assert run.MODULES
    for number in range(CASES.get(name, 3000)):
        assert TARGETS[name].attempt("ci", number) is None


def _broken(rng: random.Random, show: Show) -> None:
    number = rng.randrange(10)
    show("a number", number)
    if number == 7:
        raise KeyError(number)
    if number == 8:
        raise ValueError("as declared")


def test_a_finding_has_its_input_and_can_be_repeated():
    broken = Target("broken", _broken, (ValueError,))
    (finding, *_) = [found for number in range(200) if (found := broken.attempt("x", number))]
    assert finding.error == "KeyError: 7"
    assert finding.shown == [("a number", 7)]
    assert f"--case broken:x:{finding.number}" in str(finding)
    again = broken.attempt("x", finding.number)
    assert again is not None
    assert again.shown == finding.shown
