"""jobs/stdlib_lm/job.py, with a receiver of analytics on the server."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "jobs" / "stdlib_lm")]

import job  # noqa: E402
from scalar_receiver import ScalarReceiver  # noqa: E402

build = job.build


def tracked(args):
    recipe = build(args)
    recipe._job.to_server(ScalarReceiver(), id="receiver")
    return recipe


if __name__ == "__main__":
    job.build = tracked
    sys.exit(job.main())
