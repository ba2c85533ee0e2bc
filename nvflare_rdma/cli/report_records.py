"""Finds the records of transfers (docs/records.md) below a folder, and reads them, as far as they are whole.

A run folder is one process's of one job: `site-1/JOB` of a kit, `server/simulate_job` of the simulator, `JOB/workspace`
of a job that `nvflare job download` has brought.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from nvflare_rdma.cli.output import ENVIRONMENT, CommandError
from nvflare_rdma.logs import escaped
from nvflare_rdma.metrics import TRANSFERS_FILE
from nvflare_rdma.transfer import TransferRecord

#: What FLARE calls every job of its simulator, and the server's run folder in a downloaded job.
SIMULATED, DOWNLOADED = "simulate_job", "workspace"
SERVER = "server"
#: How many folders deep records are looked for: `sites/prod_00/admin@nvidia.com/transfer/JOB/workspace` is 6.
_DEPTH = 10
#: Folders of code, where nobody runs a job.
_NO_RUNS = {"site-packages", "node_modules", "__pycache__"}
#: A line is a few hundred bytes; a reason may be longer.
_LONGEST_LINE = 1 << 20
_LARGEST = 1 << 63
_WHAT = "name a workspace, or a job's folder"
_HOW_TO_GET_THEM = (
    "processes of jobs with add_transfer(recipe) write them; the server's of a finished job come with "
    "`nvflare job download JOB_ID`, into the folder that you name here"
)


@dataclass(frozen=True)
class Entry:
    """One line of records, and who sent to whom."""

    round: int | None
    record: TransferRecord
    sender: str
    receiver: str

    @property
    def writer(self) -> str:
        """The site that has written it."""
        return self.sender if self.record.direction == "sent" else self.receiver

    @property
    def other(self) -> str:
        """The site at the other end."""
        return self.receiver if self.record.direction == "sent" else self.sender


@dataclass
class Run:
    """One site's records of a job, from all its run folders."""

    site: str
    folders: list[Path] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    damaged: int = 0
    """Lines that are no records."""


@dataclass
class Job:
    """A job's records."""

    job_id: str
    where: Path
    """The folder that its run folders have in common, as far as that can be told."""
    runs: dict[str, Run] = field(default_factory=dict)
    changed: float = 0.0
    """When the last of its records was written, in seconds since 1970."""
    label: str = ""
    """Its ID; with its folder, where several jobs have the same ID."""
    unreadable: list[str] = field(default_factory=list)
    """What can't be read where it was looked for, and why: there may be more of it."""


def find_jobs(path: Path) -> list[Job]:
    """All jobs with records below `path`, the newest first.

    Raises:
        CommandError: there is no such folder, it can't be read, or no records are in it.
    """
    if not os.path.exists(path):
        raise CommandError("NOT_FOUND", f"{path} does not exist", _WHAT)
    files, unreadable = _find(path)
    if not files and os.path.isfile(path):
        raise CommandError("NO_RECORDS", f"{path} is a file and no folder", _WHAT)
    jobs: dict[tuple[str, str], Job] = {}
    for file in files:
        try:
            _add(jobs, Path(os.path.abspath(file)))
        except OSError as error:
            unreadable.append(escaped(f"{file}: {error.strerror}"))
    if not jobs and unreadable:
        more = f" (and {len(unreadable) - 1} more)" if unreadable[1:] else ""
        raise CommandError("NOT_READABLE", f"can't read {unreadable[0]}{more}", "read it as its owner", ENVIRONMENT)
    if not jobs:
        looked = f"no {'/'.join(TRANSFERS_FILE)} in {path} or in folders below it"
        raise CommandError("NO_RECORDS", looked, _HOW_TO_GET_THEM)
    for job in jobs.values():
        alike = [other for other in jobs.values() if other.job_id == job.job_id]
        where = "" if len(alike) == 1 else f"{os.path.relpath(job.where, path)}/"
        job.label, job.unreadable = escaped(f"{where}{job.job_id}"), unreadable
    return sorted(jobs.values(), key=lambda job: -job.changed)


def choose(jobs: list[Job], wanted: str | None) -> Job:
    """The job whose ID, or the beginning of it, is `wanted`; the newest, if it is None.

    Raises:
        CommandError: none of the jobs is, or several are.
    """
    if wanted is None:
        return jobs[0]
    found = [job for job in jobs if wanted in (job.label, job.job_id)]
    found = found or [job for job in jobs if job.label.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(job.label for job in found or jobs)
    what = f"job {wanted!r} is {'one of several' if found else 'not there'}: {names}"
    raise CommandError("JOB_NOT_FOUND", what, "give --job the ID of one of them, or leave it out for the newest")


def _find(path: Path) -> tuple[list[Path], list[str]]:
    """Files of records at a path or below it, and what of it can't be read."""
    if path.name == TRANSFERS_FILE[1] and path.is_file():
        return [path], []
    errors: list[OSError] = []
    files = [path / TRANSFERS_FILE[1]] if path.name == TRANSFERS_FILE[0] else []
    for folder, names, _ in os.walk(path, onerror=errors.append):
        here = Path(folder)
        deep = len(here.relative_to(path).parts)
        names[:] = sorted(n for n in names if n not in _NO_RUNS and not n.startswith(".") and deep < _DEPTH)
        files.append(here.joinpath(*TRANSFERS_FILE))
    return [file for file in files if os.path.isfile(file)], [escaped(f"{e.filename}: {e.strerror}") for e in errors]


def _add(jobs: dict[tuple[str, str], Job], file: Path) -> None:
    """Add the records in a file to the job that they are of."""
    folder = file.parent.parent
    downloaded = folder.name == DOWNLOADED
    named = folder.parent.name if downloaded else folder.name
    lines, damaged, changed = _read(file)
    parts = next((record.cell.split(".") for _, record in lines if "." in record.cell), None)
    job_id = named if parts is None or named in parts else parts[-1]
    site = SERVER if downloaded else folder.parent.name
    if parts is not None:
        site = _site(".".join(parts), job_id)
    where = folder.parent if downloaded else folder.parent.parent
    job = jobs.setdefault((job_id, str(where) if job_id == SIMULATED else ""), Job(job_id, where))
    run = job.runs.setdefault(site, Run(site))
    known = set(run.entries)  # a job may have been downloaded twice
    run.entries += [entry for entry in (_entry(*line, job_id) for line in lines) if entry not in known]
    run.damaged += damaged
    run.folders.append(folder)
    job.changed = max(job.changed, changed, *(record.time for _, record in lines))


def _entry(at: int | None, record: TransferRecord, job_id: str) -> Entry:
    own, other = _site(record.cell, job_id), _site(record.peer, job_id)
    return Entry(at, record, *((own, other) if record.direction == "sent" else (other, own)))


def _site(cell: str, job_id: str) -> str:
    """The site of a cell, by its name: what stands before the job's ID, or before the end where that is not in it."""
    parts = cell.split(".")
    return parts[max(parts.index(job_id) - 1, 0)] if job_id in parts else parts[-1]


def _read(file: Path) -> tuple[list[tuple[int | None, TransferRecord]], int, float]:
    """The records in a file with their rounds, how many lines are none, and when it has grown last if it has none."""
    found: list[tuple[int | None, TransferRecord]] = []
    damaged = 0
    with open(file, "rb") as lines:
        for line in iter(lambda: lines.readline(_LONGEST_LINE), b""):
            if not line.strip():
                continue
            try:
                found.append(_record(json.loads(line)))
            except (ValueError, RecursionError):
                damaged += 1
    return found, damaged, 0.0 if found else file.stat().st_mtime


def _record(line: Any) -> tuple[int | None, TransferRecord]:
    """A line as a record with its round.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(line, dict):
        raise ValueError("no object")
    # What older versions did not write has a default.
    known = [each for each in fields(TransferRecord) if each.name in line or each.default is MISSING]
    values = {each.name: _value(each.name, each.type, line) for each in known}
    if values["direction"] not in ("sent", "received"):
        raise ValueError("no direction")
    at = line.get("round")
    return (None if at is None else int(_value("round", "int", line))), TransferRecord(**values)


def _value(name: str, kind: Any, line: Mapping[str, Any]) -> Any:
    """What a line has in a field; text, or a number that is neither negative nor endless. Raises ValueError."""
    value = line.get(name)
    if kind == "float | None":
        return None if value is None else _value(name, "float", line)
    if kind in ("int", "float"):
        numbers = int if kind == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, numbers) or not 0 <= value < _LARGEST:
            raise ValueError(f"{name} is no number")
        return value if kind == "int" else float(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


@dataclass(frozen=True)
class Named:
    """What FLARE's files in run folders say of a job; "" and nothing where they are not there."""

    name: str = ""
    status: str = ""
    """Of a finished job."""
    loss_name: str = ""
    losses: Mapping[int, float] = field(default_factory=dict)
    """A loss that FLARE has averaged over the sites, by round."""


def named(job: Job) -> Named:
    """What FLARE says of a job: `meta.json`, and the server's `metrics/round_metrics.jsonl`."""
    folders = [folder for run in job.runs.values() for folder in run.folders]
    metas = [_json(place / "meta.json") for folder in folders for place in (folder, folder.parent)]
    metas = [meta for meta in metas if isinstance(meta, dict)]
    name = next((meta["name"] for meta in metas if isinstance(meta.get("name"), str)), "")
    statuses = [meta["status"] for meta in metas if isinstance(meta.get("status"), str)]
    status = next((status for status in statuses if status.startswith("FINISHED")), "")
    for folder in job.runs[SERVER].folders if SERVER in job.runs else []:
        rounds = dict(_metrics(folder / "metrics" / "round_metrics.jsonl"))
        names = [name for metrics in rounds.values() for name in metrics if "loss" in name.lower()]
        if names:
            losses = {at: metrics[names[0]] for at, metrics in sorted(rounds.items()) if names[0] in metrics}
            return Named(name, status, names[0], losses)
    return Named(name, status)


def _metrics(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Each round's metrics, as FLARE's `MetricsArtifactWriter` has averaged them."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            found = json.loads(line)
            metrics = {str(m["name"]): float(m["value"]) for m in found["aggregated_metrics"]}
            yield int(found["round"]), {name: value for name, value in metrics.items() if abs(value) < _LARGEST}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue  # it is told elsewhere what of the records is missing; this is not one of them


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
