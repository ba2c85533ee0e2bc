"""Exported jobs: one from long ago still runs, as the names that it has for our classes stay; those of the jobs here
run where there is nothing but the package."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from nvflare.fuel.utils.class_loader import load_class

from nvflare_rdma import streaming
from tests.support.exported import exported_elsewhere, simulated
from tests.support.processes import run

#: As FLARE exported it, but for `task_script_path`, which was an absolute one.
EXPORTED = Path(__file__).parents[1] / "exported" / "linear"
TINY = ["--rounds", "1", "--sites", "1", "--steps", "1", "--width", "64", "--layers", "1", "--quantize", "int8"]
VALUES = 128 * 64
RAW_BYTES = 4 * (VALUES + 64)
MODULES = ["nvflare_rdma.streaming", "nvflare_rdma.streaming.transfer"]


@pytest.mark.parametrize(
    "path",
    [
        "nvflare_rdma.filters.ModelQuantizer",
        "nvflare_rdma.filters.ModelDequantizer",
        "nvflare_rdma.streaming.ContainerRetriever",
        "nvflare_rdma.streaming.ContainerStreamer",
        "nvflare_rdma.streaming.FileRetriever",
        "nvflare_rdma.streaming.FileStreamer",
        "nvflare_rdma.streaming.RdmaTransfer",
        "nvflare_rdma.streaming.transfer.RdmaTransfer",  # what exports had first
        "nvflare_rdma.streaming.container_retriever.ContainerRetriever",
        "nvflare_rdma.streaming.file_retriever.FileRetriever",
        "nvflare_rdma.driver.RdmaDriver",
    ],
)
def test_flare_finds_what_a_configuration_names(path):
    assert load_class(path).__name__ == path.rpartition(".")[2]


@pytest.mark.flare
def test_it_runs_in_few_bits_and_directly(tmp_path):
    job = tmp_path / "job"
    shutil.copytree(EXPORTED, job)
    simulator = ["-m", "nvflare.private.fed.app.simulator.simulator"]
    done = run(simulator, str(job), "-w", str(tmp_path / "ws"), "-n", "1", "-t", "1", timeout=150)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name in ("server", "site-1"):
        text = (tmp_path / "ws" / name / "simulate_job" / "nvflare_rdma" / "transfers.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert sorted(line["direction"] for line in lines) == ["received", "sent"]
        for line in lines:
            assert (line["path"], line["outcome"], line["raw_bytes"]) == ("direct", "done", RAW_BYTES)
            assert VALUES // 2 < line["wire_bytes"] < VALUES  # 4 bits a value, and their scales
    assert next((tmp_path / "ws" / "server").rglob("FL_global_model.pt")).is_file()


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Exports whose authors have the classes from one module and from another: one process makes both."""
    folder = tmp_path_factory.mktemp("named")
    code = f"""
from nvflare.job_config.api import FedJob
from nvflare.fuel.utils.class_loader import load_class
from nvflare_rdma.recipe import add_quantization
for module in {MODULES}:
    job = FedJob(module, 1)
    job.to_server(load_class(module + ".RdmaTransfer")(), id="transfer")
    add_quantization(job, "int8")
    job.export_job({str(folder)!r})
"""
    done = run(["-c", code], timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_a_new_export_has_the_public_names(module, named):
    """Whatever module a job's author has them from."""
    app = named / module / "app"
    text = (app / "config" / "config_fed_server.json").read_text()
    assert set(re.findall(r'"(nvflare_rdma\..+)"', text)) == {
        "nvflare_rdma.streaming.RdmaTransfer",
        "nvflare_rdma.filters.ModelQuantizer",
        "nvflare_rdma.filters.ModelDequantizer",
    }
    assert not (app / "custom").exists()  # nothing of the package travels with the job


def test_the_public_classes_of_streaming_say_so():
    for name in streaming.__all__:
        assert getattr(streaming, name).__module__ == "nvflare_rdma.streaming", name


@pytest.mark.flare
def test_an_exported_job_needs_nothing_of_the_machine_it_is_from(tmp_path):
    job = exported_elsewhere(tmp_path, "stdlib_lm", *TINY)
    simulated(job, tmp_path / "ws", 1)
    assert f"full path: {tmp_path / 'ws' / 'site-1'}" in (tmp_path / "ws" / "site-1" / "log.txt").read_text()
    assert "Finished FedAvg" in (tmp_path / "ws" / "server" / "log.txt").read_text()


@pytest.mark.flare
def test_all_that_an_exported_job_names_is_in_it(tmp_path):
    """Without a run: its classes, and its script with all that this imports, are found in the job and the package."""
    job = exported_elsewhere(tmp_path, "gpt2_small", *TINY, "--direct", "--vocab", "256")
    text = "".join(file.read_text() for file in (job / "app" / "config").glob("*.json"))
    classes = set(re.findall(r'"path": "(.+)"', text))
    assert "model.GPT2" in classes
    (script,) = set(re.findall(r'"task_script_path": "(.+)"', text))
    code = f"""
import importlib, sys
from nvflare.fuel.utils.class_loader import load_class
sys.path.insert(0, {str(job / "app" / "custom")!r})
for path in {sorted(classes)}:
    load_class(path)
importlib.import_module({script.removesuffix(".py")!r}).main
"""
    done = run(["-c", code], timeout=120)
    assert done.returncode == 0, done.stderr
