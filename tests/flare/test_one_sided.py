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


@pytest.mark.flare
def test_a_wrong_setting_is_said_in_the_other_side_s_log(tmp_path):
    """The job goes on without the transfer; a site's user sees in his own log what is wrong at the server."""
    done = run(JOB, str(tmp_path / "ws"), "transfer", timeout=120, NVFLARE_RDMA_RAILS="99", **WITHOUT_TORCH)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    line = "so its tensors take FLARE's own path: rdma_rails=99 is out of range. Allowed: 1 to"
    said = [text for text in log.splitlines() if line in text]
    assert [text for text in said if "RdmaTransfer does not run at site-1" in text], log[-8000:]
    assert [text for text in said if "RdmaTransfer does not run at simulator_server" in text]
    assert len(said) == 2, said
