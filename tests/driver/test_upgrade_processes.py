"""Upgraded and old cells in processes of their own: FLARE finds the driver, takes it, and connects again."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from nvflare_rdma.channel.protocol import VERSION
from nvflare_rdma.driver.upgrade import FLARES, OURS, alpn
from tests.driver.test_two_processes import PEER, SIZES, assert_all_equal
from tests.support.certificates import Authority
from tests.support.processes import SMALL, WITHOUT_TORCH, background, environment, free_port, run
from tests.support.waiting import eventually

ALPN = alpn(VERSION)
UPGRADED = {"NVFLARE_RDMA_UPGRADE": "true"}
OLD: dict[str, str] = {}
TAKEN = "rdma_upgrade is set: the schemes tcp and stcp are nvflare-rdma's in this process"


def spoken(log: str) -> list[str]:
    return [re.split(r"\d: ", line, maxsplit=1)[1] for line in log.splitlines() if "is spoken with" in line]


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "mTLS"])
@pytest.mark.parametrize(("its", "own"), [(UPGRADED, UPGRADED), (UPGRADED, OLD), (OLD, UPGRADED)])
def test_cells_that_are_upgraded_and_cells_that_are_not(tmp_path, its, own, secure):
    server: dict = {}
    client: dict = {"sizes": SIZES, "connect_deadline": 20.0}
    if secure:
        authority = Authority(tmp_path / "pki")
        server["credentials"] = authority.issue("server", "server")
        client["credentials"] = authority.issue("client", "site-1")
    url = f"tcp://127.0.0.1:{free_port()}"
    log = tmp_path / "server.log"
    with background(PEER, "serve", url, json.dumps(server), log=log, **WITHOUT_TORCH, **its):
        done = run(PEER, "ask", url, json.dumps(client), timeout=60, **WITHOUT_TORCH, **own)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert_all_equal(result, SIZES)
    assert result["peer_cn"] == ("server" if secure else None)
    for side, said in ((its, log.read_text()), (own, done.stderr)):
        assert (TAKEN in said) is bool(side)
        assert len(spoken(said)) == bool(side)
        assert all(line.startswith(OURS if its and own else FLARES) for line in spoken(said))
        assert all((ALPN in line.split(" as ")[-1]) is secure for line in spoken(said) if its and own)
        assert "Traceback" not in said
    if its and own and not secure:
        assert "data goes over shm" in done.stderr


@pytest.mark.parametrize(("first", "then"), [(OLD, UPGRADED), (UPGRADED, OLD)], ids=["upgrade", "downgrade"])
def test_a_server_is_replaced_and_flare_connects_again(tmp_path, first, then):
    """A rolling upgrade, as an upgraded site sees it, and back."""
    url = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, str(PEER), "ask_twice", url, "{}"]
    log = tmp_path / "client.log"
    with open(log, "wb") as err:
        client = subprocess.Popen(
            *(command,),
            env=environment(**WITHOUT_TORCH, **UPGRADED),
            cwd=SMALL,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
        )
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        with background(PEER, "serve", url, "{}", log=tmp_path / "1.log", **WITHOUT_TORCH, **first) as server:
            assert client.stdout.readline() == b"true\n", log.read_text()
            server.kill()
            server.wait(60)
        with background(PEER, "serve", url, "{}", log=tmp_path / "2.log", **WITHOUT_TORCH, **then):
            client.stdin.write(b"\n")
            client.stdin.flush()
            assert client.stdout.readline() == b"true\n", log.read_text()
            said = spoken(log.read_text())
    finally:
        client.kill()
        client.communicate(timeout=60)
    assert [line.startswith(OURS) for line in said] == [bool(first), bool(then)], said


def test_a_site_is_replaced_and_the_server_goes_on(tmp_path):
    """The same, as an upgraded server sees it: one site after the other, old, upgraded, old."""
    url, log = f"tcp://127.0.0.1:{free_port()}", tmp_path / "server.log"
    options = json.dumps({"sizes": [300_000], "connect_deadline": 20.0})
    with background(PEER, "serve", url, "{}", log=log, **WITHOUT_TORCH, **UPGRADED):
        for own in (OLD, UPGRADED, OLD):
            done = run(PEER, "ask", url, options, timeout=60, **WITHOUT_TORCH, **own)
            assert_all_equal(json.loads(done.stdout), [300_000])
        said = eventually(lambda: len(found := spoken(log.read_text())) == 3 and found)
    assert [line.startswith(OURS) for line in said] == [False, True, False], said


def test_where_the_scheme_is_grpc_nothing_changes(tmp_path):
    url, log = f"grpc://127.0.0.1:{free_port()}", tmp_path / "server.log"
    options = json.dumps({"sizes": [1, 300_000], "connect_deadline": 20.0})
    with background(PEER, "serve", url, "{}", log=log, **WITHOUT_TORCH, **UPGRADED):
        done = run(PEER, "ask", url, options, timeout=60, **WITHOUT_TORCH, **UPGRADED)
    assert_all_equal(json.loads(done.stdout), [1, 300_000])
    for said in (done.stderr, log.read_text()):
        mine = [line for line in said.splitlines() if "nvflare_rdma" in line]
        assert len(mine) == 1
        assert TAKEN in mine[0]
        assert "grpc://" in said
