"""A small recurrent language model over bytes: 13.7 MB in all, in 11 tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256


class ByteGRU(nn.Module):
    """Predicts the next byte.

    Args:
        width, layers: the usual sizes.
        seed: of the initial weights.
    """

    def __init__(self, width: int = 512, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCAB, width)
            self.gru = nn.GRU(width, width, layers, batch_first=True)
            self.head = nn.Linear(width, VOCAB)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte over rows of bytes (batch, length + 1)."""
        rows = rows.long()
        logits = self.head(self.gru(self.embed(rows[:, :-1]))[0])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
