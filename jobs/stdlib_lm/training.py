"""One site's training steps and the loss on held-out text. No FLARE."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from model import ByteGPT
from torch import Tensor

PEAK_RATE = 1e-3
WARM_UP = 20  # steps
BATCH = 8


def optimizer_for(model: ByteGPT) -> torch.optim.Optimizer:
    """AdamW with the betas that small language models are usually trained with."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def rate_at(step: int, total: int, peak: float = PEAK_RATE) -> float:
    """Learning rate: linear warm-up, then a cosine down to a tenth, over all rounds."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(total - WARM_UP, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))


def train(  # noqa: PLR0913
    model: ByteGPT,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    steps: int,
    first_step: int,
    total_steps: int,
    seed: int,
    peak_rate: float = PEAK_RATE,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Take `steps` steps on random windows of `text` and return their mean loss.

    Args:
        first_step: number of this first step over all rounds, of `total_steps`: sets the learning rate.
        seed: of the windows; a site's round always sees the same ones.
        peak_rate: the highest learning rate.
        report: called with (steps done, loss) after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.train()
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(first_step + step, total_steps, peak_rate)
        starts = torch.randint(len(text) - model.context - 1, (BATCH,), generator=generator)
        rows = torch.stack([text[s : s + model.context + 1] for s in starts.tolist()]).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bfloat16(device)):
            loss = model.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        report(step + 1, loss.item())
    return total / max(steps, 1)


@torch.inference_mode()
def evaluate(model: ByteGPT, rows: Tensor, batch: int = 16) -> float:
    """Mean loss over `rows` in full precision, in nats per byte."""
    model.eval()
    device = next(model.parameters()).device
    losses = [model.loss(part.to(device)).item() * len(part) for part in rows.split(batch)]
    return sum(losses) / len(rows)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: on GPUs, and on CPUs with instructions for it."""
    if device.type != "cpu":
        return True
    try:
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False
