"""What a user does first, with every Python that this package supports and that this machine has.

    python tests/pythons/smoke.py [--steps plain|all] [--work FOLDER] [-- PIP ARGUMENTS]

For each interpreter, in an environment that is made anew:

    plain    install the wheel, without torch; `nvflare-rdma --version`, `doctor`, `policy` and `plan`; every module can
             be imported, but for those that are for torch or pyverbs; the driver can be loaded
    torch    install torch as well; every module can be imported; `nvflare-rdma doctor`; run an exported job in FLARE's
             simulator, over `rdma://`, with 4-bit messages that go directly between the server's process and the
             site's; `nvflare-rdma report` of it

PYTHONS names the interpreters (paths, commands or versions, separated by spaces or colons). Without it, they are looked
for in PATH and where pyenv keeps its own. A supported version that the machine lacks is named and is no failure; that
none is found at all is one. It ends with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "tests" / "exported" / "linear"
MODULES = Path(__file__).with_name("modules.py")
#: What `policy` and `plan` are asked about: no file of weights is needed.
SHAPES = {"linear.weight": {"dtype": "float32", "shape": [512, 512]}}
SUPPORTED = ("3.11", "3.12", "3.13")
INSTALL_SECONDS, RUN_SECONDS, JOB_SECONDS = 1800, 300, 600
_VERSION = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"


class StepFailedError(Exception):
    """A command did not do what it should."""


@dataclass(frozen=True)
class Interpreter:
    version: str
    path: str


def _version_of(path: str) -> str:
    """Its version, or "" if it can't be run or can't make environments (pyenv's shims, Debian without python3-venv)."""
    try:
        done = subprocess.run([path, "-c", _VERSION], capture_output=True, text=True, timeout=RUN_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _candidates(version: str) -> list[str]:
    """Where a version may be, the likeliest place first."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    kept = [path for path in (root / "versions").glob(f"{version}.*/bin/python") if path.is_file()]
    kept.sort(key=lambda path: [int(part) if part.isdigit() else 0 for part in path.parts[-3].split(".")])
    in_path = shutil.which(f"python{version}")
    return [*([in_path] if in_path else []), *map(str, reversed(kept))]


def find_interpreters(wanted: str) -> list[Interpreter]:
    """What ``wanted`` (PYTHONS) names, or if it is empty, one of each supported version that is here.

    Raises:
        StepFailedError: something that is named is not here.
    """
    names = wanted.replace(":", " ").split()
    found = []
    for name in names or SUPPORTED:
        paths = _candidates(name) if name[:1].isdigit() else [shutil.which(name) or name]
        known = [Interpreter(version, path) for path in paths if (version := _version_of(path))]
        if known:
            found.append(known[0])
        elif names:
            raise StepFailedError(f"PYTHONS={wanted}: there is no usable {name} here")
        else:
            print(f"Python {name}: not on this machine")
    return found


def _run(command: Sequence[str | Path], timeout: float, cwd: Path) -> str:
    """Run it where nothing of the checkout can be imported by accident; what it printed."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise StepFailedError(f"{command[0]} ... took longer than {timeout:g} s") from error
    if done.returncode:
        raise StepFailedError(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def build_wheel(work: Path, pip_args: Sequence[str]) -> Path:
    folder = work / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", *pip_args, "--no-deps", "-w", folder, ROOT]
    _run(pip, INSTALL_SECONDS, work)
    (wheel,) = folder.glob("nvflare_rdma-*.whl")
    return wheel


def _install(python: Path, what: str, work: Path, pip_args: Sequence[str]) -> None:
    # What is imported is compiled then: it is a small part of all that is installed.
    pip = [python, "-m", "pip", "install", "-q", "--no-compile", *pip_args]
    _run([*pip, "-c", ROOT / "constraints.txt", what], INSTALL_SECONDS, work)


def _doctor(python: Path, work: Path) -> str:
    """In one line, which fabrics `nvflare-rdma doctor` finds usable."""
    command = python.with_name("nvflare-rdma")
    _run([command, "doctor"], RUN_SECONDS, work)
    report = json.loads(_run([command, "doctor", "--format", "json"], RUN_SECONDS, work))["data"]
    usable = [name for name, fabric in report["fabrics"].items() if fabric["usable"]]
    if "tcp" not in usable:
        raise StepFailedError(f"doctor finds tcp unusable: {report['fabrics']}")
    return f"doctor: {', '.join(usable)} usable"


def _modules(python: Path, work: Path, torch: bool) -> str:
    """How many modules could be imported, and how many are for what is not here."""
    found = json.loads(_run([python, MODULES], RUN_SECONDS, work))
    if found["failed"] or found["warned"] or (torch and "torch" in found["wanting"]):
        raise StepFailedError(f"not all modules can be imported as they should: {json.dumps(found, indent=1)}")
    wanting = "".join(f", {len(modules)} want {name}" for name, modules in sorted(found["wanting"].items()))
    return f"{found['imported']} modules{wanting}"


def _policy_and_plan(python: Path, work: Path) -> str:
    model, command = work / "model.json", python.with_name("nvflare-rdma")
    model.write_text(json.dumps(SHAPES))
    _run([command, "policy", JOB, model], RUN_SECONDS, work)
    _run([command, "plan", model, "--site", "clinic=30Mbit,60ms"], RUN_SECONDS, work)
    return "policy and plan"


def _plain(python: Path, wheel: Path, work: Path, pip_args: Sequence[str]) -> str:
    _install(python, str(wheel), work, pip_args)
    modules = _modules(python, work, torch=False)  # the first of all: Python warns of a source when it compiles it
    code = (
        "import importlib.util, nvflare_rdma.driver, nvflare_rdma.filters, nvflare_rdma.recipe\n"
        "assert importlib.util.find_spec('torch') is None, 'torch was installed without being asked for'\n"
        "from nvflare_rdma.streaming import RdmaTransfer; RdmaTransfer()"
    )
    _run([python, "-c", code], RUN_SECONDS, work)
    told = _run([python.with_name("nvflare-rdma"), "--version"], RUN_SECONDS, work).strip()
    if told != wheel.name.split("-")[1]:
        raise StepFailedError(f"nvflare-rdma --version says {told!r}, and the wheel is {wheel.name}")
    return f"{modules}; {_policy_and_plan(python, work)}; {_doctor(python, work)}"


def _with_torch(python: Path, wheel: Path, work: Path, pip_args: Sequence[str]) -> str:
    _install(python, f"{wheel}[torch]", work, pip_args)
    said = f"{_modules(python, work, torch=True)}; {_doctor(python, work)}"
    job, workspace = work / "job", work / "workspace"
    shutil.copytree(JOB, job)
    began = time.monotonic()
    simulator = [python, "-m", "nvflare_rdma.simulator", job, "-w", workspace, "-n", "1", "-t", "1"]
    _run([*simulator, "--scheme", "rdma"], JOB_SECONDS, work)
    records = workspace / "site-1" / "simulate_job" / "nvflare_rdma" / "transfers.jsonl"
    transfers = [json.loads(line) for line in records.read_text().splitlines()]
    moved = {(t["direction"], t["path"], t["outcome"]) for t in transfers}
    if moved != {("sent", "direct", "done"), ("received", "direct", "done")}:
        raise StepFailedError(f"the job's transfers were {sorted(moved)}")
    wire, raw = (sum(t[key] for t in transfers) for key in ("wire_bytes", "raw_bytes"))
    took = time.monotonic() - began
    _run([python.with_name("nvflare-rdma"), "report", workspace], RUN_SECONDS, work)
    if not (page := work / "report.html").is_file():  # where it was run
        raise StepFailedError(f"`nvflare-rdma report` has not written {page}")
    return f"{said}; job in {took:.0f} s, {wire} bytes for {raw}, over {transfers[0]['fabric'] or 'no link'}"


def check(interpreter: Interpreter, wheel: Path, work: Path, steps: str, pip_args: Sequence[str]) -> bool:
    """Whether all steps succeed; says each as it ends."""
    folder = work / interpreter.version
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = folder / "venv" / "bin" / "python"
    for name, step in (("plain", _plain), ("torch", _with_torch)):
        if name == "torch" and steps == "plain":
            continue
        began = time.monotonic()
        try:
            if not python.exists():
                _run([interpreter.path, "-m", "venv", folder / "venv"], RUN_SECONDS, folder)
            said, good = step(python, wheel, folder, pip_args), True
        except (StepFailedError, OSError, ValueError, KeyError) as error:
            said, good = f"FAILED: {error}", False
        took = time.monotonic() - began
        print(f"Python {interpreter.version}, {name}: {said} ({took:.0f} s)", flush=True)
        if not good:
            return False
    shutil.rmtree(folder)  # some GiB
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", choices=("plain", "all"), default="all", help="plain: without torch and the job")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pythons", help="for environments and the wheel")
    parser.add_argument("pip_args", nargs="*", metavar="PIP ARGUMENTS", help="for every `pip install`, after --")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        interpreters = find_interpreters(os.environ.get("PYTHONS", ""))
        if not interpreters:
            raise StepFailedError(f"none of Python {', '.join(SUPPORTED)} is on this machine")
        wheel = build_wheel(work, arguments.pip_args)
    except StepFailedError as error:
        print(error)
        return 1
    print(f"{wheel.name}, on Python {', '.join(found.version for found in interpreters)}", flush=True)
    results = [check(found, wheel, work, arguments.steps, arguments.pip_args) for found in interpreters]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
