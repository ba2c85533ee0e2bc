"""Train a small language model on the standard library's source code with FLARE, and show what that moved.

python jobs/stdlib_lm/job.py --quantize normfloat4 --driver rdma --workspace /tmp/stdlib_lm
python jobs/stdlib_lm/job.py --export --export-dir exported        (FLARE's own options: write the job and stop)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parents[1])) if p not in sys.path]

EXPORT = "--export" in sys.argv  # importing FLARE takes its own options out of sys.argv

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe  # noqa: E402
from nvflare.client.config import ExchangeFormat, TransferType  # noqa: E402

from nvflare_rdma.codecs import CODEC_NAMES  # noqa: E402

NAME = "stdlib_lm"
QUANTIZE = ("none", *CODEC_NAMES)
CLIENT_OPTIONS = ("sites", "steps", "width", "layers", "seed")
DRIVERS = ("rdma", "tcp", "grpc")
# FLARE's own settings. By default it asks for 2 MB of tensors at a time and sends them in frames of 1 MiB, and each
# request and frame brings some 600 bytes of headers.
DOWNLOAD_CHUNK_BYTES = 64 << 20
FRAME_BYTES = 8 << 20


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", choices=QUANTIZE, default="normfloat4", help="how weights travel")
    parser.add_argument("--error-feedback", action="store_true", help="add what a message lost to the next one")
    parser.add_argument("--delta", action="store_true", help="send the sites what has changed, not the whole model")
    parser.add_argument("--driver", choices=DRIVERS, default="rdma", help="what they travel over")
    parser.add_argument("--direct", action="store_true", help="tensors go directly from process to process")
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--sites", type=_positive, default=3)
    parser.add_argument("--steps", type=_positive, default=16, help="training steps a site takes a round")
    parser.add_argument("--width", type=_width, default=512, help="of the model; 64 a head")
    parser.add_argument("--layers", type=_positive, default=4)
    parser.add_argument("--seed", type=_natural, default=0, help="of the initial weights and of what is trained on")
    parser.add_argument("--workspace", type=Path, default=Path("stdlib_lm_workspace"))
    parser.add_argument("--verbose", action="store_true", help="show FLARE's log instead of progress")
    args = parser.parse_args(argv)
    if args.quantize == "none" and (args.error_feedback or args.delta):
        parser.error("--error-feedback and --delta are for messages of few bits: choose one with --quantize")
    return args


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _width(text: str) -> int:
    value = _positive(text)
    if value % 64:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 64")
    return value


def build(args: argparse.Namespace) -> FedAvgRecipe:
    """The FLARE recipe of this job."""
    from evaluate import HeldOutLoss
    from model import ByteGPT

    from nvflare_rdma.metrics import add_traffic_recorder

    recipe = FedAvgRecipe(
        name=NAME,
        model=ByteGPT(args.width, args.layers, heads=args.width // 64, seed=args.seed),
        min_clients=args.sites,
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args=" ".join(f"--{name} {getattr(args, name)}" for name in CLIENT_OPTIONS),
        server_expected_format=ExchangeFormat.PYTORCH,
        # Sites send what they changed: the server keeps full precision, and what few bits lose is a part of one
        # update and not of the model.
        params_transfer_type=TransferType.DIFF,
        key_metric="",  # no best model is chosen: held-out loss is recorded instead
    )
    recipe.add_server_config({"tensor_download_chunk_size": DOWNLOAD_CHUNK_BYTES})
    recipe.add_client_config({"tensor_download_chunk_size": DOWNLOAD_CHUNK_BYTES})
    recipe._job.to_server(HeldOutLoss(args.width, args.layers), id="held_out_loss")
    add_traffic_recorder(recipe)
    if args.direct:
        from nvflare_rdma.recipe import add_transfer

        add_transfer(recipe)
    if args.quantize != "none":
        from nvflare_rdma.recipe import add_quantization

        add_quantization(recipe, args.quantize, error_feedback=args.error_feedback, delta=args.delta)
    return recipe


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the job in the simulator; writes results.json and results.png and returns the former's content.

    Raises:
        RuntimeError: the job failed.
    """
    from progress import ProgressView
    from report import collect, title, write_json, write_plot

    from nvflare_rdma.simulator import RdmaSimEnv

    workspace = args.workspace.resolve()
    env = RdmaSimEnv(
        num_clients=args.sites,
        workspace_root=str(workspace),
        scheme=args.driver,
        console=None if args.verbose else workspace / "console.log",
    )
    recipe = build(args)
    if EXPORT:
        recipe.execute(env)  # exports the job and ends this process
    _clear(workspace)
    (workspace / "progress").mkdir(parents=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("workspace", "verbose")}
    start = time.monotonic()
    with _environment(args, workspace / "progress"):
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


@contextlib.contextmanager
def _environment(args: argparse.Namespace, progress: Path) -> Iterator[None]:
    """What the server's and the sites' processes inherit."""
    from progress import FOLDER_VARIABLE

    before = dict(os.environ)
    os.environ[FOLDER_VARIABLE] = str(progress)
    # A FLARE job finds this package installed; run from a source tree it is found by this path.
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(HERE.parents[1]), before.get("PYTHONPATH")) if p)
    os.environ.setdefault("NVFLARE_STREAMING_CHUNK_SIZE", str(FRAME_BYTES))
    if args.driver == "rdma" or args.direct:
        # All processes are on one host, where they could use shared memory, which no kernel counter sees.
        os.environ.setdefault("NVFLARE_RDMA_FABRICS", "tcp")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def last_errors(workspace: Path, count: int = 8) -> str:
    """The log of a failed run, and the last lines in it that tell of an error."""
    logs = [workspace / "console.log", *sorted((workspace / NAME).rglob("log.txt"))]
    logs = [log for log in logs if log.is_file() and log.stat().st_size]
    found: list[str] = []
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line or "Error:" in line]
        found = [f"{log}:", *(f"  {line}" for line in errors[-count:])]
        if errors:
            break
    return "\n".join(found) or f"no log was written under {workspace}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table; 1 and the end of the log if the job failed."""
    args = parse(argv)
    try:
        results = run(args)
    except Exception as e:  # noqa: BLE001  a job has failed in whatever way: say where to look
        print(f"\nThe job failed: {e}\n{last_errors(args.workspace.resolve())}", file=sys.stderr)
        return 1
    from report import print_table

    print_table(results)
    print(f"{results['wall_seconds']:.0f} s; results.json and results.png are in {args.workspace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
