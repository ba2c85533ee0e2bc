"""A firewall that lets FLARE's own connection through, and drops what comes to the data ports."""

from __future__ import annotations

import pytest

from tests.support import namespaces


@pytest.fixture
def apart():
    namespaces.require(
        "ip link add near type veth peer name far && ip rule add pref 50 ipproto tcp dport 1-2 blackhole"
    )


def test_data_ports_that_answer_nothing(apart, tmp_path):
    results = namespaces.run_apart("cells_apart.py", tmp_path, 100)
    dropped, again, through = results["firewall"], results["again"], results["open"]
    assert [(got["code"], got["same"]) for got in (dropped, again, through)] == [("ok", True)] * 3
    (line,) = dropped["log"]
    assert "tensors from server come on FLARE's own path" in line
    assert "10.9.0.1:20000: timed out" in line
    assert "s ago" not in line
    assert "rdma_data_ports" in line
    assert again["log"] == []  # it was said
    assert "10.9.0.1:20000: timed out" in again["reason"]
    assert "s ago" in again["reason"]  # nobody waits for that again
    line, *received = through["log"]  # nothing but the firewall was in the way
    assert "data goes over tcp" in line
    assert all("from server directly: " in line for line in received)
