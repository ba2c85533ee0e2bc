"""The command `bench` beside RDMA devices: what verbs carry is measured beside tcp and plain TCP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from nvflare_rdma.cli.bench_report import RAW
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
BENCH = [sys.executable, "-m", "nvflare_rdma.cli", "bench"]
MIB = 1 << 20


def environment(device: str) -> dict[str, str]:
    # The names of the devices for tests look like settings.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NVFLARE_")}
    return kept | {"NVFLARE_RDMA_DEVICE": device}


def test_verbs_are_measured_between_two_devices(network: Path, devices: tuple[str, str]) -> None:
    assert devices == ("rxa", "rxb"), network
    listen = [*BENCH, "--listen", "127.0.0.1:0", "--runs", "1"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(listen, cwd=ROOT, env=environment("rxb"), text=True, **pipes) as listener:
        try:
            told = ""
            while not (address := re.search(r" listens at (\S+)", told)):
                line = listener.stderr.readline()
                assert line, told
                told += line
            options = ["--fabrics", "verbs,tcp", "--codecs", "exact", "--sizes", "4", "--repeat", "1"]
            done = subprocess.run(
                [*BENCH, "--connect", address[1], *options, "--format", "json"],
                cwd=ROOT,
                env=environment("rxa"),
                capture_output=True,
                text=True,
                timeout=120 * PATIENCE,
                check=False,
            )
        finally:
            listener.kill()
            told += listener.stderr.read()
    assert done.returncode == 0, done.stdout + done.stderr + told
    found = json.loads(done.stdout)["data"]
    print(json.dumps(found["figures"], indent=1))  # for who reads the output
    assert {(each["fabric"], each["size_bytes"]) for each in found["figures"]} == {
        (fabric, 4 * MIB) for fabric in (RAW, "tcp", "verbs")
    }
    assert all(min(each["to_peer"], each["from_peer"]) > 0 for each in found["figures"])
    assert found["left_out"] == []
