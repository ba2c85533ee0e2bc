"""The job's modules are scripts in a folder of their own, found as FLARE finds them: by that folder on sys.path."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "jobs" / "stdlib_lm"
sys.path.insert(0, str(FOLDER))
