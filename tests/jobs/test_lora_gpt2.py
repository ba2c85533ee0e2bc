"""jobs/lora_gpt2: its model and adapters, and the exported job."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.exported import JOBS, exported_elsewhere, load, records, simulated

REASON = "jobs/lora_gpt2 needs transformers and peft: pip install 'nvflare-rdma[peft]'"
pytest.importorskip("transformers", reason=REASON)
pytest.importorskip("peft", reason=REASON)

SIZES = {"width": 64, "layers": 2, "vocab": 300, "context": 96}
TINY = ["--rounds", "2", "--sites", "1", "--steps", "1", "--rank", "16"]
TINY += ["--width", "64", "--layers", "1", "--vocab", "256"]


@pytest.fixture(scope="module")
def model():
    return load("lora_gpt2", "model")


def test_the_server_has_the_adapters_that_the_sites_have_and_no_more(model):
    from peft import get_peft_model_state_dict

    theirs = get_peft_model_state_dict(model.with_adapters(model.base_model(SIZES, seed=1), 8))
    ours = model.Adapters(8, seed=2, **SIZES).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
    assert {part: all(value.any() for name, value in ours.items() if f".lora_{part}." in name) for part in "AB"} == {
        "A": True,
        "B": False,
    }
    again, other = (model.Adapters(8, seed=seed, **SIZES).state_dict() for seed in (2, 3))
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    assert not all(torch.equal(value, other[name]) for name, value in ours.items())


def test_the_base_follows_the_seed_and_is_frozen(model):
    one, same, other = (model.base_model(SIZES, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    tuned = model.with_adapters(model.base_model(SIZES, 1), 8)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_checkpoint_is_loaded_with_and_without_the_names_of_the_head(model, tmp_path, prefix):
    base = model.base_model(SIZES, seed=1)
    weights = {prefix + name: value.contiguous() for name, value in base.transformer.state_dict().items()}
    weights[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 96, 96)  # a mask, as OpenAI's file has
    save_file(weights, tmp_path / "base.safetensors")
    assert model.sizes_of(tmp_path / "base.safetensors") == SIZES
    loaded = model.base_model(SIZES, 7, tmp_path / "base.safetensors").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in base.state_dict().items())
    assert model.full_size(SIZES) == sum(parameter.numel() for parameter in base.parameters())


def test_a_file_without_a_gpt2_is_named(model, tmp_path):
    save_file({"wte.weight": torch.ones(3, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors has no GPT-2 in it"):
        model.sizes_of(tmp_path / "other.safetensors")


def test_a_site_has_its_checkpoint_below_its_own_folder(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model", model)
    copy = tmp_path / "site-1" / "JOB" / "app" / "custom" / "client.py"  # where FLARE puts it
    copy.parent.mkdir(parents=True)
    shutil.copy(JOBS / "lora_gpt2" / "client.py", copy)
    find = runpy.run_path(str(copy))["find"]
    assert find("models/gpt2.safetensors") == tmp_path / "site-1" / "models" / "gpt2.safetensors"
    assert find("/data/gpt2.safetensors") == Path("/data/gpt2.safetensors")


def test_bytes_are_the_tokens_that_gpt2_has_for_them(model):
    text = torch.tensor(list(b"!A \n"), dtype=torch.uint8)
    assert model.tokens_of(text).tolist() == [0, 32, 220, 198]
    assert sorted(model.tokens_of(torch.arange(256)).tolist()) == list(range(256))


@pytest.mark.flare
def test_the_exported_job_moves_adapters_only_and_in_few_bits(model, tmp_path):
    job = exported_elsewhere(tmp_path, "lora_gpt2", *TINY)
    assert {file.name for file in (job / "app" / "custom").iterdir()} == {"client.py", "model.py", "stdlib_text.py"}
    workspace = tmp_path / "ws"
    simulated(job, workspace, 1, HF_HUB_OFFLINE="1")
    size = sum(
        4 * value.numel() for value in model.Adapters(16, 0, width=64, layers=1, vocab=256).state_dict().values()
    )
    moved = [line for process in ("server", "site-1") for line in records(workspace, process)]
    assert {(line["path"], line["outcome"], line["raw_bytes"]) for line in moved} == {("direct", "done", size)}
    assert sorted(line["direction"] for line in moved) == ["received"] * 4 + ["sent"] * 4
    assert all(line["wire_bytes"] < 0.16 * size for line in moved)
    saved = torch.load(next(workspace.rglob("FL_global_model.pt")), weights_only=True)["model"]
    assert all(".lora_" in name for name in saved)
    assert any(value.any() for name, value in saved.items() if ".lora_B." in name)  # they have been trained
    rounds = next(workspace.rglob("round_metrics.jsonl")).read_text().splitlines()
    assert all("eval_loss" in json.dumps(json.loads(line)) for line in rounds)
