"""The jobs' modules are scripts in folders of their own, found as FLARE finds them: by those folders on sys.path."""

from __future__ import annotations

import sys
from pathlib import Path

JOBS = Path(__file__).parents[2] / "jobs"
sys.path[:0] = [str(JOBS / "stdlib_lm"), str(JOBS)]
