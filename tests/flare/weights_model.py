"""A module with tensors that quantize well, badly and not at all."""

from __future__ import annotations

import torch
from torch import nn


class Awkward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.large = nn.Parameter(torch.randn(700, 130, generator=generator))
        self.odd = nn.Parameter(torch.randn(37, 3, generator=generator))
        self.narrow = nn.Parameter(torch.randn(500, generator=generator).half())
        self.one = nn.Parameter(torch.ones(1))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("steps", torch.tensor(2**40 + 1))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("diverged", torch.tensor([1.0, float("nan"), float("-inf")] * 50))
