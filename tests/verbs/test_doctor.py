"""The doctor beside RDMA devices: it is right about those of the guest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
# The second time as another user, who may not see this Python: all that is needed has been imported by then.
TWICE = """
import os, resource, sys
from nvflare_rdma.cli import main
main(["doctor"])
print("as nobody")
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(main(["doctor"]))
"""


def run(*command: str, **settings: str) -> str:
    # The names of the devices for tests look like settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NVFLARE_")}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def line(text: str, start: str) -> str:
    """The entry that begins so, in one line."""
    lines = iter(text.splitlines())
    found = [each for each in lines if each.startswith(start)]
    assert len(found) == 1, text
    following = text[text.index(found[0]) + len(found[0]) + 1 :].splitlines()
    for each in following:
        if not each.startswith(" " * 16):
            break
        found.append(each.strip())
    return " ".join(found)


@pytest.fixture
def guest(network: Path, devices: tuple[str, str]) -> None:
    assert devices == ("rxa", "rxb")


@pytest.mark.usefixtures("guest")
def test_software_devices_are_shown_and_not_used_by_themselves() -> None:
    text = run("-m", "nvflare_rdma.cli", "doctor")
    assert "  rxa port 1: ACTIVE, software RoCE, 10 Gb/sec\n" in text
    assert "    va            MTU 9000: packets of 4096 bytes fit\n" in text
    assert text.count("    packets       of 4096 bytes\n") >= 2
    assert "    GID 1         10.8.0.1 (RoCE v2 on va), would be chosen: RoCE v2, routable IPv4\n" in text
    assert "rdma-core " in line(text, "  pyverbs")
    assert "loaded: ib_core, ib_uverbs, rdma_rxe" in line(text, "  kernel modules")
    assert line(text, "verbs ").startswith("verbs    no      only software RDMA here (rxa, rxb")
    assert "rdma_device=rxa" in line(text, "verbs ")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.usefixtures("guest")
def test_a_software_device_that_is_named_is_used_if_enough_memory_can_be_locked() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    text, _, as_nobody = run("-c", TWICE, NVFLARE_RDMA_DEVICE="rxa").partition("as nobody\n")
    assert "  rxa port 1: ACTIVE, software RoCE, 10 Gb/sec, chosen\n" in text
    assert "    GID 1         10.8.0.1 (RoCE v2 on va), chosen: RoCE v2, routable IPv4\n" in text
    assert line(text, "verbs ") == (
        "verbs    yes     rxa port 1 (software RoCE, 10 Gb/sec), GID 1 (RoCE v2, 10.8.0.1 on va)"
    )
    reason = line(as_nobody, "verbs ")
    assert reason.startswith("verbs    no      this process may lock 64 KiB of memory (RLIMIT_MEMLOCK)")
    assert "`ulimit -l unlimited`" in reason


@pytest.mark.usefixtures("guest")
def test_two_hosts_see_what_their_devices_carry() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NVFLARE_")}
    command = [sys.executable, "-m", "nvflare_rdma.cli", "doctor", "--listen", "0"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environment |= {"NVFLARE_RDMA_DEVICE": "rxb"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as listener:
        try:
            told = ""
            while " listens at " not in told:
                told = listener.stderr.readline()
                assert told
            address = re.search(r"listens at (\S+)", told)[1]
            text = run("-m", "nvflare_rdma.cli", "doctor", "--peer", address, NVFLARE_RDMA_DEVICE="rxa")
        finally:
            listener.kill()
    assert line(text, "  a job's link") == f"  a job's link    verbs, no TLS, port {address.rpartition(':')[2]}"
    for fabric in ("verbs", "shm", "tcp"):
        assert re.search(rf"^{fabric} +yes +\d\S* .B/s .* \d\S* .B/s ", text, re.MULTILINE), text
    assert "All is well." in text
