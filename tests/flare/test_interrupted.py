"""A job whose process is killed leaves no simulator and no site behind."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from tests.support.processes import ROOT, environment
from tests.support.waiting import eventually

JOB = ROOT / "jobs" / "stdlib_lm" / "job.py"
ENDLESS = ["--quantize", "none", "--sites", "2", "--width", "64", "--layers", "1", "--steps", "1000000"]


def of_this_run(folder: str) -> list[psutil.Process]:
    """Processes that have ``folder`` in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(folder in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.flare
def test_nothing_runs_on_after_the_job_was_killed(tmp_path):
    command = [sys.executable, str(JOB), *ENDLESS, "--workspace", str(tmp_path)]
    with open(tmp_path / "job.log", "wb") as log:
        job = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=log, stderr=log)
    try:

        def sites_run() -> bool:
            assert job.poll() is None, (tmp_path / "job.log").read_text()
            return len([p for p in of_this_run(str(tmp_path)) if "simulator_worker" in " ".join(p.cmdline())]) >= 2

        eventually(sites_run, 90)
        # They may all have ended by the time that the job's end is seen here; and what is started until then counts.
        left = {process for process in of_this_run(str(tmp_path)) if process.pid != job.pid}
        assert left, "the simulator was gone before it could be tested"
        job.kill()
        job.wait(timeout=60)
        _, alive = psutil.wait_procs(left | {*of_this_run(str(tmp_path))}, timeout=60)
        assert not alive, [" ".join(p.cmdline()) for p in alive]
    finally:
        job.kill()
        for process in of_this_run(str(tmp_path)):
            process.kill()
