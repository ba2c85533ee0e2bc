"""Wires are as slow, as long and as lossy as they were asked to be. How fast this machine is plays no part in it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.apart import found_apart
from tests.wan.traffic import LENGTH, PACKETS

MS = 1_000_000
TAKES = 9.6 * MS  # a packet, on the wire of 1 Mbit/s


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_apart(Path(__file__).with_name("traffic.py"), tmp_path_factory.mktemp("wires"), 120)


def test_packets_are_put_on_the_wire_one_after_another(found):
    carried = [(came, due) for came, due, length, fate in found["timed"]["packets"] if fate == "carried"]
    assert {length for _, _, length, _ in found["timed"]["packets"]} == {LENGTH}
    assert len(carried) > 5
    free = 0
    for came, due in carried:
        assert due - 30 * MS == pytest.approx(max(came, free) + TAKES, abs=1000)
        free = due - 30 * MS


def test_no_packet_comes_before_it_can(found):
    came = found["timed"]["came"]
    sent = [sent for sent, _ in came]
    assert sent == sorted(sent), "they come in order"
    for before, after in came:
        assert after - before >= TAKES + 30 * MS
    first, last = came[0][0], came[-1][1]
    assert last - first >= len(came) * TAKES + 30 * MS


def test_what_would_wait_for_longer_than_the_queue_is_dropped(found):
    free = 0.0
    for came, due, _, fate in found["timed"]["packets"]:
        waits = max(0.0, free - came)
        assert (fate == "dropped") == (waits > 100 * MS)
        if fate == "carried":
            free = due - 30 * MS
    assert len(found["timed"]["came"]) == sum(fate == "carried" for *_, fate in found["timed"]["packets"])
    assert any(fate == "dropped" for *_, fate in found["timed"]["packets"])


@pytest.mark.parametrize(("name", "least", "most"), [("random", 0.039, 0.061), ("bursty", 0.02, 0.08)])
def test_as_many_packets_are_lost_as_was_asked(found, name, least, most):
    got = found["lossy"][name]
    assert len(got["fates"]) == PACKETS
    assert got["lost"] == got["fates"].count("l") == PACKETS - got["came"]
    assert least * PACKETS < got["lost"] < most * PACKETS


@pytest.mark.parametrize(("name", "least", "most"), [("random", 1.0, 1.2), ("bursty", 5.0, 11.0)])
def test_losses_come_in_bursts_of_the_length_that_was_asked(found, name, least, most):
    runs = [len(list(run)) for fate, run in itertools.groupby(found["lossy"][name]["fates"]) if fate == "l"]
    assert least < sum(runs) / len(runs) < most


def test_the_same_seed_loses_the_same_packets(found):
    assert found["lossy"]["random"]["fates"] == found["lossy"]["again"]["fates"]
    assert found["lossy"]["random"]["fates"] != found["lossy"]["bursty"]["fates"]


def test_tcp_goes_through_with_the_congestion_control_that_was_asked(found):
    assert found["streams"]["open"] == {"here": "cubic", "there": "cubic", "same": True}
    assert found["streams"]["payload"] >= 1 << 20


def test_a_firewall_and_a_dead_wire_answer_nothing(found):
    nothing = {"refused": "nothing answered"}
    assert found["streams"]["shut"] == nothing
    assert found["streams"]["blocked"] > 0
    assert found["streams"]["opened"]["same"]
    assert found["streams"]["dead"] == nothing
