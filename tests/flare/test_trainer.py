"""A training script in a process of its own (`launch_external_process`) gets and sends its model directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import WITHOUT_TORCH, run

JOB = Path(__file__).with_name("trainer_job.py")


@pytest.mark.flare
def test_a_trainers_model_comes_from_the_server_and_goes_there(tmp_path):
    done = run(JOB, str(tmp_path), timeout=120, **WITHOUT_TORCH)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    initial, received, sent = (np.load(tmp_path / f"{name}.npy") for name in ("initial", "received", "sent"))
    np.testing.assert_array_equal(received, initial)
    np.testing.assert_array_equal(np.load(next((tmp_path / "ws").rglob("server.npy"))), sent)

    server, site = ((tmp_path / "ws" / "array" / name / "log.txt").read_text() for name in ("server", "site-1"))
    opened = [line.split(" - ", 3)[-1] for line in server.splitlines() if "data goes over" in line]
    assert opened == [
        "data server.simulate_job - site-1.simulate_job.client_api_trainer_1: data goes over shm, 1 rails"
    ]
    assert "data goes over" not in site
    # The model that the server has fetched, which FLARE logs at its end, with the size that moved directly.
    assert [line.rsplit("(", 1)[1] for line in server.splitlines() if "download ref=rdma1-" in line] == [
        "2,000,000 bytes)"
    ]
