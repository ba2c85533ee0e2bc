"""What a site runs: FLARE's Client API around a few steps on the source of a module of the standard library."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nvflare.client as flare
import torch
import torch.nn.functional as F
from model import GPT2, logits

RATE = 1e-4
LENGTH = 64


def train(model: torch.nn.Module, text: torch.Tensor, steps: int) -> float:
    """Take `steps` steps of gradient descent, each on the next 64 bytes of `text`, and return their mean loss."""
    total = 0.0
    for step in range(steps):
        row = text[step * LENGTH :][: LENGTH + 1].long().unsqueeze(0)
        loss = F.cross_entropy(logits(model, row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
        total += loss.item()
    return total / max(steps, 1)


def main() -> None:
    """Train for every round that the server asks for."""
    parser = argparse.ArgumentParser()
    for name in ("sites", "steps", "width", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()

    flare.init()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.sites))  # the sites share this machine
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    model = GPT2(args.width, args.layers, heads=args.width // 64, vocab=args.vocab)

    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        model.load_state_dict(received.params)
        del received  # its memory is that of the next round's model
        loss = train(model, text, args.steps)
        flare.send(flare.FLModel(params=model.state_dict(), metrics={"train_loss": loss}))


if __name__ == "__main__":
    main()
