"""Error feedback and differences in real FLARE jobs: state survives FLARE's restarts, and both sides agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.filters.correction import encode_corrected
from tests.support.processes import WITHOUT_TORCH, run

JOB = Path(__file__).with_name("feedback_job.py")
SITES = (1, 2)


def own(site):
    return np.random.default_rng(site).standard_normal((64, 100)).astype(np.float32)


@pytest.mark.flare
def test_residuals_survive_a_new_process_for_each_task(tmp_path):
    done = run(JOB, str(tmp_path), "feedback", timeout=200, **WITHOUT_TORCH)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    means, residuals = [], dict.fromkeys(SITES)
    for _ in range(2):
        arrived = []
        for site in SITES:
            corrected = encode_corrected(get_codec("normfloat4"), own(site).reshape(-1), residuals[site], None)
            residuals[site] = corrected.residual
            arrived.append(corrected.arrived.reshape(64, 100))
        means.append(np.mean(arrived, axis=0))
    assert not np.allclose(means[0], means[1], atol=1e-3)
    second = np.load(tmp_path / "received-site-1-1.npz")["numpy_key"]
    np.testing.assert_allclose(second, means[0], atol=1e-6)
    final = np.load(next((tmp_path / "ws").rglob("server.npy")))
    np.testing.assert_allclose(final, means[1], atol=1e-6)
    assert "was not seen to be sent" not in log
    assert len(list((tmp_path / "ws").rglob("site-*/simulate_job/nvflare_rdma/residual-train-*.safetensors"))) == 2


@pytest.mark.flare
def test_both_directions_send_differences(tmp_path):
    done = run(JOB, str(tmp_path), "delta", timeout=200, **WITHOUT_TORCH)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    lines = [line for line in log.splitlines() if "Quantized to int8" in line]
    # Server: one whole model and two differences, each for two sites. Sites: differences in all three rounds.
    assert len(lines) == 12
    assert sum("as the difference from" in line for line in lines) == 10
    assert "other bits" not in log
    model = np.linspace(-1, 1, 64 * 100, dtype=np.float32).reshape(64, 100)
    step = np.mean([own(site) for site in SITES], axis=0) / 1000
    for round_ in range(3):
        one, two = (np.load(tmp_path / f"received-site-{site}-{round_}.npz")["numpy_key"] for site in SITES)
        np.testing.assert_array_equal(one, two)
        # The first model is off by half a step of int8 of a model; the later ones by that of a small difference.
        allowed = 1 / 127 if round_ == 0 else 2e-4
        assert np.abs(one - model).max() < allowed + 1e-6, round_
        model = one + step
