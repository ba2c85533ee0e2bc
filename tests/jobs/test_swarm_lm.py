"""jobs/swarm_lm: its model, and the exported job."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from tests.support.exported import JOBS, exported_elsewhere, load, records, simulated
from tests.support.processes import run

TINY = ["--rounds", "2", "--sites", "2", "--steps", "1", "--width", "64", "--layers", "1"]


@pytest.fixture
def model():
    return load("swarm_lm", "model").ByteGRU(64, 1, seed=1)


def test_weights_follow_the_seed_and_nothing_else(model):
    torch.manual_seed(5)
    same, other = (load("swarm_lm", "model").ByteGRU(64, 1, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.state_dict()["head.weight"], other["head.weight"])


def test_steps_lower_the_loss(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "model", load("swarm_lm", "model"))
    client = load("swarm_lm", "client")
    text = torch.frombuffer(bytearray(b"def f(x):\n    return x\n" * 40), dtype=torch.uint8)
    rows = text[: 8 * 65].view(8, 65)
    before = model.loss(rows).item()
    client.train(model, torch.optim.AdamW(model.parameters(), lr=client.RATE), text, 20, seed=1)
    assert model.loss(rows).item() < 0.8 * before


def test_a_swarm_of_one_is_refused():
    done = run(JOBS / "swarm_lm" / "job.py", "--sites", "1", timeout=100)
    assert done.returncode == 2
    assert "a swarm takes two" in done.stderr


@pytest.mark.flare
def test_the_exported_job_moves_models_from_site_to_site_in_few_bits(tmp_path):
    job = exported_elsewhere(tmp_path, "swarm_lm", *TINY)
    assert {file.name for file in (job / "app" / "custom").iterdir()} == {"client.py", "model.py", "stdlib_text.py"}
    printed = simulated(job, tmp_path / "ws", 2)
    assert len(re.findall(r"held-out loss of the model that site-\d has got in round \d: \d", printed)) == 4
    assert records(tmp_path / "ws", "server") == []
    size = sum(4 * value.numel() for value in load("swarm_lm", "model").ByteGRU(64, 1).state_dict().values())
    came = [line for site in ("site-1", "site-2") for line in records(tmp_path / "ws", site)]
    assert {(line["path"], line["outcome"], line["raw_bytes"]) for line in came} == {("direct", "done", size)}
    few = [line for line in came if line["direction"] == "received" and line["wire_bytes"] < 0.3 * size]
    assert len(few) == 4  # each round, the model goes to the other site, and a result comes from there
