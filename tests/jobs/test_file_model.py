"""jobs/file_model: the exported job, and a second run of it."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from safetensors.numpy import load_file

from tests.support.exported import JOBS, exported_elsewhere, load, records, simulated
from tests.support.processes import WITHOUT_TORCH, run

TINY = ["--width", "128", "--layers", "1", "--vocab", "600"]
FILE = "models/random.safetensors"


def test_the_model_that_is_made_is_a_gpt2(tmp_path):
    pytest.importorskip("transformers", reason="transformers tells what a GPT-2 has")
    load("file_model", "model").make_model(tmp_path / "made.safetensors", 128, 2, 600)
    theirs = load("lora_gpt2", "model")
    sizes = theirs.sizes_of(tmp_path / "made.safetensors")
    assert sizes == {"width": 128, "layers": 2, "vocab": 600, "context": 1024}
    base = theirs.base_model(sizes, 0, tmp_path / "made.safetensors")  # all of its weights, and no others
    assert base.transformer.ln_f.weight.min() == 1
    assert base.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["", ".", "..", "../startup/sub_start.sh", "/etc/passwd", "a/b", "a\0b", 5, None])
def test_what_leads_elsewhere_is_no_name_of_a_file(name):
    assert not load("file_model", "model").is_file_name(name)


def test_a_header_is_no_longer_than_its_file(tmp_path):
    file = tmp_path / "short.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert load("file_model", "model").header_digest(file) == ""
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert load("file_model", "model").header_digest(file)


def test_a_server_sends_the_one_file_and_no_other(tmp_path):
    (tmp_path / "base.safetensors").write_bytes(b"x")
    (tmp_path / "server.key").write_bytes(b"x")
    retriever = load("file_model", "server").OneFile(tmp_path / "base.safetensors", None)
    answers = [
        retriever.validate_request({"file_name": name}, FLContext())[0] for name in ("base.safetensors", "server.key")
    ]
    assert answers == [ReturnCode.OK, ReturnCode.BAD_REQUEST_DATA]


@pytest.mark.flare
def test_the_exported_job_brings_the_file_to_all_sites_in_few_bits(tmp_path):
    job = exported_elsewhere(tmp_path, "file_model", "--sites", "2", *TINY, **WITHOUT_TORCH)
    assert {file.name for file in (job / "app" / "custom").iterdir()} == {"client.py", "model.py", "server.py"}
    workspace = tmp_path / "ws"
    simulated(job, workspace, 2, **WITHOUT_TORCH)
    source = load_file(workspace / "server" / FILE)
    for site in ("site-1", "site-2"):
        came = load_file(workspace / site / FILE)
        assert came.keys() == source.keys()
        assert np.array_equal(came["ln_f.weight"], source["ln_f.weight"])
        error = np.abs(came["wte.weight"] - source["wte.weight"]).max()
        assert 0 < error < np.abs(source["wte.weight"]).max() / 100
        (record,) = records(workspace, site)
        size = (workspace / "server" / FILE).stat().st_size
        assert (record["kind"], record["path"], record["raw_bytes"]) == ("file", "direct", size)
        assert record["wire_bytes"] < 0.3 * size
        assert not list((workspace / site / "models").glob(".*rdma*"))


@pytest.mark.flare
def test_a_site_that_has_the_file_is_not_sent_it_again(tmp_path):
    def ran() -> str:
        options = ["--sites", "1", "--quantize", "none", "--workspace", str(tmp_path), *TINY]
        done = run(JOBS / "file_model" / "job.py", *options, timeout=150, **WITHOUT_TORCH)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "site-1 has got random.safetensors" in ran()
    source, came = (tmp_path / "models" / name / "random.safetensors" for name in ("server", "site-1"))
    assert came.read_bytes() == source.read_bytes()
    printed = ran()
    assert "site-1 has had random.safetensors since an earlier run" in printed
    assert not re.search("on the wire", printed)
    stamp, before = load("file_model", "model").stamp, source.stat().st_mtime_ns
    assert stamp(source, "") == stamp(source, "") != stamp(source, "int8")
    old = stamp(source, "")
    os.utime(source, ns=(before, before + 1))
    assert stamp(source, "") != old
