"""Tied weights travel once in every round of a job, arrive tied, and are saved once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.processes import run

JOB = Path(__file__).with_name("ties_job.py")
MODEL_BYTES = 4 * (300 * 256 + 300)


@pytest.mark.flare
@pytest.mark.parametrize("how", [[], ["DIFF"]], ids=["models", "differences"])
def test_the_rounds_of_a_job_move_tied_weights_once(how, tmp_path):
    done = run(JOB, str(tmp_path), *how, timeout=200)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    for site in ("site-1", "site-2"):
        assert (tmp_path / f"tied-{site}.txt").read_text().split() == ["True"] * 3
    records = next((tmp_path / "ws").rglob("server/**/transfers.jsonl")).read_text().splitlines()
    sent = [line["wire_bytes"] for line in map(json.loads, records) if line["direction"] == "sent"]
    assert sent == [MODEL_BYTES] * 6
    assert "embed.weight and head.weight are one tensor of the model" in log
    saved = torch.load(next((tmp_path / "ws").rglob("FL_global_model.pt")), weights_only=True)["model"]
    assert torch.equal(saved["embed.weight"], saved["head.weight"])
    if not how:  # FLARE adds differences to each by itself before it saves
        assert saved["embed.weight"].data_ptr() == saved["head.weight"].data_ptr()
