"""Tune GPT-2 with LoRA at several sites: only adapters travel, in few bits, from process to process.

python jobs/lora_gpt2/job.py
python jobs/lora_gpt2/job.py --checkpoint models/gpt2.safetensors
python jobs/lora_gpt2/job.py --export --export-dir exported        (FLARE's own options: write the job and stop)
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
from nvflare.client.config import ExchangeFormat, TransferType  # noqa: E402

from nvflare_rdma.recipe import add_quantization, add_transfer  # noqa: E402

NAME = "lora_gpt2"
CLIENT_OPTIONS = ("sites", "steps", "rank", "seed", "width", "layers", "vocab")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.basic_parser(__doc__, NAME, sites=2, quantize="normfloat4")
    parser.add_argument("--rounds", type=common.positive, default=3)
    parser.add_argument("--steps", type=common.positive, default=4, help="training steps a site takes a round")
    parser.add_argument("--rank", type=common.positive, default=8, help="of the adapters")
    parser.add_argument("--checkpoint", help="a safetensors file of a GPT-2, in place of random weights")
    parser.add_argument("--width", type=common.multiple_of_64, default=768, help="of a model of random weights")
    parser.add_argument("--layers", type=common.positive, default=12)
    parser.add_argument("--vocab", type=common.positive, default=50257, help="tokens that it knows; 256 or more")
    parser.add_argument("--seed", type=common.natural, default=0, help="of all random weights and of the training")
    args = parser.parse_args(argv)
    if args.vocab < 256:
        parser.error(f"--vocab is {args.vocab}, but the text is bytes: give it 256 or more")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        parser.error(f"--checkpoint {args.checkpoint} is no file here: its sizes are needed here, too")
    return args


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """The sizes of the model."""
    from model import sizes_of

    given = {"width": args.width, "layers": args.layers, "vocab": args.vocab}
    return sizes_of(Path(args.checkpoint)) if args.checkpoint else given


def build(args: argparse.Namespace) -> FedAvgRecipe:
    """The FLARE recipe of this job. The adapters are made by the server, and not here."""
    client_args = [f"--{name} {getattr(args, name)}" for name in CLIENT_OPTIONS]
    if args.checkpoint:
        # Sites elsewhere have it under the path that was given, those of the simulator where it is.
        path = args.checkpoint if common.EXPORT else Path(args.checkpoint).resolve()
        if len(str(path).split()) != 1:
            raise ValueError(
                f"--checkpoint {str(path)!r} has blanks, at which FLARE parts a script's arguments: move it"
            )
        client_args.append(f"--checkpoint {path}")
    recipe = FedAvgRecipe(
        name=NAME,
        model={"class_path": "model.Adapters", "args": {"rank": args.rank, "seed": args.seed, **sizes(args)}},
        min_clients=args.sites,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args=" ".join(client_args),
        server_expected_format=ExchangeFormat.PYTORCH,
        # What few bits lose on the way to the server is a part of one update, and not of the adapters.
        params_transfer_type=TransferType.DIFF,
        key_metric="",  # no best model is chosen
    )
    if args.quantize != "none":
        add_quantization(recipe, args.quantize)
    add_transfer(recipe)
    common.name_script(recipe)
    return recipe


def run(args: argparse.Namespace) -> None:
    """Run the job in the simulator, and print what travelled.

    Raises:
        RuntimeError: the job failed.
    """
    from model import full_size

    start = time.monotonic()
    folder = common.execute(build(args), args, NAME)
    report = common.print_report(folder)
    messages = report["moved"]["transfers"]
    adapters, travelled = (report["moved"][f"{what}_bytes"] / messages / 1e6 for what in ("raw", "wire"))
    full = 4 * full_size(sizes(args)) / 1e6
    print(
        f"\nEach site, each way, each round: adapters of {adapters:.2f} MB, which travel as {travelled:.2f} MB. "
        f"The whole model has {full:.1f} MB, {full / travelled:,.0f} times as much."
    )
    print(f"{time.monotonic() - start:.0f} s; the logs are in {args.workspace}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 and the end of the log if the job failed."""
    args = parse(argv)
    return common.run_and_tell(lambda: run(args), args, NAME)


if __name__ == "__main__":
    sys.exit(main())
