"""What the command `bench` takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nvflare_rdma.cli.output import ENVIRONMENT, CommandError, Result

_MOST_REPEAT, _MOST_SIZE = 100, 4096
_ONLY_CONNECT = ("fabrics", "rails", "chunk_mib", "plot")


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    add = parser.add_argument
    add("--kit", type=Path, metavar="FOLDER", help="a start-up kit, whose settings and certificates count")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--listen", metavar="[HOST:]PORT", help="be there for another host's --connect, for a while")
    one.add_argument("--connect", metavar="HOST:PORT", help="measure the way to another host, which runs --listen")
    add("--fabrics", metavar="NAMES", help="such as tcp,shm (default: all that both sides can use)")
    add("--rails", metavar="NUMBERS", help="the most tcp connections of a link, such as 1,4 (default: rdma_rails)")
    add("--chunk-mib", metavar="SIZES", help="such as 0.25,1,4 (default: rdma_chunk_bytes)")
    add("--codecs", metavar="NAMES", default="exact", help="such as exact,int8,normfloat4 (default: %(default)s)")
    add("--sizes", metavar="MIB", default="1,16,256", help="MiB that are moved at once (default: %(default)s)")
    add("--repeat", metavar="N", type=int, default=3, help="how often, each way (default: %(default)s)")
    add("--plot", metavar="FILE.svg", type=Path, help="draw bars of the rates")
    add("--timeout", metavar="TIME", default="10m", help="of all of it, or for how long to listen (default: 10m)")
    add("--runs", metavar="N", type=int, help="with --listen: end after so many runs (default: when the time is over)")


def bench_result(args: argparse.Namespace) -> Result:
    """Do what the options say."""
    if args.listen is not None:
        from nvflare_rdma.cli.bench_listen import bench_listen_result

        for name in _ONLY_CONNECT:
            if getattr(args, name) is not None:
                text = f"--{name.replace('_', '-')} is for the side that connects, and --listen is given"
                raise CommandError("INVALID_INPUT", text, "give it on the other host")
        return bench_listen_result(args.listen, args.kit, args.timeout, args.runs)
    if args.runs is not None:
        raise CommandError("INVALID_INPUT", "--runs is for the side that listens", "add --listen PORT, or leave it out")
    return _measure(args)


def _measure(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.bench import bench
    from nvflare_rdma.cli.bench_link import EXACT, LEAST_CHUNK, MOST_CHUNK, usable_codecs
    from nvflare_rdma.cli.bench_progress import steps_on
    from nvflare_rdma.cli.bench_report import MIB, Asked
    from nvflare_rdma.cli.bench_text import to_data, to_svg, to_text
    from nvflare_rdma.cli.peer_listen import parse_timeout
    from nvflare_rdma.fabric import FABRICS, MAX_RAILS

    if not 1 <= args.repeat <= _MOST_REPEAT:
        raise CommandError("INVALID_INPUT", f"--repeat {args.repeat} is out of range", f"give 1 to {_MOST_REPEAT}")
    rails = (None,) if args.rails is None else parse_numbers(args.rails, "--rails", 1, MAX_RAILS)
    least, most = LEAST_CHUNK / MIB, MOST_CHUNK / MIB
    chunks = (None,) if args.chunk_mib is None else parse_numbers(args.chunk_mib, "--chunk-mib", least, most)
    asked = Asked(
        fabrics=() if args.fabrics is None else parse_names(args.fabrics, "--fabrics", list(FABRICS)),
        rails=tuple(None if each is None else int(each) for each in rails),
        chunks=tuple(None if each is None else int(each * MIB) for each in chunks),
        codecs=parse_names(args.codecs, "--codecs", [EXACT, *usable_codecs()]),
        sizes=tuple(int(each * MIB) for each in parse_numbers(args.sizes, "--sizes", 1, _MOST_SIZE)),
        repeat=args.repeat,
    )
    if args.plot is not None:
        _check_plot(args.plot)
    seconds = parse_timeout(args.timeout)
    with steps_on(sys.stderr) as steps:
        report = bench(args.connect, args.kit, asked, seconds, steps)
    if args.plot is not None:
        try:
            args.plot.write_text(to_svg(report))
        except OSError as error:
            raise _unwritable(args.plot, error) from error
    return Result(to_data(report), to_text(report), 0 if report.figures and not report.broke_off else 1)


def _check_plot(path: Path) -> None:
    """Before anything is measured. Raises CommandError: no picture can be put there."""
    if path.suffix != ".svg":
        raise CommandError("INVALID_INPUT", f"--plot {path} is no .svg file", "SVG is what is drawn: name it so")
    if not path.parent.is_dir():
        text = f"--plot {path}: there is no folder {path.parent}"
        raise CommandError("INVALID_INPUT", text, "make it, or name another one")
    if path.is_dir():
        raise CommandError("INVALID_INPUT", f"--plot {path} is a folder", "name a file")


def _unwritable(path: Path, error: OSError) -> CommandError:
    return CommandError("NO_ACCESS", f"{path} can't be written: {error.strerror}", "name another file", ENVIRONMENT)


def parse_numbers(text: str, option: str, low: float, high: float) -> tuple[float, ...]:
    """Numbers with commas between them, each once.

    Raises:
        CommandError: one is none, or out of range.
    """
    found = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            hint = f"write numbers of {low:g} to {high:g} with commas between them, as {option} 1,4"
            raise CommandError("INVALID_INPUT", f"{option} {part.strip()!r} is no number of {low:g} to {high:g}", hint)
        found.append(number)
    return tuple(dict.fromkeys(found))


def parse_names(text: str, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names with commas between them, each once.

    Raises:
        CommandError: one is unknown.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in known]:
        hint = f"there are {', '.join(known)}"
        raise CommandError("INVALID_INPUT", f"{option} {unknown[0]!r} is unknown", hint)
    return names
