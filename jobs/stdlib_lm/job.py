"""Train a small language model on the standard library's source code with FLARE, and show what that moved.

python jobs/stdlib_lm/job.py --quantize normfloat4 --driver rdma --workspace /tmp/stdlib_lm
python jobs/stdlib_lm/job.py --export --export-dir exported        (FLARE's own options: write the job and stop)
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

import common  # noqa: E402  before FLARE
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe  # noqa: E402
from nvflare.client.config import ExchangeFormat, TransferType  # noqa: E402
from training import PEAK_RATE  # noqa: E402

NAME = "stdlib_lm"
CLIENT_OPTIONS = ("sites", "steps", "width", "layers", "seed", "rate", "rank")
# FLARE's own settings. By default it asks for 2 MB of tensors at a time and sends them in frames of 1 MiB, and each
# request and frame brings some 600 bytes of headers.
DOWNLOAD_CHUNK_BYTES = 64 << 20
FRAME_BYTES = 8 << 20


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__, NAME, rounds=5, sites=3)
    parser.add_argument("--steps", type=common.positive, default=16, help="training steps a site takes a round")
    parser.add_argument("--width", type=common.multiple_of_64, default=512, help="of the model; 64 a head")
    parser.add_argument("--layers", type=common.positive, default=4)
    parser.add_argument("--seed", type=common.natural, default=0, help="of the initial weights and of the training")
    parser.add_argument("--rate", type=common.above_zero, default=PEAK_RATE, help="the highest learning rate")
    parser.add_argument(
        "--start", metavar="FILE", help="weights to go on from: FL_global_model.pt of an earlier run of all weights"
    )
    parser.add_argument("--rank", type=common.natural, default=0, help="of LoRA adapters, which alone are trained then")
    parser.add_argument("--in-order", action="store_true", help="a seed gives the same bits in each run")
    args = common.check(parser, parser.parse_args(argv))
    if args.start and common.EXPORT:
        parser.error("--start is for the simulator: an exported job's sites don't have that file")
    if args.start and not Path(args.start).is_file():
        parser.error(f"--start {args.start} is no file: give an earlier run's FL_global_model.pt")
    if args.start:
        args.start = start = str(Path(args.start).resolve())
        if len(start.split()) != 1:
            parser.error(f"--start {start!r} has blanks, at which FLARE parts a script's arguments: move it")
        if Path(start).is_relative_to(args.workspace.resolve() / NAME):
            parser.error(f"--start {start} is in what this run replaces: copy it, or name another --workspace")
    return args


def build(args: argparse.Namespace) -> FedAvgRecipe:
    """The FLARE recipe of this job."""
    from evaluate import HeldOutLoss
    from in_order import InOrder
    from model import ByteGPT

    start = {"start": args.start} if args.start else {}
    train_args = {name: getattr(args, name) for name in CLIENT_OPTIONS} | start
    weights = {"seed": args.seed, "rank": args.rank, **start}
    recipe = FedAvgRecipe(
        name=NAME,
        model=ByteGPT(args.width, args.layers, heads=args.width // 64, **weights),
        min_clients=args.sites,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args=" ".join(f"--{name} {value}" for name, value in train_args.items()),
        server_expected_format=ExchangeFormat.PYTORCH,
        # Sites send what they changed: the server keeps full precision, and what few bits lose is a part of one
        # update and not of the model.
        params_transfer_type=TransferType.DIFF,
        aggregator=InOrder() if args.in_order else None,
        key_metric="",  # no best model is chosen: held-out loss is recorded instead
    )
    recipe.add_server_config({"tensor_download_chunk_size": DOWNLOAD_CHUNK_BYTES})
    recipe.add_client_config({"tensor_download_chunk_size": DOWNLOAD_CHUNK_BYTES})
    recipe._job.to_server(HeldOutLoss(args.width, args.layers, **weights), id="held_out_loss")
    common.add_parts(recipe, args)
    common.name_script(recipe)
    return recipe


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the job in the simulator; writes results.json and results.png and returns the former's content.

    Raises:
        RuntimeError: the job failed.
    """
    from progress import FOLDER_VARIABLE, ProgressView
    from report import collect, title, write_json, write_plot

    workspace = args.workspace.resolve()
    env = common.simulator(args)
    recipe = build(args)
    if common.EXPORT:
        recipe.execute(env)  # exports the job and ends this process
    _clear(workspace)
    (workspace / "progress").mkdir(parents=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("workspace", "verbose")}
    start = time.monotonic()
    with common.environment(**common.counted(args), NVFLARE_STREAMING_CHUNK_SIZE=str(FRAME_BYTES)):
        os.environ[FOLDER_VARIABLE] = str(workspace / "progress")
        if args.verbose:
            recipe.execute(env)
        else:
            with ProgressView(workspace / "progress", title(settings), args.rounds * args.sites * args.steps):
                recipe.execute(env)
    results = collect(Path(env.workspace_root) / NAME, {**settings, "wall_seconds": round(time.monotonic() - start, 1)})
    results["model_bytes"] = 4 * sum(p.numel() for p in recipe.model.parameters())
    write_json(results, workspace / "results.json")
    write_plot([results], workspace / "results.png")
    return results


def _clear(workspace: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for name in (NAME, "progress"):
        shutil.rmtree(workspace / name, ignore_errors=True)
    for name in ("console.log", "results.json", "results.png"):
        (workspace / name).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table; 1 and the end of the log if the job failed."""
    args = parse(argv)
    try:
        results = run(args)
    except Exception as e:  # noqa: BLE001  a job has failed in whatever way: say where to look
        print(f"\nThe job failed: {e}\n{common.last_errors(args.workspace.resolve(), NAME)}", file=sys.stderr)
        return 1
    from report import print_table

    print_table(results)
    print(f"{results['wall_seconds']:.0f} s; results.json and results.png are in {args.workspace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
