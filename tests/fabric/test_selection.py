from __future__ import annotations

import pytest

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.fabric.selection import choose, parse_fabrics, probe

OK, NO_DEVICE = "", "no device"


@pytest.mark.parametrize(
    ("own", "peer", "name", "passed"),
    [
        ({"verbs": OK, "tcp": OK}, {"verbs": OK, "tcp": OK}, "verbs", ""),
        ({"verbs": NO_DEVICE, "tcp": OK}, {"verbs": OK, "tcp": OK}, "tcp", "verbs: no device"),
        ({"verbs": OK, "tcp": OK}, {"verbs": NO_DEVICE, "tcp": OK}, "tcp", "verbs: peer: no device"),
        ({"verbs": OK, "tcp": OK}, {"tcp": OK}, "tcp", "verbs: peer does not offer it"),
        ({"verbs": OK}, {"tcp": OK}, "", "verbs: peer does not offer it; tcp: not asked for"),
    ],
)
def test_the_best_common_fabric_is_chosen_and_the_others_are_explained(own, peer, name, passed):
    assert choose(("verbs", "tcp"), own, peer, same_host=True) == (name, passed)


def test_every_fabric_has_a_reason_or_is_usable():
    table = probe()
    assert table["tcp"].usable
    assert all(state.usable or state.reason for state in table.values())


@pytest.mark.parametrize("value", ["", "  ,", "tcp,ib", "TCPP"])
def test_a_bad_list_of_fabrics_names_what_is_allowed(value):
    with pytest.raises(ConfigError, match="Allowed: a comma-separated list of verbs, shm, tcp"):
        parse_fabrics(value)


def test_names_are_trimmed_and_case_does_not_matter():
    assert parse_fabrics(" TCP , verbs ") == ("tcp", "verbs")


def test_shared_memory_is_for_one_host():
    both = {"shm": OK, "tcp": OK}
    assert choose(("shm", "tcp"), both, both, same_host=True) == ("shm", "")
    assert choose(("shm", "tcp"), both, both, same_host=False)[0] == "tcp"
    assert "different host" in choose(("shm", "tcp"), both, both, same_host=False)[1]
