"""Jobs of `jobs/`: exported on this machine, and run where nothing of it is but the package."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, run

JOBS = ROOT / "jobs"


def load(job: str, name: str) -> Any:
    """A module of a job. The name alone may be another job's."""
    spec = importlib.util.spec_from_file_location(f"{job}_{name}", JOBS / job / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.path[:0] = sys.modules.pop("model", None), [str(JOBS / job)]  # which its own `import model` means
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(JOBS / job))
        sys.modules.pop("model", None)
        if before is not None:
            sys.modules["model"] = before
    return module


def exported_elsewhere(folder: Path, name: str, *options: str, **extra: str) -> Path:
    """The job, exported and then moved. Nothing in it says where it was made: neither an absolute path in its
    configuration, nor this checkout, the home folder or the folder of the export in any file."""
    here, there = folder / "here", folder / "there"
    export = ["--workspace", str(folder / "none"), "--export", "--export-dir", str(here)]
    done = run(JOBS / name / "job.py", *options, *export, timeout=120, **extra)
    assert done.returncode == 0, done.stderr
    files = {file: file.read_text() for file in here.rglob("*") if file.is_file()}
    configurations = [text for file, text in files.items() if file.suffix == ".json"]
    assert len(configurations) == 3
    for text in configurations:
        assert not re.findall(r'"(?:[^"]*[\s=:])?/.*"', text)  # an absolute path, alone or among arguments
    places = {str(ROOT), str(folder), str(Path.home())} - {"/"}
    assert not [(file.name, place) for file, text in files.items() for place in places if place in text]
    here.rename(there)
    return there / name


def simulated(job: Path, workspace: Path, sites: int, **extra: str) -> str:
    """Run a job in FLARE's own simulator, and return what it has printed."""
    simulator = ["-m", "nvflare.private.fed.app.simulator.simulator"]
    done = run(simulator, str(job), "-w", str(workspace), "-n", str(sites), "-t", str(sites), timeout=200, **extra)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-8000:]
    assert "Traceback" not in printed, printed[-8000:]
    return printed


def records(workspace: Path, process: str) -> list[dict[str, Any]]:
    """What a process has recorded of its transfers."""
    file = workspace / process / "simulate_job" / "nvflare_rdma" / "transfers.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
