"""A module with tied weights."""

from __future__ import annotations

import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 256)
        self.head = nn.Linear(256, 300)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, generator=torch.Generator().manual_seed(0))
