"""Swarm learning: sites hand each other models, in few bits and directly, and the server never sees one.

python jobs/swarm_lm/job.py
python jobs/swarm_lm/job.py --export --export-dir exported        (FLARE's own options: write the job and stop)
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

import common  # noqa: E402  before FLARE
from nvflare.app_opt.pt.recipes.swarm import SwarmLearningRecipe  # noqa: E402
from nvflare.client.config import ExchangeFormat  # noqa: E402

from nvflare_rdma.recipe import add_quantization, add_transfer  # noqa: E402

NAME = "swarm_lm"
CLIENT_OPTIONS = ("sites", "steps", "width", "layers", "seed")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.basic_parser(__doc__, NAME, sites=3, quantize="blockwise8")
    parser.add_argument("--rounds", type=common.positive, default=4)
    parser.add_argument("--steps", type=common.positive, default=20, help="training steps a site takes a round")
    parser.add_argument("--width", type=common.multiple_of_64, default=512, help="of the model")
    parser.add_argument("--layers", type=common.positive, default=2)
    parser.add_argument("--seed", type=common.natural, default=0, help="of the initial weights and of the training")
    args = parser.parse_args(argv)
    if args.sites < 2:
        parser.error("--sites is 1: a swarm takes two")
    return args


def build(args: argparse.Namespace) -> SwarmLearningRecipe:
    """The FLARE recipe of this job. The model is made by a site, and not here."""
    sizes = {"width": args.width, "layers": args.layers, "seed": args.seed}
    recipe = SwarmLearningRecipe(
        name=NAME,
        model={"class_path": "model.ByteGRU", "args": sizes},
        min_clients=args.sites,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args={"script_args": " ".join(f"--{name} {getattr(args, name)}" for name in CLIENT_OPTIONS)},
        aggregation_format=ExchangeFormat.PYTORCH,
        key_metric="held_out_loss",
        key_metric_mode="min",
    )
    if args.quantize != "none":
        add_quantization(recipe, args.quantize)
    add_transfer(recipe)
    common.name_script(recipe)
    return recipe


def run(args: argparse.Namespace) -> None:
    """Run the job in the simulator, and print what travelled, and what the sites said of the models.

    Raises:
        RuntimeError: the job failed.
    """
    start = time.monotonic()
    folder = common.execute(build(args), args, NAME)
    common.print_report(folder)
    print()
    for log in sorted(folder.glob("site-*/log.txt")):
        losses = re.findall(r"held-out loss of .* in round \d+: (\S+)", log.read_text())
        print(f"held-out loss of what {log.parent.name} has got, by round: {', '.join(losses)}")
    print(f"{time.monotonic() - start:.0f} s; the logs are in {args.workspace}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 and the end of the log if the job failed."""
    args = parse(argv)
    return common.run_and_tell(lambda: run(args), args, NAME)


if __name__ == "__main__":
    sys.exit(main())
