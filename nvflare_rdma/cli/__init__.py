"""The command `nvflare-rdma`: its arguments, and which module does what it asks for."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from nvflare_rdma.cli.bench_commands import add_bench_options
from nvflare_rdma.cli.doctor_commands import add_doctor_options
from nvflare_rdma.cli.kit_commands import add_kit_commands
from nvflare_rdma.cli.output import (
    ENVIRONMENT,
    CommandError,
    Result,
    add_output_options,
    print_error,
    print_result,
    print_schema,
)
from nvflare_rdma.version import __version__

__all__ = ["driver_path", "main"]

#: What to do about errors of the system, where that is known.
_HINTS = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room on the disk, within the user's quota",
    errno.ENOENT: "look at how it is written",
    errno.EMFILE: "allow more descriptors: `ulimit -n`",
    errno.ENFILE: "allow more descriptors: `sysctl fs.file-max`",
    errno.ENOMEM: "leave more memory free",
}
_MODEL = ".safetensors, a torch state dict, or .json of dtype and shape"


def driver_path() -> str:
    """The folder for FLARE's `comm_driver_path`."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "plugin")


def _driver_path(args: argparse.Namespace) -> Result:
    folder = driver_path()
    if not os.path.isfile(os.path.join(folder, "rdma_driver.py")):
        raise CommandError(
            "NOT_INSTALLED_WHOLE", f"{folder} has no rdma_driver.py", "nvflare-rdma is not whole: install it again"
        )
    return Result({"driver_path": folder}, folder)


def _doctor(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.doctor_commands import doctor_result

    return doctor_result(args)


def _bench(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.bench_commands import bench_result

    return bench_result(args)


def _policy(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.policy import policy_result

    return policy_result(args.config, args.model)


def _plan(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.plan_text import plan_result

    return plan_result(args.model, args.site, args.codec, args.policy, args.deadline, args.rounds, args.cost_per_gb)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=_MODEL)
    site = "a site and its line, as hospital=100Mbit,40ms,0.001: bits a second, round trip, packets lost"
    add("--site", metavar="NAME=RATE,RTT[,LOSS]", action="extend", nargs="+", required=True, help=site)
    codecs = "what to compare, exact or a codec (default: exact, and some of 16 to 2 bits)"
    add("--codec", metavar="TYPE", action="extend", nargs="+", default=[], help=codecs)
    policy = "a job, its config_fed_*.json, or a policy's JSON, whose rules count (default: add_quantization's)"
    add("--policy", metavar="CONFIG", help=policy)
    add(
        "--deadline", metavar="TIME", help="of a round's traffic, as 60s: say which codecs meet it; exit 1 if none does"
    )
    add("--rounds", metavar="N", type=int, default=1, help="of the run, for its time and cost (default: %(default)s)")
    add("--cost-per-gb", metavar="PRICE", type=float, help="of 10^9 bytes, both ways counted, as 0.09")


def _report(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.report import report_result

    return report_result(args.path, args.job, args.output, args.text, args.format)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="nvflare-rdma", description="RDMA-chunked streaming for NVIDIA FLARE")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Result], what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what)
        made.set_defaults(run=run)
        add_output_options(made)
        return made

    command("driver-path", _driver_path, "print the folder for FLARE's comm_driver_path")
    add_doctor_options(
        command("doctor", _doctor, "what this machine can use, why not the rest, and how others are reached")
    )
    add_bench_options(command("bench", _bench, "what links carry between two processes or hosts, beside plain TCP"))
    policy = command("policy", _policy, "what each tensor of a model travels as, and the size of the message")
    policy.add_argument("config", metavar="CONFIG", help="an exported job, its config_fed_*.json, or a policy's JSON")
    policy.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_plan(command("plan", _plan, "what rounds will take: bytes, seconds and memory, by codec and site"))
    report = command("report", _report, "a page about what a job's transfers did: bytes, seconds, paths, failures")
    report.add_argument(
        "path", metavar="WORKSPACE|JOB_DIR", type=Path, help="where the job ran, or what was downloaded"
    )
    report.add_argument("--job", metavar="ID", help="which job, or the beginning of its ID (default: the newest)")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes (default: report.html; no page with --text or --format json)",
    )
    report.add_argument("--text", action="store_true", help="print the figures, in 80 columns")
    add_kit_commands(command)
    return parser, dict(commands.choices)


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv`, or with the process's own arguments. Returns its exit status."""
    parser, commands = _parser()
    given = sys.argv[1:] if argv is None else argv
    if "--schema" in given and given[0] in commands:  # whatever else is missing
        print_schema(commands[given[0]], given[0])
        return 0
    args = parser.parse_args(given)
    try:
        status = _run(args)
        print(end="", flush=True)
    except BrokenPipeError:  # whoever reads this, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 128 + signal.SIGPIPE  # what a shell says of a program that the signal has ended
    return status


def _run(args: argparse.Namespace) -> int:
    from nvflare_rdma.errors import ConfigError

    try:
        result = _done(args)
        return print_result(result, args.format)
    except CommandError as error:
        return print_error(error, args.format, args.command)
    except ConfigError as error:  # which says what to do about it
        return print_error(CommandError("INVALID_INPUT", str(error)), args.format, args.command)
    except BrokenPipeError:
        raise
    except OSError as error:  # of a file that was named, or is below a folder that was
        return print_error(_unusable(error), args.format, args.command)


def _done(args: argparse.Namespace) -> Result:
    """What the command has found. A pipe that it has used is none that this is read from: it is told as an error."""
    try:
        found: Result = args.run(args)
    except BrokenPipeError as error:
        raise _unusable(error) from error
    return found


def _unusable(error: OSError) -> CommandError:
    what = f"{error.filename} can't be used" if error.filename else "this system refuses something"
    text = f"{what}: {error.strerror or str(error) or type(error).__name__}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return CommandError("NO_ACCESS", text, "run this as whoever owns it", ENVIRONMENT)
    hint = _HINTS.get(error.errno or 0, "mend what it says, and try again")
    return CommandError("NO_ACCESS" if error.filename else "SYSTEM_ERROR", text, hint, ENVIRONMENT)
