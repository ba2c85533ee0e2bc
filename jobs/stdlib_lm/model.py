"""A small GPT over bytes.

What it is made of is chosen for being sent. Every tensor's size is a multiple of 64, so a 4-bit codec with blocks of
64 encodes all of it: norms have no gain, linear layers have no bias, and positions are rotary. And there are only
five tensors, each with the weights of all layers: FLARE adds some hundred bytes for every tensor it sends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256


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
        self.embed = nn.Parameter(torch.empty(VOCAB, width))
        self.qkv = nn.Parameter(torch.empty(layers, 3 * width, width))
        self.out = nn.Parameter(torch.empty(layers, width, width))
        self.up = nn.Parameter(torch.empty(layers, 4 * width, width))
        self.down = nn.Parameter(torch.empty(layers, width, 4 * width))
        self.register_buffer("angles", _angles(context, width // heads), persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.embed, std=0.02, generator=generator)
        for weight in (self.qkv, self.up):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=generator)
        for weight in (self.out, self.down):  # both add to the stream, 2 * layers times in all
            std = (weight.shape[-1] * 2 * self.layers) ** -0.5
            nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, bytes_in: Tensor) -> Tensor:
        """Logits (batch, length, 256) for bytes (batch, length)."""
        x = F.embedding(bytes_in, self.embed)
        angles = self.angles[: bytes_in.shape[1]]
        # unbind and not an index for each layer: its gradient is made once, for all layers together.
        stacks = (weight.unbind() for weight in (self.qkv, self.out, self.up, self.down))
        for qkv, out, up, down in zip(*stacks, strict=True):
            x = x + F.linear(self._attend(F.linear(_norm(x), qkv), angles), out)
            x = x + F.linear(F.gelu(F.linear(_norm(x), up)), down)
        return F.linear(_norm(x), self.embed)

    def _attend(self, qkv: Tensor, angles: Tensor) -> Tensor:
        batch, length, _ = qkv.shape
        split = qkv.view(batch, length, 3, self.heads, self.width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q, angles), _rotate(k, angles), v, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, self.width)

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
