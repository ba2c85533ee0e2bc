from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.fabric.options import Availability, FabricOptions
from nvflare_rdma.fabric.registry import choose, host_identity, parse_fabrics, probe
from nvflare_rdma.fabric.shm import process_memory
from tests.support.processes import ROOT

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


def test_the_reason_of_the_peer_comes_before_another_host():
    table = {"shm": OK, "tcp": OK}
    assert choose(("shm", "tcp"), table, table, True, {"shm"}) == ("shm", "")
    one_host = {"shm"}
    assert choose(("shm", "tcp"), table, table, False, one_host) == (
        "tcp",
        "shm: different host (or container network)",
    )
    assert choose(("shm", "tcp"), table, {"shm": "no memfd", "tcp": OK}, False, one_host) == (
        "tcp",
        "shm: peer: no memfd",
    )


def test_the_identity_of_a_host_is_the_same_in_another_process_of_the_user_only():
    code = "from nvflare_rdma.fabric import registry; print(registry.host_identity())"
    run = [sys.executable, "-c", code]
    mine = host_identity()
    assert len(mine) == 32
    assert subprocess.run(run, capture_output=True, text=True, timeout=30, check=True).stdout.strip() == mine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        assert host_identity() not in ("", mine)


def test_shared_memory_is_usable_here_or_says_what_is_forbidden(monkeypatch):
    assert probe(FabricOptions())["shm"] == Availability(True)

    def forbidden(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(process_memory, "read_into", forbidden)
    assert probe(FabricOptions())["shm"].usable
    monkeypatch.setattr(process_memory, "sealed_memory", forbidden)
    assert "seccomp" in probe(FabricOptions())["shm"].reason
    assert not probe(FabricOptions())["shm"].usable


def test_every_fabric_has_a_reason_or_is_usable():
    table = probe(FabricOptions())
    assert table["tcp"].usable
    assert all(state.usable or state.reason for state in table.values())


@pytest.mark.parametrize("value", ["", "  ,", "tcp,ib", "TCPP"])
def test_a_bad_list_of_fabrics_names_what_is_allowed(value):
    with pytest.raises(ConfigError, match="Allowed: a comma-separated list of verbs, shm, tcp"):
        parse_fabrics(value)


def test_names_are_trimmed_and_case_does_not_matter():
    assert parse_fabrics(" TCP , verbs ") == ("tcp", "verbs")


@pytest.mark.parametrize("error", ["ImportError('no libibverbs')", "ValueError('size changed')", "SystemError()"])
def test_a_pyverbs_that_is_broken_is_a_reason_and_no_crash(error, tmp_path):
    """Compiled modules that were not built for each other raise what they like."""
    (tmp_path / "pyverbs").mkdir()
    (tmp_path / "pyverbs/__init__.py").write_text(f"raise {error}")
    script = "from nvflare_rdma.fabric.verbs.availability import pyverbs_reason; print(pyverbs_reason())"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pyverbs can't be loaded by Python")
    assert error in done.stdout
