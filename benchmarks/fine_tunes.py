"""How large the messages of a fine-tune are with `exact_delta`, round by round; `sizes.py fine-tune` runs it.

A byte-level model is trained first, at a rate of 1e-3, on the standard library's code as site-1 of jobs/stdlib_lm has
it, and then fine-tuned on that of site-2, with AdamW at a constant rate. After each round its weights are encoded
against those of the round before, as a site sends them to a server that holds those. A server that averages sites moves
its model by no more than they do.

Weights are kept in one of three ways: as float32; as bfloat16 with the optimizer's own copy in float32, which is what a
site sends that trains in mixed precision; or as bfloat16 alone, where steps below half a unit in the last place are
rounded away.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nvflare_rdma.codecs import ExactDelta

JOBS = Path(__file__).resolve().parents[1] / "jobs"
RATES = (1e-5, 3e-5)
STORED = ("float32", "bfloat16, float32 copy", "bfloat16 alone")
BATCH, CONTEXT = 8, 128
TRAINED_AT = 1e-3


@dataclass(frozen=True)
class Round:
    """One message: how many of its values have changed, and what it takes of the same in bfloat16, as shares."""

    changed: float
    of_bfloat16: float


def byte_gpt(width: int, layers: int) -> nn.Module:
    """jobs/stdlib_lm's transformer."""
    sys.path[:0] = [str(JOBS / "stdlib_lm"), str(JOBS)]
    from model import ByteGPT

    return ByteGPT(width, layers, heads=width // 64, context=CONTEXT)


def gpt2(width: int, layers: int) -> nn.Module:
    """GPT-2 as transformers has it, over bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": width // 64, "vocab_size": 256, "n_positions": CONTEXT}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}  # those of its own vocabulary are no bytes
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"stdlib_lm": byte_gpt, "GPT-2": gpt2}


def trained(name: str, width: int, layers: int, steps: int) -> nn.Module:
    """A model before it is fine-tuned."""
    model = MODELS[name](width, layers)
    take_steps(model, optimizer_for(model, TRAINED_AT), batches("site-1", 0), steps)
    return model


def rounds(model: nn.Module, stored: str, rate: float, count: int, steps: int) -> Iterator[Round]:
    """Fine-tune `model`, and tell of each round's message."""
    if stored == STORED[2]:
        model.to(torch.bfloat16)
    optimizer, text = optimizer_for(model, rate), batches("site-2", 1)
    before = weights(model, stored)
    for _ in range(count):
        take_steps(model, optimizer, text, steps)
        after = weights(model, stored)
        yield message(before, after)
        before = after


def message(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> Round:
    codec, taken, changed, n = ExactDelta(), 0, 0, 0
    for name, values in after.items():
        encoded = np.empty(codec.encoded_nbytes(values.size), np.uint8)
        taken += codec.encode_against(values, before[name], encoded)
        changed += int((bits(values) != bits(before[name])).sum())
        n += values.size
    return Round(changed / n, taken / (2 * n))


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def weights(model: nn.Module, stored: str) -> dict[str, np.ndarray]:
    """What is sent of the model: float32, or the bits of bfloat16."""
    sent: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sent[name] = (
            values.numpy().copy() if stored == STORED[0] else values.bfloat16().view(torch.uint16).numpy().copy()
        )
    return sent


def optimizer_for(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, text: Iterator[Tensor], steps: int) -> None:
    for _ in range(steps):
        loss_of(model, next(text)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def loss_of(model: Any, rows: Tensor) -> Tensor:
    if hasattr(model, "loss"):
        return model.loss(rows)
    logits = model(rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@functools.cache
def text_of(site: str) -> Tensor:
    sys.path[:0] = [str(JOBS)]
    import stdlib_text

    return stdlib_text.of_site(site, 3)


def batches(site: str, seed: int) -> Iterator[Tensor]:
    text, generator = text_of(site), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        yield torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()]).long()
