"""Whether the first line of a commit message (a file's) is `area: imperative`, of 72 characters at most."""

from __future__ import annotations

import re
import sys
from pathlib import Path

SUBJECT = re.compile(r"[a-z][a-z0-9_/.-]*(, [a-z][a-z0-9_/.-]*)*: \S.*[^.\s]")
BY_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ")


def problem(message: str) -> str:
    """What is wrong with it; "" if nothing is."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = lines[0] if lines else ""
    if subject.startswith(BY_GIT):
        return ""
    if not SUBJECT.fullmatch(subject):
        return f"the subject has to be `area: imperative`, without a full stop: {subject!r}"
    if len(subject) > 72:
        return f"the subject has {len(subject)} characters, and 72 are allowed: {subject!r}"
    return "" if len(lines) < 2 or not lines[1] else "the line after the subject has to be empty"


if __name__ == "__main__":
    sys.exit(problem(Path(sys.argv[1]).read_text()) or 0)
