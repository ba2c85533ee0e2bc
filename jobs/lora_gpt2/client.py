"""What a site runs: Hugging Face's `Trainer`, which FLARE's patch makes train for the rounds of the job."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nvflare.client.hf as flare
import stdlib_text
import torch
from model import base_model, sizes_of, tokens_of, with_adapters
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

LENGTH = 64  # tokens of a window
BATCH = 4
RATE = 2e-3
HELD_OUT = 16  # windows


class Windows(Dataset):
    """Windows of a text, one after the other."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._tokens = tokens_of(rows)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


def find(checkpoint: str) -> Path:
    """Where a site has the file: the path as it is, or below FLARE's folder of the site, in which this script is the
    copy SITE/JOB_ID/app/custom/client.py."""
    return Path(__file__).resolve().parents[3] / checkpoint


def main() -> None:
    """Train for every round that the server asks for."""
    parser = argparse.ArgumentParser()
    for name in ("sites", "steps", "rank", "seed", "width", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--checkpoint")
    args = parser.parse_args()

    flare.init()
    name = flare.get_site_name()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.sites))  # the sites share this machine
    checkpoint = find(args.checkpoint) if args.checkpoint else None
    sizes = sizes_of(checkpoint) if checkpoint else {"width": args.width, "layers": args.layers, "vocab": args.vocab}
    text = stdlib_text.of_site(name, args.sites)
    with tempfile.TemporaryDirectory() as folder:  # of the optimizer's state from round to round
        trainer = Trainer(
            with_adapters(base_model(sizes, args.seed, checkpoint), args.rank),
            TrainingArguments(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                learning_rate=RATE,
                seed=args.seed,
                disable_tqdm=True,
                logging_strategy="no",
                report_to="none",
            ),
            train_dataset=Windows(text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)),
            eval_dataset=Windows(stdlib_text.held_out_sample(HELD_OUT, LENGTH - 1)),
        )
        flare.patch(trainer, local_steps=args.steps)  # PEFT's adapters are all that it sends
        while flare.is_running():
            trainer.evaluate()  # its loss goes to the server with what is trained
            trainer.train()


if __name__ == "__main__":
    main()
