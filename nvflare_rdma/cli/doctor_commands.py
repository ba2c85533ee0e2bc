"""What the command `doctor` takes: this machine's report, a live check between two hosts, or a snippet for a site."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from nvflare_rdma.cli.output import Result

LISTEN_FOR = "10m"
_RUNTIMES = ("k8s", "docker", "slurm")  # those of `deploy_snippets`, which is imported when it is needed


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument(
        "--kit",
        "--workspace",
        dest="kit",
        type=Path,
        metavar="FOLDER",
        help="a start-up kit, whose settings and certificates count, or a folder with a comm_config.json",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--listen", metavar="[HOST:]PORT", help="be there for another host's --peer, for a while")
    one.add_argument("--peer", metavar="HOST:PORT", help="check the way to another host, which runs --listen")
    one.add_argument("--for", dest="runtime", choices=_RUNTIMES, help="print what this site's containers or jobs need")
    parser.add_argument(
        "--timeout", metavar="TIME", default=LISTEN_FOR, help="for how long to listen (default: %(default)s)"
    )


def doctor_result(args: argparse.Namespace) -> Result:
    """Do what the options say."""
    if args.listen is not None:
        from nvflare_rdma.cli.peer_listen import listen_result

        return listen_result(args.listen, args.kit, args.timeout)
    if args.peer is not None:
        return _peer(args)
    if args.runtime is not None:
        from nvflare_rdma.cli.deploy_snippets import snippet_result

        return snippet_result(args.runtime, args.kit)
    from nvflare_rdma.cli.doctor import examine, has_configuration
    from nvflare_rdma.cli.doctor_text import to_text

    if args.kit is not None and not has_configuration(args.kit):
        from nvflare_rdma.cli.enable import kit_of

        kit_of(args.kit)  # a kit as it was made, or nothing that can be looked at
    report = examine(args.kit)
    return Result(asdict(report), to_text(report), 0 if report.is_well else 1)


def _peer(args: argparse.Namespace) -> Result:
    from nvflare_rdma.cli.peer_check import examine_peer
    from nvflare_rdma.cli.peer_text import to_text

    report = examine_peer(args.peer, args.kit)
    return Result(asdict(report), to_text(report), 1 if report.problems else 0)
