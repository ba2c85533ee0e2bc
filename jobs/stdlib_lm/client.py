"""What a site runs: FLARE's Client API around `training.train`."""

from __future__ import annotations

import argparse
import os

import nvflare.client as flare
import stdlib_text
import torch
from model import ByteGPT
from progress import append_progress
from training import optimizer_for, train


def main() -> None:
    """Train for every round that the server asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps a round")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the weights, and of all windows of all sites")
    parser.add_argument("--rate", type=float, required=True, help="the highest learning rate")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--start", default="")
    args = parser.parse_args()

    flare.init()
    name = flare.get_site_name()
    text = stdlib_text.of_site(name, args.sites)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.sites))  # the sites share this machine
    sizes = {"width": args.width, "layers": args.layers, "heads": args.width // 64}
    model = ByteGPT(**sizes, seed=args.seed, start=args.start, rank=args.rank).to(device)
    optimizer = optimizer_for(model)

    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        number, rounds = received.current_round, received.total_rounds
        model.load_state_dict(received.params)
        loss = train(
            model,
            optimizer,
            text,
            args.steps,
            first_step=number * args.steps,
            total_steps=rounds * args.steps,
            peak_rate=args.rate,
            seed=1_000_000_000 * args.seed + 1000 * number + stdlib_text.site_number(name),
            report=lambda step, loss, number=number: append_progress(
                site=name, round=number, step=step, loss=round(loss, 4)
            ),
        )
        flare.send(
            flare.FLModel(
                # FLARE takes the difference to what came in, which also keeps a reference to it: send a copy,
                # since the next step changes the weights in place.
                params={key: value.detach().cpu().clone() for key, value in model.state_dict().items()},
                metrics={"train_loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": args.steps},
            )
        )


if __name__ == "__main__":
    main()
