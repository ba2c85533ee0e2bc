"""A job in FLARE's simulator whose tensors go from process to process."""

import json
from pathlib import Path

import pytest
from processes import run

JOB = Path(__file__).parents[2] / "jobs" / "stdlib_lm" / "job.py"
SMALL_JOB = ["--rounds", "2", "--sites", "2", "--steps", "2", "--width", "256", "--layers", "1"]


@pytest.mark.flare
def test_models_and_results_go_directly(tmp_path):
    options = [*SMALL_JOB, "--quantize", "normfloat4", "--direct", "--driver", "grpc", "--workspace", str(tmp_path)]
    done = run(JOB, *options, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    moved = 2 * results["model_bytes"] * 0.1406
    for row in results["rounds_table"]:
        assert moved < row["bytes_down"] < moved + 100_000
        assert moved < row["bytes_up"] < moved + 100_000
    assert results["final_loss"] < results["initial_loss"]
    server = (tmp_path / "stdlib_lm" / "server" / "log.txt").read_text()
    assert "listens for data on port" in server
    assert "FLARE's own path" not in server
    for site in ("site-1", "site-2"):
        log = (tmp_path / "stdlib_lm" / site / "log.txt").read_text()
        assert "data goes over tcp" in log
        assert "FLARE's own path" not in log
