"""Scripts that need namespaces and wires of their own, and what they find."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT, found_by
from tests.wan import wire


def found_apart(script: Path, folder: Path, timeout: float) -> Any:
    """Run ``script FOLDER`` where there can be wires, and return what it wrote to FOLDER/results.json. Skips the test
    where there can be none."""
    if reason := wire.why_not():
        pytest.skip(f"no wires here: {reason}")
    return found_by(wire.apart(sys.executable, str(script), str(folder)), folder, timeout, ROOT)
