"""A model of more than the smallest memory budget, in two tensors."""

from __future__ import annotations

import torch
from torch import nn


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(1000, 300, generator=generator))
        self.second = nn.Parameter(torch.randn(500, 301, generator=generator))
