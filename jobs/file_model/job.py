"""Bring a base model to all sites: a safetensors file, encoded on the way, compared, and gone on with if interrupted.

python jobs/file_model/job.py
python jobs/file_model/job.py --model models/gpt2.safetensors --quantize none
python jobs/file_model/job.py --export --export-dir exported       (FLARE's own options: write the job and stop)
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
from nvflare.job_config.api import FedJob  # noqa: E402
from nvflare.recipe.spec import Recipe  # noqa: E402

from nvflare_rdma.recipe import add_transfer  # noqa: E402

NAME = "file_model"
MODELS = "models"  # folder of the server and of each site


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.basic_parser(__doc__, NAME, sites=2, quantize="int8")
    parser.add_argument("--model", default="", help="a safetensors file of the server, in place of random weights")
    parser.add_argument("--width", type=common.multiple_of_64, default=768, help="of a GPT-2 of random weights")
    parser.add_argument("--layers", type=common.positive, default=12)
    parser.add_argument("--vocab", type=common.positive, default=50257)
    args = parser.parse_args(argv)
    from nvflare_rdma.errors import ConfigError
    from nvflare_rdma.transfer.files import codec_for_files

    try:
        if args.quantize != "none":
            codec_for_files(args.quantize)
    except ConfigError as error:
        parser.error(f"--quantize {args.quantize}: {error}")
    if args.model and not common.EXPORT and not Path(args.model).is_file():
        parser.error(f"--model {args.model} is no file")
    return args


def build(args: argparse.Namespace) -> Recipe:
    """The FLARE job, as a recipe."""
    from client import FetchModel
    from server import TASK, Distribute

    # On another machine, the server has the file below its own folder. The simulator clears those of its server and
    # sites before it runs; so models are beside them here.
    folder = MODELS if common.EXPORT else str(args.workspace.resolve() / MODELS)
    model = args.model if common.EXPORT or not args.model else str(Path(args.model).resolve())
    codec = "" if args.quantize == "none" else args.quantize
    job = FedJob(name=NAME, min_clients=args.sites)
    job.to_server(Distribute(model, folder, codec, args.width, args.layers, args.vocab, args.sites))
    job.to_clients(FetchModel(folder), tasks=[TASK])
    recipe = Recipe(job)
    add_transfer(recipe)
    return recipe


def run(args: argparse.Namespace) -> None:
    """Run the job in the simulator, and print what travelled, and what the server was told.

    Raises:
        RuntimeError: the job failed.
    """
    start = time.monotonic()
    folder = common.execute(build(args), args, NAME)
    said = re.findall(r"- (\S+ has (?:got|had) .*)", (folder / "server" / "log.txt").read_text())
    if len(said) < args.sites:
        raise RuntimeError(f"{len(said)} of {args.sites} sites have the model")
    if any(" has got " in line for line in said):
        common.print_report(folder)
        print()
    print(*sorted(said), sep="\n")
    print(f"{time.monotonic() - start:.0f} s; the models are in {args.workspace / MODELS}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 and the end of the log if the job failed."""
    args = parse(argv)
    return common.run_and_tell(lambda: run(args), args, NAME)


if __name__ == "__main__":
    sys.exit(main())
