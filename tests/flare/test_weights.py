"""A job from end to end: what arrives is what was sent, within the codec's bound, in both directions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nvflare_rdma.codecs import get_codec
from tests.support.processes import run

JOB = Path(__file__).with_name("weights_job.py")
EXACT = {"one", "nothing", "steps", "mask"}


def bound(codec, value: torch.Tensor) -> torch.Tensor:
    """What the codec may change in each element of ``value``, its own dtype's rounding included."""
    flat = value.float().flatten().numpy()
    encoded = np.empty(codec.encoded_nbytes(flat.size), np.uint8)
    codec.encode_into(flat, encoded)
    error = torch.from_numpy(codec.max_abs_error(flat, encoded)).reshape(value.shape)
    if value.dtype == torch.float16:
        error = error + (value.float().abs() + error) * 2.0**-10
    return error


@pytest.mark.flare
@pytest.mark.parametrize(
    ("quantization_type", "how"), [("normfloat4", []), ("normfloat4", ["streamed"]), ("normfloat4", ["direct"])]
)
def test_weights_arrive_within_the_bound_in_both_directions(quantization_type, how, tmp_path):
    done = run(JOB, str(tmp_path), quantization_type, *how, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    codec = get_codec(quantization_type)
    load = {p.stem: torch.load(p, weights_only=True) for p in tmp_path.glob("*.pt")}
    assert set(load) == {"initial", *(f"{way}-site-{i}" for way in ("received", "sent") for i in (1, 2))}
    # 16-bit codecs carry NaN and Inf and leave 16-bit tensors alone; block codecs send NaN and Inf exact.
    exact = EXACT | {"diverged"} | ({"narrow"} if codec.bits == 16 else set())

    for site in (1, 2):
        received = load[f"received-site-{site}"]
        if how != ["streamed"]:  # FLARE streams them in an order of its own
            assert list(received) == list(load["initial"])
        assert set(received) == set(load["initial"])
        for name, sent in load["initial"].items():
            got = received[name]
            assert (got.dtype, got.shape) == (sent.dtype, sent.shape), name
            if name in exact:
                torch.testing.assert_close(got, sent, rtol=0, atol=0, equal_nan=True)
            else:
                difference = (got.float() - sent.float()).abs()
                assert (difference <= bound(codec, sent)).all(), name
                # With the transfer small tensors travel exact, in its first answer.
                assert difference.any() or (how == ["direct"] and name != "large"), f"{name} was not quantized"

    saved = torch.load(next((tmp_path / "ws").rglob("FL_global_model.pt")), weights_only=True)
    model = saved.get("model", saved)
    sent = [load[f"sent-site-{i}"] for i in (1, 2)]
    for name in ("large", "odd"):
        mean = (sent[0][name] + sent[1][name]) / 2
        allowed = (bound(codec, sent[0][name]) + bound(codec, sent[1][name])) / 2 + 1e-5
        assert ((model[name] - mean).abs() <= allowed).all(), name
        changed = not torch.equal(model[name], mean)
        assert changed or (how == ["direct"] and name != "large"), f"{name} was not quantized"
    log = next((tmp_path / "ws").rglob("server/log.txt")).read_text()
    if how == ["direct"]:
        check_direct(log, next((tmp_path / "ws").rglob("server/**/transfers.jsonl")))
    if how == ["streamed"]:
        check_streaming(load["initial"], done.stdout + done.stderr)
    assert "data goes over shm" in log
    assert ("diverged: normfloat4 can't carry NaN or Inf" in log) == (codec.bits == 4)


@pytest.mark.flare
def test_both_sides_look_at_what_transfers_have_told(tmp_path):
    done = run(JOB, str(tmp_path), "auto", "direct", timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    server, site = (next((tmp_path / "ws").rglob(f"{name}/log.txt")).read_text() for name in ("server", "site-1"))
    for peer in ("site-1", "site-2"):
        why = "no transfer has told yet how fast this link is, and it is the smallest"
        assert re.search(rf"Messages of task 'train' to {peer} go in normfloat4_e4m3 \([^)]+\): {why}", server)
    # The model has come, by which the site knows how fast the link is at least.
    assert re.search(r"Messages of task 'train' to server go in \w+ \(.*: each way has 30 s at", site)


def check_direct(log: str, transfers: Path) -> None:
    """Results have come directly, and stay encoded until they are added. What was sent is signed off."""
    lines = list(map(json.loads, transfers.read_text().splitlines()))
    came = [line for line in lines if line["direction"] == "received"]
    assert [line["path"] for line in came] == ["direct"] * 2
    sent = [line for line in lines if line["direction"] == "sent"]
    assert len(sent) == 2
    for line in sent:
        assert "normfloat4" in line["codecs"]
        assert 0.05 < line["relative_error"] < 0.2
        assert len(line["digest"]) == 32
        assert f"digest {line['digest']}" in log
    assert sent[0]["digest"] == sent[1]["digest"], "both sites got the same"
    assert log.count("Results that come in few bits stay encoded here until an aggregator adds them") == 1
    assert log.count("that were to be encoded on their way came so, and stay encoded until they are added") == 2


def check_streaming(model: dict[str, torch.Tensor], log: str) -> None:
    """FLARE takes the tensors out of the message to stream them: what it streams are codes."""
    whole = sum(tensor.nbytes for tensor in model.values())
    streamed = [int(n) for n in re.findall(r"produced blobs for peer .* \((\d+) bytes\)", log)]
    assert len(streamed) == 4, "to two sites and back"
    assert max(streamed) < whole / 4
    assert "are encoded as they are sent" not in log
    assert "decoded already" not in log
