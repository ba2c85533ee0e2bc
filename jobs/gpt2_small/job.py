"""Send a model of the size of GPT-2 small around with FLARE's FedAvg, and show what that moved and how long it took.

python jobs/gpt2_small/job.py --direct --quantize normfloat4 --workspace /tmp/gpt2_small
python jobs/gpt2_small/job.py --export --export-dir exported        (FLARE's own options: write the job and stop)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

import common  # noqa: E402  before FLARE
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe  # noqa: E402
from nvflare.client.config import ExchangeFormat  # noqa: E402

from nvflare_rdma.recipe import save_in_background  # noqa: E402

NAME = "gpt2_small"
CLIENT_OPTIONS = ("sites", "steps", "width", "layers", "vocab")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, NAME, rounds=2, sites=2)
    parser.add_argument("--steps", type=common.natural, default=1, help="training steps a site takes a round")
    parser.add_argument("--width", type=common.multiple_of_64, default=768, help="of the model; 64 a head")
    parser.add_argument("--layers", type=common.positive, default=12)
    parser.add_argument("--vocab", type=common.positive, default=50257, help="tokens that the model knows; 256 or more")
    parser.add_argument("--seed", type=common.natural, default=0, help="of the initial weights")
    args = common.check(parser, parser.parse_args(argv))
    if args.vocab < 256:
        parser.error(f"--vocab is {args.vocab}, but the text is bytes: give it 256 or more")
    return args


def build(args: argparse.Namespace) -> FedAvgRecipe:
    """The FLARE recipe of this job. The model is made by the server, and not here."""
    sizes = {"width": args.width, "layers": args.layers, "heads": args.width // 64, "vocab": args.vocab}
    recipe = FedAvgRecipe(
        name=NAME,
        model={"class_path": "model.GPT2", "args": {**sizes, "seed": args.seed}},
        min_clients=args.sites,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args=" ".join(f"--{name} {getattr(args, name)}" for name in CLIENT_OPTIONS),
        server_expected_format=ExchangeFormat.PYTORCH,
        key_metric="",  # no best model is chosen
    )
    common.add_parts(recipe, args)
    if args.direct:
        save_in_background(recipe)  # half of what is left of a round is the checkpoint on its way to the disk
    common.name_script(recipe)
    return recipe


def run(args: argparse.Namespace) -> None:
    """Run the job in the simulator and print a row a round.

    Raises:
        RuntimeError: the job failed.
    """
    start = time.monotonic()
    folder = common.execute(build(args), args, NAME, **common.counted(args))
    common.print_traffic(folder, f"{args.quantize}{', direct' * args.direct} over {args.driver}", args.rounds)
    print(f"{time.monotonic() - start:.0f} s; the logs are in {args.workspace}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 and the end of the log if the job failed."""
    args = parse(argv)
    return common.run_and_tell(lambda: run(args), args, NAME)


if __name__ == "__main__":
    sys.exit(main())
