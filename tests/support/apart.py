"""Scripts that need namespaces and wires of their own, and what they find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT, environment
from tests.wan import wire


def found_apart(script: Path, folder: Path, timeout: float) -> Any:
    """Run ``script FOLDER`` where there can be wires, and return what it wrote to FOLDER/results.json. Skips the test
    where there can be none."""
    if reason := wire.why_not():
        pytest.skip(f"no wires here: {reason}")
    done = subprocess.run(
        wire.apart(sys.executable, str(script), str(folder)),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())
