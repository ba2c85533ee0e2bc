"""What the commands print, by the conventions of FLARE's own (`nvflare.tool.cli_output`): tables for people, or one
envelope for programs.

    --format txt     data on stdout, errors and talk on stderr
    --format json    one object on stdout: schema_version, status, exit_code, and data; or error_code, message, hint and
                     recovery_category
    --format jsonl   the same as the last of a command's events
    --schema         what the command takes, as a JSON object

Exit codes: 0, done; 1, it could not be done, or something is wrong that the command looks for; 2, wrong usage; 141,
whoever reads the output has closed it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = "1"
FORMATS = ("txt", "json", "jsonl")
#: Values of recovery_category, which are FLARE's.
BY_CONFIG, ENVIRONMENT = "FIXABLE_BY_CONFIG", "ENVIRONMENT_FAILURE"


@dataclass(frozen=True)
class Result:
    """What a command has found.

    Attributes:
        data: for programs, in JSON's types.
        text: for people; without the last line end.
        exit_code: 1 if something is wrong that the command looks for.
    """

    data: Mapping[str, Any]
    text: str
    exit_code: int = 0


class CommandError(Exception):
    """A command can't do what it was asked for.

    Args:
        code: an upper-case name that stays the same, for programs.
        message: the thing, its value and the reason.
        hint: what to do about it.
        recovery: `BY_CONFIG`, where other input or settings help, or `ENVIRONMENT`.
    """

    def __init__(self, code: str, message: str, hint: str = "", recovery: str = BY_CONFIG) -> None:
        super().__init__(message)
        self.code, self.hint, self.recovery = code, hint, recovery


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all commands have."""
    parser.add_argument("--format", choices=FORMATS, default="txt", help="of what is printed (default: %(default)s)")
    parser.add_argument("--schema", action="store_true", help="print what the command takes, as JSON, and end")


def print_schema(parser: argparse.ArgumentParser, command: str) -> None:
    """Print what a command takes, as FLARE's commands do."""
    from nvflare.tool.cli_schema import parser_to_schema

    print(json.dumps(parser_to_schema(parser, f"nvflare-rdma {command}", output_modes=list(FORMATS))))


def print_result(result: Result, form: str) -> int:
    """Print what a command has found. Returns its exit code."""
    if form == "txt":
        print(result.text)
    else:
        _print_envelope({"status": "ok", "exit_code": result.exit_code, "data": result.data}, form)
    return result.exit_code


def print_error(error: CommandError, form: str, command: str) -> int:
    """Print why a command can't do what it was asked for. Returns its exit code."""
    if form == "txt":
        print(f"nvflare-rdma {command}: {error}", file=sys.stderr)
        if error.hint:
            print(f"Hint: {error.hint}", file=sys.stderr)
        print(f"Code: {error.code} (exit 1)", file=sys.stderr)
    else:
        what = {"error_code": error.code, "message": str(error), "hint": error.hint}
        _print_envelope({"status": "error", "exit_code": 1, **what, "recovery_category": error.recovery}, form)
    return 1


def _print_envelope(fields: Mapping[str, Any], form: str) -> None:
    last = {"event": "terminal", "terminal": True} if form == "jsonl" else {}
    print(json.dumps({"schema_version": SCHEMA_VERSION, **last, **fields}))
