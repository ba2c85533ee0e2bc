"""jobs/gpt2_small: its model with and without transformers, its training step, and what it exports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "jobs" / "gpt2_small"
TINY = {"width": 64, "layers": 2, "heads": 1, "vocab": 300, "context": 96}


def load(name):
    """A module of the job; the name alone is another job's here."""
    spec = importlib.util.spec_from_file_location(f"gpt2_small_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    return load("model")


def test_without_transformers_it_has_the_size_of_gpt2_small(plain):
    with torch.device("meta"):
        model = plain.GPT2()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_it_is_the_model_of_transformers():
    pytest.importorskip("transformers")
    model = load("model")
    theirs = model.GPT2(**TINY, seed=1).eval()
    ours = model.PlainGPT2(**TINY, seed=2)
    assert type(theirs).__mro__[1].__name__ == "GPT2LMHeadModel"
    state = theirs.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ours, tokens), model.logits(theirs, tokens), rtol=1e-4, atol=1e-4)


def test_weights_follow_the_seed(plain):
    one, same, other = (plain.GPT2(**TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_steps_lower_the_loss(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "model", plain)
    client = load("client")
    monkeypatch.setattr(client, "RATE", 0.1)
    model = plain.GPT2(**TINY)
    text = torch.full((client.LENGTH * 8 + 1,), 101, dtype=torch.uint8)
    first = client.train(model, text, 1)
    assert client.train(model, text, 7) < 0.9 * first
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert client.train(model, text, 0) == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_exported_job_makes_the_model_on_the_server(tmp_path):
    command = [
        sys.executable,
        str(FOLDER / "job.py"),
        "--direct",
        "--sites",
        "2",
        "--workspace",
        str(tmp_path / "none"),
    ]
    done = subprocess.run(
        [*command, "--export", "--export-dir", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    app = tmp_path / "gpt2_small" / "app"
    assert {p.relative_to(app / "custom").as_posix() for p in (app / "custom").rglob("*.py")} == {
        "client.py",
        "model.py",
        "traffic/recorder.py",
        "traffic/summary.py",
        "traffic/tcp_counters.py",
    }
    for side in ("server", "client"):
        config = json.loads((app / "config" / f"config_fed_{side}.json").read_text())
        paths = {c["path"] for c in config["components"]}
        assert any(path.endswith(".RdmaTransfer") for path in paths)
        assert len(config["task_data_filters"]) == len(config["task_result_filters"]) == 1
        if side == "server":
            (persistor,) = (c for c in config["components"] if c["id"] == "persistor")
            sizes = {"width": 768, "layers": 12, "heads": 12, "vocab": 50257, "seed": 0}
            assert persistor["args"]["model"] == {"path": "model.GPT2", "args": sizes}
