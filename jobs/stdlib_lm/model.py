"""A small GPT over bytes.

What it is made of is chosen for being sent. Every tensor's size is a multiple of 64, so a 4-bit codec with blocks of
64 encodes all of it: norms have no gain, linear layers have no bias, and positions are rotary. And there are only
five tensors, each with the weights of all layers: FLARE adds some hundred bytes for every tensor it sends.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256
#: The weights that adapters are for: a layer's matrices.
ADAPTED = ("qkv", "out", "up", "down")
#: What an adapter's product is multiplied by (alpha over rank, in the paper's words).
ADAPTER_SCALE = 2.0


class ByteGPT(nn.Module):
    """Predicts the next byte. The embedding is also the output layer.

    Args:
        width, layers, heads: the usual sizes; 512, 4 and 8 make 12.7 million parameters.
        context: the longest input in bytes.
        seed: of the initial weights.
        start: a file to take the weights from: what FLARE saves of a job of these sizes, `FL_global_model.pt`.
        rank: of the LoRA adapters (Hu et al., 2021) of all layers' matrices. They are then all that is trained, and all
            that the state dict has. 0 for none.

    Raises:
        ValueError: `start` has weights of other sizes, adapters alone, or something else.
    """

    def __init__(
        self,
        width: int = 512,
        layers: int = 4,
        heads: int = 8,
        context: int = 128,
        seed: int = 0,
        start: str = "",
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.layers, self.heads, self.context, self.seed = width, layers, heads, context, seed
        self.start, self.rank = start, rank
        self.embed = nn.Parameter(torch.empty(VOCAB, width))
        self.qkv = nn.Parameter(torch.empty(layers, 3 * width, width))
        self.out = nn.Parameter(torch.empty(layers, width, width))
        self.up = nn.Parameter(torch.empty(layers, 4 * width, width))
        self.down = nn.Parameter(torch.empty(layers, width, 4 * width))
        self.register_buffer("angles", _angles(context, width // heads), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        self._initialize(generator)
        if start:
            self._load(Path(start))
        if rank:
            self._adapt(generator)

    def _initialize(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.embed, std=0.02, generator=generator)
        for weight in (self.qkv, self.up):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=generator)
        for weight in (self.out, self.down):  # both add to the stream, 2 * layers times in all
            std = (weight.shape[-1] * 2 * self.layers) ** -0.5
            nn.init.normal_(weight, std=std, generator=generator)

    def _load(self, path: Path) -> None:
        try:
            self.load_state_dict(torch.load(path, weights_only=True)["model"])
        except (RuntimeError, KeyError) as error:
            what = f"all weights of a ByteGPT of width {self.width} with {self.layers} layers"
            raise ValueError(f"{path} is not what FLARE saves of {what}: {error}") from error

    def _adapt(self, generator: torch.Generator) -> None:
        """Freeze all weights, which leave the state dict, and add adapters, which change nothing yet."""
        for name, weight in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, weight.detach(), persistent=False)
        for name in ADAPTED:
            layers, rows, columns = getattr(self, name).shape
            inner = nn.init.normal_(torch.empty(layers, self.rank, columns), std=columns**-0.5, generator=generator)
            self.register_parameter(f"{name}_inner", nn.Parameter(inner))
            self.register_parameter(f"{name}_outer", nn.Parameter(torch.zeros(layers, rows, self.rank)))

    def _weights(self, name: str) -> tuple[Tensor, ...]:
        """A layer's matrix, for each layer. unbind and not an index for each: its gradient is made once, for all layers
        together."""
        weight: Tensor = getattr(self, name)
        if self.rank:
            weight = weight.baddbmm(getattr(self, f"{name}_outer"), getattr(self, f"{name}_inner"), alpha=ADAPTER_SCALE)
        return weight.unbind()

    def forward(self, bytes_in: Tensor) -> Tensor:
        """Logits (batch, length, 256) for bytes (batch, length)."""
        x = F.embedding(bytes_in, self.embed)
        angles = self.angles[: bytes_in.shape[1]]
        for qkv, out, up, down in zip(*map(self._weights, ADAPTED), strict=True):
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
