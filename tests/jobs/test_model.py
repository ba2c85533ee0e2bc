from __future__ import annotations

import math

import pytest
import torch
from model import ADAPTED, ByteGPT
from training import PEAK_RATE, evaluate, optimizer_for, rate_at, train


@pytest.fixture
def tiny():
    return ByteGPT(width=64, layers=1, heads=2, context=16, seed=1)


@pytest.fixture
def text():
    return torch.frombuffer(bytearray(b"def f(x):\n    return x\n" * 40), dtype=torch.uint8)


def test_an_untrained_model_knows_nothing(tiny, text):
    rows = text[: 17 * 8].view(8, 17)
    assert tiny(rows.long()[:, :-1]).shape == (8, 16, 256)
    assert evaluate(tiny, rows) == pytest.approx(math.log(256), rel=0.05)


def test_it_does_not_see_what_it_predicts(tiny, text):
    rows = text[:16].long().view(1, 16)
    changed = rows.clone()
    changed[0, 10:] = 7
    with torch.no_grad():
        a, b = tiny(rows), tiny(changed)
    assert torch.allclose(a[:, :10], b[:, :10], atol=1e-5)
    assert not torch.allclose(a[:, 10:], b[:, 10:], atol=1e-2)


def test_it_tells_positions_apart(tiny):
    rows = torch.tensor([[1, 2, 3, 3]])
    swapped = torch.tensor([[2, 1, 3, 3]])
    with torch.no_grad():
        assert not torch.allclose(tiny(rows)[:, -1], tiny(swapped)[:, -1], atol=1e-4)


def test_every_tensor_can_be_cut_into_blocks_of_64():
    state = ByteGPT().state_dict()
    assert all(t.numel() % 64 == 0 for t in state.values())
    assert sum(t.numel() for t in state.values()) == 12_713_984


def test_initial_weights_follow_the_seed():
    one, same, other = (ByteGPT(64, 1, 2, 16, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_training_lowers_the_loss_and_repeats(tiny, text):
    rows = text[: 17 * 8].view(8, 17)
    before = evaluate(tiny, rows)
    seen = []
    start = {k: v.clone() for k, v in tiny.state_dict().items()}
    loss = train(tiny, optimizer_for(tiny), text, 30, 0, 30, seed=3, report=lambda step, loss: seen.append(loss))
    assert len(seen) == 30
    assert loss == pytest.approx(sum(seen) / 30)
    assert evaluate(tiny, rows) < 0.8 * before
    again = []
    tiny.load_state_dict(start)
    train(tiny, optimizer_for(tiny), text, 30, 0, 30, seed=3, report=lambda step, loss: again.append(loss))
    assert again == pytest.approx(seen, rel=1e-3)


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [rate_at(step, 100) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == PEAK_RATE
    assert rate_at(100, 100) == pytest.approx(PEAK_RATE / 10)


def test_adapters_are_all_that_is_trained_and_kept(text):
    model = ByteGPT(64, 2, 1, 16, seed=1, rank=4)
    rows = text[: 17 * 8].view(8, 17)
    bare = ByteGPT(64, 2, 1, 16, seed=1)
    assert evaluate(model, rows) == evaluate(bare, rows), "they change nothing before they are trained"
    frozen = {name: weight.clone() for name, weight in model.named_buffers()}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert set(before) == {f"{name}_{part}" for name in ADAPTED for part in ("inner", "outer")}
    assert all(weight.numel() % 64 == 0 for weight in before.values())
    train(model, optimizer_for(model), text, 4, first_step=0, total_steps=4, seed=0)
    assert not any(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.named_buffers())
    assert evaluate(model, rows) < evaluate(bare, rows)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_goes_on_from_what_flare_has_saved(rank, text, tmp_path):
    path = tmp_path / "FL_global_model.pt"
    earlier = ByteGPT(64, 1, 1, 16, seed=1)
    torch.save({"model": earlier.state_dict(), "train_conf": {}}, path)
    rows = text[: 17 * 8].view(8, 17)
    assert evaluate(ByteGPT(64, 1, 1, 16, seed=2, start=str(path), rank=rank), rows) == evaluate(earlier, rows)
    with pytest.raises(ValueError, match=r"(?s)of a ByteGPT of width 128 with 1 layers: .*size mismatch"):
        ByteGPT(128, 1, 2, 16, start=str(path), rank=rank)
    torch.save(earlier.state_dict(), path)
    with pytest.raises(ValueError, match="with 1 layers: 'model'"):
        ByteGPT(64, 1, 1, 16, start=str(path), rank=rank)
