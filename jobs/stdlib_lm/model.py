"""A small GPT over bytes.

Every parameter is a matrix whose size is a multiple of 64, so a 4-bit codec with blocks of 64 encodes all of it:
norms have no gain, linear layers have no bias, and positions are rotary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256


class Block(nn.Module):
    """Attention and MLP, each on a normalized copy of the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q, angles), _rotate(k, angles), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(_norm(x))))


class ByteGPT(nn.Module):
    """Predicts the next byte. The embedding is also the output layer.

    Args:
        width, layers, heads: the usual sizes; 512, 4 and 8 make 12.7 million parameters.
        context: the longest input in bytes.
        seed: of the initial weights.
    """

    def __init__(self, width: int = 512, layers: int = 4, heads: int = 8, context: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.width, self.layers, self.heads, self.context, self.seed = width, layers, heads, context, seed
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.register_buffer("angles", _angles(context, width // heads), persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        for name, weight in self.named_parameters():
            std = 0.02 if name.startswith("embed") else weight.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std *= (2 * self.layers) ** -0.5  # both add to the stream, 2 * layers times in all
            nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, bytes_in: Tensor) -> Tensor:
        """Logits (batch, length, 256) for bytes (batch, length)."""
        x = self.embed(bytes_in)
        angles = self.angles[: bytes_in.shape[1]]
        for block in self.blocks:
            x = block(x, angles)
        return F.linear(_norm(x), self.embed.weight)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte over rows of bytes (batch, length + 1)."""
        rows = rows.long()
        logits = self(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _angles(context: int, size: int) -> Tensor:
    rates = 10000.0 ** -(torch.arange(0, size, 2) / size)
    return torch.outer(torch.arange(context), rates)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021) on (batch, heads, length, size)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)
