"""FLARE's workflows with both of this package's lines: what arrives is right, and few bits travel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nvflare_rdma.codecs import get_codec
from tests.flare import workflow_job
from tests.support.processes import SMALL, WITHOUT_TORCH, run

JOB = Path(__file__).with_name("workflow_job.py")
MODEL = workflow_job.model()
RAW, ENCODED = MODEL.nbytes, get_codec(workflow_job.QUANTIZATION).encoded_nbytes(MODEL.size)


class Job:
    """A job that has run to its end: its log, what its processes have recorded, and what its sites have kept."""

    def __init__(self, folder: Path, which: str, **extra: str) -> None:
        done = run(JOB, str(folder), which, timeout=200, **{**WITHOUT_TORCH, **extra})
        self.workspace, self.log = folder / "ws" / which, done.stdout + done.stderr
        assert done.returncode == 0, self.log[-8000:]
        assert "JOB STATUS" in self.log
        assert "Traceback" not in self.log, self.log[-8000:]
        self.kept = {path.stem: dict(np.load(path)) for path in folder.glob("site-*.npz")}

    def log_of(self, process: str) -> str:
        return (self.workspace / process / "log.txt").read_text()

    def received(self, process: str) -> list[tuple[str, str, int, int]]:
        """From whom, which way, and how many bytes, in memory and as they travelled."""
        text = (self.workspace / process / "simulate_job/nvflare_rdma/transfers.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert all(line["outcome"] == "done" for line in lines)
        found = [line for line in lines if line["direction"] == "received"]
        return [(line["peer"].split(".")[0], line["path"], line["raw_bytes"], line["wire_bytes"]) for line in found]


def coded(values: np.ndarray) -> np.ndarray:
    """What the codec makes of values."""
    codec = get_codec(workflow_job.QUANTIZATION)
    flat = values.astype(np.float32).reshape(-1)
    encoded = np.empty(codec.encoded_nbytes(flat.size), np.uint8)
    out = np.empty_like(flat)
    codec.decode_into(encoded[: codec.encode_into(flat, encoded)], out)
    assert np.any(out != flat)
    return out.reshape(values.shape)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.flare
def test_a_job_that_brings_no_code_of_its_own_may_use_this_package_in_the_simulator(tmp_path):
    job = Job(tmp_path, "pretrained")
    assert "is not in allow_list" not in job.log
    assert not list(job.workspace.glob("*/simulate_job/app_*/custom"))
    results = json.loads(next(job.workspace.rglob("cross_val_results.json")).read_text())
    assert set(results) == {"site-1", "site-2"}
    for site in results:
        assert results[site]["SRV_server"]["accuracy"] == pytest.approx(coded(MODEL).sum(), abs=50)
        assert job.received(site) == [("server", "direct", RAW, ENCODED)]
        text = job.log_of(site)
        assert "ModelQuantizer in task_result_filters of config_fed_client.json has quantized nothing" in text
        assert "it is for task 'submit_model', 'validate'" in text
    assert "has quantized nothing" not in job.log_of("server")


@pytest.mark.flare
def test_a_site_without_this_package_takes_part_in_full(tmp_path):
    path = f"{SMALL / 'without_package'}:{WITHOUT_TORCH['PYTHONPATH']}"
    job = Job(tmp_path, "apart", PYTHONPATH=path)
    got, mean = {}, MODEL
    for round_ in range(workflow_job.ROUNDS):
        got = {site: job.kept[f"{site}-{round_}"] for site in ("site-1", "site-2")}
        same(got["site-1"]["got"], coded(mean))
        same(got["site-2"]["got"], mean)
        mean = (coded(got["site-1"]["sent"]) + got["site-2"]["sent"]) / 2
    same(np.load(next(job.workspace.rglob("server.npy"))), mean)
    assert not (job.workspace / "site-2/simulate_job/nvflare_rdma").exists()
    assert job.received("site-1") == [("server", "direct", RAW, ENCODED)] * workflow_job.ROUNDS
    ways = {("site-1", "direct", RAW, ENCODED), ("site-2", "flare", RAW, RAW)}
    assert {(who, way, raw, min(wire, raw)) for who, way, raw, wire in job.received("server")} == ways
    text = job.log_of("server")
    assert text.count("tensors go to site-2.simulate_job on FLARE's own path") == 1
    assert text.count("tensors from site-2.simulate_job come on FLARE's own path: the sender answers no direct") == 1
    assert "site-1.simulate_job on FLARE's own path" not in text


@pytest.mark.flare
def test_swarm_sends_few_bits_from_site_to_site(tmp_path):
    job = Job(tmp_path, "swarm")
    mean = MODEL
    for round_ in range(workflow_job.ROUNDS):
        one, two = (job.kept[f"site-{site}-{round_}"] for site in (1, 2))
        same(one["got"], mean)  # it has made it itself
        same(two["got"], coded(mean))
        mean = (one["sent"] + coded(two["sent"])) / 2
    finals = {path.parts[-4]: np.load(path) for path in job.workspace.rglob("last_global_model.npy")}
    assert set(finals) == {"site-1", "site-2"}
    for final in finals.values():
        same(final, mean)
    few = ("direct", RAW, ENCODED)
    assert [entry[1:] for entry in job.received("site-1")] == [few] * workflow_job.ROUNDS
    # The final model comes exact.
    assert [entry[1:3] for entry in job.received("site-2")] == [few[:2]] * (workflow_job.ROUNDS + 1)
    assert [entry[3] for entry in job.received("site-2")][:-1] == [ENCODED] * workflow_job.ROUNDS
    assert job.received("site-2")[-1][3] >= RAW
    for site in ("site-1", "site-2"):
        text = job.log_of(site)
        assert "FLARE's own path" not in text
        assert "Quantized to blockwise8 for another site: 1/1 params are encoded as they are sent" in text


@pytest.mark.flare
def test_cyclic_that_sites_control_sends_few_bits_from_site_to_site(tmp_path):
    job = Job(tmp_path, "cyclic", NVFLARE_RDMA_DATA_PORTS="20000-60000")
    arrives = MODEL
    for round_ in range(workflow_job.ROUNDS):
        for site in ("site-1", "site-2"):
            kept = job.kept[f"{site}-{round_}"]
            same(kept["got"], arrives)
            arrives = coded(kept["sent"])
    finals = {path.parts[-4]: np.load(path) for path in job.workspace.rglob("last_global_model.npy")}
    for final in finals.values():
        same(final, job.kept[f"site-2-{workflow_job.ROUNDS - 1}"]["sent"])
    assert set(job.received("site-2")) == {("site-1", "direct", RAW, ENCODED)}


@pytest.mark.flare
def test_scaffold_has_its_weights_in_few_bits_and_its_controls_exact(tmp_path):
    job = Job(tmp_path, "scaffold")
    mean, controls = MODEL, np.zeros_like(MODEL)
    for round_ in range(workflow_job.ROUNDS):
        kept = [job.kept[f"site-{site}-{round_}"] for site in (1, 2)]
        for each in kept:
            same(each["got"][0], coded(mean))
            same(each["got"][1], controls)
        controls = controls + sum(each["sent"] - each["got"][0] for each in kept) / 2
        mean = sum(coded(each["sent"]) for each in kept) / 2
    same(np.load(next(job.workspace.rglob("server.npy"))), mean)
    for site in ("site-1", "site-2"):
        moved = job.received(site)
        assert [entry[:2] for entry in moved] == [("server", "direct")] * workflow_job.ROUNDS
        # FLARE sends the last difference of controls along.
        assert [raw for _, _, raw, _ in moved] == [2 * RAW, 3 * RAW]
        assert {raw - wire for _, _, raw, wire in moved} == {RAW - ENCODED}
