"""What a site runs: FLARE's Client API around a few steps on the site's text. Who adds up, and who sends whom what, is
none of its business."""

from __future__ import annotations

import argparse
import os

import nvflare.client as flare
import stdlib_text
import torch
from model import ByteGRU

LENGTH = 64  # bytes of a window
BATCH = 4
RATE = 3e-3
HELD_OUT = 64  # windows


def train(model: ByteGRU, optimizer: torch.optim.Optimizer, text: torch.Tensor, steps: int, seed: int) -> None:
    """Take `steps` steps on random windows of `text`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
        loss = model.loss(torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main() -> None:
    """Train for every round of the swarm."""
    parser = argparse.ArgumentParser()
    for name in ("sites", "steps", "width", "layers", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()

    flare.init()
    name = flare.get_site_name()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.sites))  # the sites share this machine
    text, held_out = stdlib_text.of_site(name, args.sites), stdlib_text.held_out_sample(HELD_OUT, LENGTH)
    model = ByteGRU(args.width, args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        model.load_state_dict(received.params)
        with torch.inference_mode():
            loss = model.loss(held_out).item()
        print(f"held-out loss of the model that {name} has got in round {received.current_round}: {loss:.3f}")
        train(model, optimizer, text, args.steps, seed=1000 * args.seed + received.current_round)
        params = {key: value.detach().clone() for key, value in model.state_dict().items()}
        flare.send(flare.FLModel(params=params, metrics={"held_out_loss": loss}))


if __name__ == "__main__":
    main()
