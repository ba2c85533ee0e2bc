"""All that one does with FLARE and this package, on one machine: a server and three sites that are made, set up and
started, two jobs that run there, one that is aborted, what they moved, and the end of it all.

python jobs/tour.py                     (or: make tour)
python jobs/tour.py --folder FOLDER     keep kits, logs, results and reports in FOLDER

It takes what is installed beside the Python that runs it: nvflare-rdma[jobs,peft]. Each command is printed before it
runs, with its seconds after it. The ports are free ones, and the user's own FLARE configuration is left alone. It ends
with 1 if a step failed. No process is left then either.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SITES = 3
#: Every process that the tour starts, and that these start, has a variable of this name, with the tour's own value.
MARK = "TOUR_ID"  # no NVFLARE_..., of which FLARE and this package read settings
#: Jobs that take about a minute on two cores.
STDLIB_LM = ["--rounds", "2", "--steps", "2", "--width", "128", "--layers", "2", "--direct"]
LORA_GPT2 = ["--rounds", "2", "--steps", "1", "--width", "128", "--layers", "2", "--vocab", "512"]
ENDLESS = [*STDLIB_LM[2:], "--rounds", "10000"]
COMMAND_SECONDS, START_SECONDS, JOB_SECONDS, END_SECONDS = 300.0, 300.0, 900.0, 180.0  # a machine may be busy


class StepFailedError(Exception):
    """A step did not do what it should."""


class Tour:
    """Runs commands in a folder, one after the other, and says what each did and how long it took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.began = time.monotonic()
        self.steps: list[tuple[str, float]] = []
        self._mark = uuid.uuid4().hex
        home = folder / "home"  # FLARE notes there which kits are in use
        home.mkdir(parents=True, exist_ok=True)
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NVFLARE_")}
        self._environment = kept | {
            "HOME": str(home),
            "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
            "PATH": programs,
            MARK: self._mark,
        }

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        """What `action` returns; its seconds are told at the end.

        Raises:
            StepFailedError: it failed.
        """
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        try:
            return action()
        finally:
            self.steps.append((name, time.monotonic() - began))

    def run(self, *command: str | Path, seconds: float = COMMAND_SECONDS, allowed: Sequence[int] = (0,)) -> str:
        """Run a command and print it, and its seconds; what it wrote to stdout.

        Raises:
            StepFailedError: it ended with a status that is not allowed, or not in time.
        """
        words = [str(word) for word in command]
        shown = [Path(words[0]).name, *(word.removeprefix(f"{self.folder}/") for word in words[1:])]
        print(f"$ {shlex.join(shown)}", flush=True)
        began = time.monotonic()
        said, log = self.folder / "said", self.folder / "log"
        # Into files: what a command leaves running would hold a pipe open.
        with said.open("wb") as out, log.open("wb") as err:
            try:
                status = subprocess.run(
                    words,
                    env=self._environment,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    timeout=seconds,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                raise StepFailedError(f"{shlex.join(shown)} was not done in {seconds:g} s{_end(said, log)}") from None
            except OSError as error:
                raise StepFailedError(f"{words[0]} can't be run: {error.strerror}") from error
        print(f"  {time.monotonic() - began:.1f} s", flush=True)
        if status not in allowed:
            raise StepFailedError(f"{shlex.join(shown)} ended with {status}{_end(said, log)}")
        return said.read_text(errors="replace")

    def flare(self, *words: str | Path, seconds: float = COMMAND_SECONDS, allowed: Sequence[int] = (0,)) -> Any:
        """Run a command of FLARE's and return the data of its envelope."""
        said = self.run("nvflare", *words, "--format", "json", seconds=seconds, allowed=allowed)
        return data_of(said, shlex.join(["nvflare", *map(str, words)]))

    def until(self, what: str, holds: Callable[[], Any], seconds: float) -> Any:
        """Wait until `holds` returns something that is true, and return it.

        Raises:
            StepFailedError: it did not in time.
        """
        end = time.monotonic() + seconds
        while not (found := holds()):
            if time.monotonic() > end:
                raise StepFailedError(f"{what}: not within {seconds:g} s")
            time.sleep(0.2)
        return found

    def processes(self) -> list[int]:
        """Those that this tour has started and that still run."""
        mark, pids = f"{MARK}={self._mark}".encode(), map(int, filter(str.isdigit, os.listdir("/proc")))
        return [pid for pid in pids if mark in _bytes(Path(f"/proc/{pid}/environ")).split(b"\0")]

    def end_processes(self) -> list[int]:
        """End what still runs, and return what that was."""
        found = self.processes()
        end = time.monotonic() + END_SECONDS
        while (left := self.processes()) and time.monotonic() < end:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        return found


def _bytes(file: Path) -> bytes:
    """Of a process; of one that has ended, or is another user's, there are none."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _end(*files: Path) -> str:
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    return "".join(f"\n    {line}" for line in lines[-25:])


def data_of(said: str, command: str) -> Any:
    """The data of the envelope that a command of FLARE's has printed, whether it says ok or error.

    Raises:
        StepFailedError: there is none.
    """
    try:
        return json.loads(said.strip().splitlines()[-1])["data"]
    except (IndexError, ValueError, KeyError, TypeError):
        raise StepFailedError(f"{command} said nothing that can be understood: {said[-500:]!r}") from None


def project(port: int) -> dict[str, Any]:
    """What FLARE's provisioning is to make; JSON is YAML."""
    builders = "workspace.WorkspaceBuilder", "static_file.StaticFileBuilder", "cert.CertBuilder"
    arguments: list[dict[str, Any]] = [{"template_file": ["master_template.yml"]}, {"config_folder": "config"}, {}]
    server = {"name": "server", "type": "server", "default_host": "localhost", "fed_learn_port": port}
    admin = {"name": "admin@nvidia.com", "type": "admin", "role": "project_admin"}
    sites = [{"name": f"site-{number + 1}", "type": "client"} for number in range(SITES)]
    return {
        "api_version": 3,
        "name": "tour",
        "description": "a server and its sites on one machine",
        "participants": [{**each, "org": "nvidia"} for each in (server, admin, *sites)],
        "builders": [
            {"path": f"nvflare.lighter.impl.{path}", "args": args}
            for path, args in zip(builders, arguments, strict=True)
        ],
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_job(tour: Tour, name: str, options: Sequence[str]) -> Path:
    """Export a job for the sites of the tour, and return its folder."""
    written = tour.folder / f"exported-{len(tour.steps)}"
    export = ["--export", "--export-dir", str(written), "--sites", str(SITES)]
    tour.run(sys.executable, HERE / name / "job.py", *options, *export)
    return written / name


def _run_job(tour: Tour, name: str, options: Sequence[str]) -> None:
    """Have a job run, bring its results, and show what it moved."""
    job = _write_job(tour, name, options)
    job_id = tour.flare("job", "submit", "-j", job)["job_id"]
    status = tour.flare("job", "wait", job_id, "--timeout", f"{JOB_SECONDS:g}", seconds=JOB_SECONDS + 60)["status"]
    if status != "FINISHED:COMPLETED":
        raise StepFailedError(f"{name} ended as {status}")
    tour.flare("job", "download", job_id, "-o", tour.folder / "poc")
    page = tour.folder / f"{name}.html"
    print(tour.run("nvflare-rdma", "report", "poc", "--job", job_id, "--text", "--output", page))
    print(f"{page.name} is there {time.monotonic() - tour.began:.0f} s after the tour began")


def _abort_job(tour: Tour, kits: Path) -> None:
    """Abort a job in the middle of its rounds."""
    job_id = tour.flare("job", "submit", "-j", _write_job(tour, "stdlib_lm", ENDLESS))["job_id"]
    records = [kits / f"site-{number + 1}" / job_id / "nvflare_rdma" / "transfers.jsonl" for number in range(SITES)]
    tour.until("models have come to all sites", lambda: all(file.exists() for file in records), JOB_SECONDS)
    tour.flare("job", "abort", job_id, "--force")
    ended = tour.flare("job", "wait", job_id, "--timeout", f"{END_SECONDS:g}", allowed=[0, 1])["status"]
    if ended != "FINISHED:ABORTED":
        raise StepFailedError(f"the job was aborted, and ended as {ended}")
    tour.until("the processes of the aborted job have ended", lambda: not _processes_of(tour, job_id), END_SECONDS)
    print(f"  {ended}, and its processes have ended")


def _processes_of(tour: Tour, job_id: str) -> list[int]:
    return [pid for pid in tour.processes() if job_id.encode() in _bytes(Path(f"/proc/{pid}/cmdline"))]


def _change(tour: Tour, *options: str) -> None:
    said = tour.run("nvflare-rdma", *options)
    print(said.rpartition("\n\n")[2])  # what follows the differences in each file


def _set_up(tour: Tour) -> None:
    _change(tour, "enable", "poc", "--memory-budget", "512MiB", "--patience", "1h")
    print(tour.run("nvflare-rdma", "status", "poc"))


def _start(tour: Tour) -> None:
    # FLARE's own 30 s are too few for four processes that start at once on two busy cores.
    tour.flare("poc", "start", "--timeout", f"{START_SECONDS:g}", seconds=START_SECONDS + 60)


def _stop(tour: Tour) -> None:
    tour.flare("poc", "stop", seconds=START_SECONDS)
    tour.until("all processes have ended", lambda: not tour.processes(), END_SECONDS)


def run(tour: Tour) -> None:
    """All steps.

    Raises:
        StepFailedError: one failed.
    """
    poc, file = tour.folder / "poc", tour.folder / "project.yml"
    kits = poc / "tour" / "prod_00"
    file.write_text(json.dumps(project(_free_port()), indent=2))
    tour.step("make start-up kits", lambda: tour.flare("poc", "prepare", "-i", file))
    tour.step("put this package's settings into them", lambda: _set_up(tour))
    tour.step("start a server and its sites", lambda: _start(tour))
    tour.step("train a language model", lambda: _run_job(tour, "stdlib_lm", STDLIB_LM))
    tour.step("tune another with adapters", lambda: _run_job(tour, "lora_gpt2", LORA_GPT2))
    tour.step("abort a job", lambda: _abort_job(tour, kits))
    tour.step("stop", lambda: _stop(tour))
    tour.step("take the settings out", lambda: _change(tour, "disable", "poc"))
    tour.step("clean up", lambda: tour.flare("poc", "clean"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, and tell how long each step took; 1 if one failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="kept; it must be empty or not there (default: a temporary one)")
    args = parser.parse_args(argv)
    if args.folder and args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        parser.error(f"--folder {args.folder} is there and not empty: name another one")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="tour-"))).resolve()
    tour, failed, status = Tour(folder), "", 0
    # As Ctrl-C: else what was started goes on.
    before = {ending: signal.signal(ending, signal.default_int_handler) for ending in (signal.SIGTERM, signal.SIGHUP)}
    try:
        run(tour)
    except StepFailedError as error:
        failed, status = str(error), 1
    except KeyboardInterrupt:
        failed, status = "interrupted", 130
    finally:
        left = tour.end_processes()
        for ending, handler in before.items():
            signal.signal(ending, handler)
    if tour.processes():
        failed, status = failed or "some of its processes could not be ended", status or 1
    print(f"\n{'step':40} {'seconds':>8}")
    for number, (name, seconds) in enumerate(tour.steps, 1):
        print(f"{name:40} {seconds:8.1f}{'  FAILED' if failed and number == len(tour.steps) else ''}")
    print(f"{'all':40} {time.monotonic() - tour.began:8.1f}")
    if failed:
        print(f"\nThe tour failed: {failed}\n{len(left)} processes were ended. Logs are in {folder}", file=sys.stderr)
    elif args.folder:
        print(f"Reports are in {folder}")
    else:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
