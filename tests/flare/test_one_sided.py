"""Real FLARE jobs whose quantization config is one-sided: the job stops and says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import WITHOUT_TORCH, run

JOB = Path(__file__).with_name("one_sided_job.py")
CASES = {
    "sites do not decode": (
        ["server-out", "server-in", "transfer"],
        [
            "site-1 has no ModelDequantizer for the data of task 'train'",
            "add nvflare_rdma.filters.ModelDequantizer to task_data_filters of the site's config_fed_client.json",
        ],
        False,
    ),
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
    done = run(JOB, str(tmp_path / "ws"), *points, timeout=120, **WITHOUT_TORCH)
    log = done.stdout + done.stderr
    errors = "\n".join(line for line in log.splitlines() if "ERROR" in line)
    for text in expected:
        assert text in errors, log[-8000:]
    assert "Aborting current RUN due to FATAL_SYSTEM_ERROR" in log, log[-8000:]
    assert "JOB STATUS" not in log, "the job ended as if nothing had happened"
    assert done.returncode != 0
    assert ("TRAINED ON" in log) == trains
