"""A parent's port in FLARE: whose job processes and sites it joins, and until when."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import SMALL, run


def run_cells(folder, scheme):
    done = run(SMALL / "parent_cells.py", str(folder), scheme, timeout=100, NVFLARE_RDMA_FABRICS="tcp")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return {**json.loads((folder / "results.json").read_text()), "log": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_cells(tmp_path_factory.mktemp("parents"), "tcp")


def test_where_no_parent_joins_anything_the_port_is_the_job_process_s(told):
    assert told["before"] == {"port": told["door"], "through": False}


def test_job_processes_are_reached_and_sites_meet_at_the_server_s_port(told):
    assert told["ways"] == ["tcp, no TLS, through the server"] * 3
    assert told["routes"] == ["server.a", "server.b", "site-1"]
    assert f"server joins the direct links of all its jobs at port {told['door']}" in told["log"]
    assert f"server.a waits for peers at port {told['door']} of server" in told["log"]
    assert f"server.a has no data port: port {told['door']} is its parent's" in told["log"]


def test_routes_end_with_their_job(told):
    assert told["left"] == ["site-1"]


def test_flare_s_own_port_does_where_the_driver_has_it(tmp_path):
    told = run_cells(tmp_path, "rdma")
    assert told["ways"] == ["tcp, no TLS, through the server"] * 3
    assert told["routes"] == ["server.a", "server.b", "site-1"]
    assert "server joins the direct links of all its jobs at FLARE's own port" in told["log"]
    assert f"server.a waits for peers at port {told['port']} of server" in told["log"]
