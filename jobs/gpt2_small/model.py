"""GPT-2 (Radford et al., 2019) with random weights: transformers' own model where that is installed, else one with the
same parameters, names and output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError:
    GPT2LMHeadModel = None


class PlainGPT2(nn.Module):
    """`transformers.GPT2LMHeadModel` without dropout, of torch alone; by default in the size of GPT-2 small, which has
    124,439,808 parameters. Output layer and embedding are one tensor, which a state dict has under both names.

    Args:
        width, layers, heads, vocab, context: the usual sizes.
        seed: of the weights.
    """

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        vocab: int = 50257,
        context: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(_Block(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:  # biases and norms are 0 and 1
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocab) for tokens (batch, length)."""
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1], device=tokens.device))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": _Conv1D(width, 3 * width), "c_proj": _Conv1D(width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": _Conv1D(width, 4 * width), "c_proj": _Conv1D(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.attn["c_proj"](mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class _Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


if GPT2LMHeadModel is None:
    GPT2: Any = PlainGPT2
else:

    class GPT2(GPT2LMHeadModel):  # type: ignore[no-redef]
        """transformers' GPT-2 with the arguments of `PlainGPT2`, and without dropout as that is."""

        def __init__(
            self,
            width: int = 768,
            layers: int = 12,
            heads: int = 12,
            vocab: int = 50257,
            context: int = 1024,
            seed: int = 0,
        ) -> None:
            sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": vocab, "n_positions": context}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                super().__init__(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """What `model` says of tokens (batch, length): (batch, length, vocab)."""
    out = model(tokens)
    return getattr(out, "logits", out)
