"""The limit of locked memory as the kernel sets it: each case is a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nvflare_rdma.fabric.verbs import memlock
from nvflare_rdma.fabric.verbs.memlock import memlock_needed, memlock_reason

KIB, MIB = 1024, 1024 * 1024
NOBODY = 65534
UNLIMITED = resource.RLIM_INFINITY
ROOT = Path(__file__).parents[3]
CODE = """
import os, resource, sys
sys.path.insert(0, sys.argv[3])
from nvflare_rdma.fabric.verbs import memlock  # now: the other user may not be able to see it
limit, user = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
print(memlock.memlock_limit())
print(memlock.memlock_reason(int(sys.argv[4])))
"""


def in_process(limit: int, user: int = 0, *prefix: str, budget: int = 64 * MIB) -> tuple[str, str]:
    """What a process with that limit of that user says: its limit, and its reason for ``budget``."""
    result = subprocess.run(
        [*prefix, sys.executable, "-I", "-S", "-c", CODE, str(limit), str(user), str(ROOT), str(budget)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "not allowed to raise maximum limit" in result.stderr:
        pytest.skip("this process may not raise the limit")
    assert result.returncode == 0, result.stderr
    said, reason = result.stdout.split("\n")[:2]
    return said, reason


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@as_root
@pytest.mark.parametrize(("limit", "budget"), [(64 * KIB, 64 * MIB), (64 * KIB, MIB), (6 * MIB - 1, 2 * MIB)])
def test_a_user_with_a_limit_is_told_how_to_raise_it(limit, budget):
    said, reason = in_process(limit, NOBODY, budget=budget)
    assert said == str(limit)
    assert (
        f"may lock {limit // KIB} KiB of memory (RLIMIT_MEMLOCK), RDMA needs {2 * budget // KIB + 2048} KiB" in reason
    )
    assert f"for rdma_memory_budget_bytes={budget}: run `ulimit -l unlimited`" in reason


@as_root
@pytest.mark.parametrize(("limit", "budget"), [(4 * MIB, MIB), (6 * MIB, 2 * MIB), (UNLIMITED, 1 << 40)])
def test_a_user_with_enough_needs_nothing(limit, budget):
    assert in_process(limit, NOBODY, budget=budget) == ("None" if limit == UNLIMITED else str(limit), "")


@as_root
def test_root_has_no_limit():
    if memlock.memlock_limit() is not None:
        pytest.skip("this root has no CAP_IPC_LOCK")
    assert in_process(64 * KIB) == ("None", "")


@as_root
def test_root_without_the_capability_has_the_limit():
    said, reason = in_process(64 * KIB, 0, "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-all")
    assert said == str(64 * KIB)
    assert reason


def test_root_of_a_namespace_of_its_own_has_the_limit():
    """As in a rootless container: the kernel asks for the capability in the first namespace (ib_umem_get)."""
    unshare = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are not allowed here")
    said, reason = in_process(64 * KIB, 0, *unshare)
    assert said == str(64 * KIB)
    assert reason


@pytest.mark.parametrize("limit", [0, 64 * KIB, 4 * MIB - 1, 4 * MIB, 8 * MIB, 100 * MIB + 1])
def test_a_lower_budget_is_named_only_if_it_is_enough(monkeypatch, limit):
    monkeypatch.setattr(memlock, "memlock_limit", lambda: limit)
    _, lower, budget = memlock_reason(64 * MIB).partition("lower rdma_memory_budget_bytes to ")
    assert bool(lower) == (limit >= 4 * MIB)
    if lower:
        fits = int(budget.split()[0])
        assert fits >= MIB  # the least that is allowed
        assert memlock_reason(fits) == ""
        assert memlock_needed(fits) <= limit
