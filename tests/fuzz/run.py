"""Fuzzing: what comes from a peer, or lies on a disk, is made up at random, and has to be refused as it should be.

    python -m tests.fuzz.run [--seconds 60] [--seed 1] [TARGET ...]     each target for so long
    python -m tests.fuzz.run --case TARGET:SEED:NUMBER                  one case again

What raises anything else than it may is written to build/fuzz, with its input and how to run it again.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import sys
import time
from pathlib import Path

from tests.fuzz import descriptions, encoded, protocol
from tests.fuzz.target import TARGETS, Finding, Target

MODULES = (descriptions, encoded, protocol)
FOLDER = Path("build/fuzz")
#: A case takes no longer, of a processor's time.
_SLOW_SECONDS = 2.0
_MEMORY_BYTES = 8 << 30


def fuzz(target: Target, seed: str, seconds: float) -> tuple[int, list[Finding]]:
    """Run cases of a target for so long. Returns how many, and what was found: each fault once."""
    end, number, found = time.monotonic() + seconds, 0, dict[tuple[str, str], Finding]()
    while time.monotonic() < end:
        began = time.process_time()
        finding = target.attempt(seed, number)
        if finding is None and (took := time.process_time() - began) > _SLOW_SECONDS and number:
            finding = Finding(target.name, seed, number, f"it took {took:.1f} s", "time", "", [])
        if finding is not None:
            found.setdefault((finding.error.split(":")[0], finding.where), finding)
        number += 1
    return number, list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument(
        "--seed", default=str(random.randrange(10**6)), help="any text; the default is another each time"
    )
    parser.add_argument("--case", help="run one case again")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}, but {', '.join(TARGETS)}")
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    if arguments.case:
        name, seed, number = arguments.case.split(":")
        finding = TARGETS[name].attempt(seed, int(number))
        print(finding or "it is well")
        return int(finding is not None)
    failed = False
    for name in arguments.targets or TARGETS:
        count, findings = fuzz(TARGETS[name], arguments.seed, arguments.seconds)
        print(f"{name}: seed {arguments.seed}, {count} cases, {len(findings)} findings", flush=True)
        for finding in findings:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path = FOLDER / f"{name}-{arguments.seed}-{finding.number}.txt"
            path.write_text(f"{finding}\n", errors="backslashreplace")
            print(f"  {finding.error[:200]} ({path})", flush=True)
        failed = failed or bool(findings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
