"""A workflow that does not wait for its slowest site: what comes late is in no sum, and is not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.encoded import as_encoded
from tests.support.processes import run

JOB = Path(__file__).with_name("late_job.py")
ROUNDS = 3


@pytest.mark.flare
@pytest.mark.parametrize("codec", ["normfloat4", "none"])
def test_a_result_of_an_earlier_round_is_in_no_sum(codec, tmp_path):
    done = run(JOB, str(tmp_path), codec, timeout=240, NVFLARE_RDMA_MEMORY_BUDGET_BYTES=str(1 << 20))
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    for expected in range(1, ROUNDS):
        assert f"discarding DXO from site-3 at round: {expected - 1}. Current round is: {expected}" in log
    for number in range(1, ROUNDS):
        mean = {}
        for site in (1, 2):
            sent = torch.load(tmp_path / f"site-{site}-{number - 1}.pt", weights_only=True)["sent"]
            for name, value in sent.items():
                mean[name] = mean.get(name, 0) + there(value, codec) * site / 3
        for site in (1, 2):
            got = torch.load(tmp_path / f"site-{site}-{number}.pt", weights_only=True)["received"]
            for name, value in mean.items():
                expected = there(value, codec).reshape(got[name].shape)
                # The mean may be rounded to the codec's other neighbour, here and there.
                assert (got[name] - expected).abs().quantile(0.999) < 1e-5
                assert (got[name] - expected).abs().max() < 10
    lines = next((tmp_path / "ws").rglob("server/**/transfers.jsonl")).read_text().splitlines()
    records = [line for line in map(json.loads, lines) if line["direction"] == "received"]
    assert [line["outcome"] for line in records] == ["done"] * len(records)
    late = [line for line in records if line["peer"].startswith("site-3")]
    assert len(late) >= ROUNDS - 1


def there(value: torch.Tensor, codec: str) -> torch.Tensor:
    """What a receiver has of it."""
    return value if codec == "none" else torch.from_numpy(as_encoded(value, codec))
