"""Real FLARE jobs whose quantization config is one-sided: the job stops and says what to change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nvflare_rdma

HERE = Path(__file__).parent
CASES = {
    "server does not decode results": (
        ["server-out", "client-in", "client-out"],
        [
            "config_fed_server.json has ModelQuantizer in task_data_filters for task 'train'",
            "add nvflare_rdma.filters.ModelDequantizer to task_result_filters of config_fed_server.json",
        ],
        False,
    ),
    "clients do not encode results": (
        ["server-out", "client-in", "server-in"],
        [
            "the results of task 'train' from site-",
            "add nvflare_rdma.filters.ModelQuantizer to task_result_filters of config_fed_client.json",
        ],
        True,
    ),
}


@pytest.mark.flare
@pytest.mark.parametrize("case", CASES)
def test_the_job_stops_and_names_key_and_fix(case, tmp_path):
    points, expected, trains = CASES[case]
    root = str(Path(nvflare_rdma.__file__).parents[1])
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(HERE / "one_sided_job.py"), str(tmp_path / "ws"), *points],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    log = done.stdout
    errors = "\n".join(line for line in log.splitlines() if "ERROR" in line)
    for text in expected:
        assert text in errors, log[-8000:]
    assert "Aborting current RUN due to FATAL_SYSTEM_ERROR" in log, log[-8000:]
    assert "JOB STATUS" not in log, "the job ended as if nothing had happened"
    assert done.returncode != 0
    assert ("TRAINED ON" in log) == trains
