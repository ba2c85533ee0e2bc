"""FLARE's hello-pt with quantization in all of its three tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import run


@pytest.mark.flare
def test_training_evaluation_and_submission_in_few_bits(tmp_path):
    done = run(Path(__file__).with_name("hello_pt_job.py"), str(tmp_path), timeout=200)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    assert "AttributeError" not in log
    assert "has quantized nothing" not in log
    results = json.loads(next((tmp_path / "ws").rglob("cross_val_results.json")).read_text())
    assert set(results) == {"site-1", "site-2"}
    for found in results.values():
        assert found["site-1"]["mean"] == pytest.approx(0.5, abs=0.01)
        assert found["site-2"]["mean"] == pytest.approx(1.0, abs=0.01)
        (server,) = (value for name, value in found.items() if name.startswith("SRV_"))
        assert server["mean"] == pytest.approx(0.75, abs=0.01)
    # The model and the two sites' own go to two sites to be evaluated; each site trains one and submits one.
    assert log.count("Quantized to blockwise8") == 2 + 2 + 2 + 3 * 2
