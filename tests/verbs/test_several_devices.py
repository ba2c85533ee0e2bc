"""Rails spread over several devices of one machine."""

from __future__ import annotations

import subprocess

import pytest

pytest.importorskip("pyverbs.device", reason="pyverbs is not installed for this Python")

from tests.support.verbs_pair import DEADLINE, buffer, numbered, verbs_pair

SIZE, RAILS = 700_001, 4


@pytest.fixture
def both(devices):
    if devices[0] == devices[1]:
        pytest.skip("one RDMA device only")
    return ",".join(devices)


def over(pair, rail):
    """Send something over the rail; what came is right."""
    target, source = buffer(SIZE), numbered(SIZE)
    pair.active.write(rail, source, pair.passive.register(target).expose(rail, 0, SIZE, rail), rail, 0)
    assert pair.heard.landings.get(timeout=DEADLINE) == (rail, SIZE, 0)
    assert pair.said.writes.get(timeout=DEADLINE) == rail
    assert target == source


def test_rails_take_turns_on_the_devices_and_all_of_them_carry_data(devices, both):
    with verbs_pair((both, ",".join(reversed(devices))), rails=RAILS) as pair:
        for end, order in ((pair.passive, devices), (pair.active, devices[::-1])):
            assert [rail.port.info.device for rail in end._rails] == list(order) * (RAILS // 2)
        for rail in range(RAILS):
            over(pair, rail)


def test_a_device_that_is_removed_costs_its_own_rails_only(devices, both, wires):
    with verbs_pair((both, both), rails=RAILS) as pair:
        removal = subprocess.Popen(["rdma", "link", "delete", devices[0]])
        for heard in (pair.heard, pair.said):
            gone = sorted(heard.down.get(timeout=DEADLINE)[0] for _ in range(RAILS // 2))
            assert gone == list(range(0, RAILS, 2))
        for rail in range(1, RAILS, 2):
            over(pair, rail)
    assert removal.wait(DEADLINE) == 0
