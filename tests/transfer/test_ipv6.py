"""Hosts that have IPv6 only: FLARE's connection by the driver, and links for tensors."""

from __future__ import annotations

import pytest

from tests.support import namespaces
from tests.support.waiting import PATIENCE


@pytest.fixture
def apart():
    namespaces.require(
        "ip link add near type veth peer name far && ip address add fd00:9::1/64 dev near nodad && "
        "mount --bind /etc/hosts /etc/hosts"
    )


def test_two_hosts_with_ipv6_only(apart, tmp_path):
    results = namespaces.run_apart("cells_ipv6.py", tmp_path, 100 * PATIENCE)
    assert results["get"]
    assert results["put"]["same"]
    assert results["paths"] == ["direct", "direct"]
    assert results["to"] == "fd00:9::1"
    assert results["frames"] == "[fd00:9::1]:8002"
    # To others it names this address, and not the one that is good on this link only.
    assert results["put"]["named"] == ["fd00:9::1"]
    assert "server listens for data on port 20000" in "\n".join(results["put"]["log"])
