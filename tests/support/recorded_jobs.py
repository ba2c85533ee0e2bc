"""Records of jobs that were not run, written as the processes of a job write them: by their ledger and reporter."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from nvflare_rdma.transfer.records import Ledger
from tests.support.reported_run import ReportedRun
from tests.support.transfer_records import record

RAW, WIRE = 200_000_000, 28_200_000
JOB = "0f8fad5b-d9cb-469f-a165-70867728950e"


class RecordedJob:
    """A job's processes. Sites' clocks are wrong, each by an hour more."""

    def __init__(self, folders: dict[str, Path], job: str = "simulate_job", began: float = 1.8e9):
        self.job, self.now = job, began
        self.ledger = Ledger()
        self.clocks = {name: 3600.0 * n for n, name in enumerate(folders)}
        self.stack = ExitStack()
        self.runs = {}
        for name, folder in folders.items():
            kind = "SJ" if name == "server" else "CJ"
            run = ReportedRun(str(folder), kind, f"{name}.{job}", self.ledger, job)
            self.runs[name] = run
            self.stack.enter_context(closing(run.reporter))

    def __enter__(self) -> RecordedJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def write(self, by: str, direction: str, other: str, **fields: Any) -> None:
        """A record of one side, that ends now."""
        made = {"seconds": 2.0, "raw_bytes": RAW, "wire_bytes": WIRE, "fabric": "tcp", "resent_chunks": 0, **fields}
        where = {"cell": f"{by}.{self.job}", "peer": f"{other}.{self.job}", "direction": direction}
        self.ledger.record(record(time=self.now + self.clocks.get(by, 0.0), **where, **made))

    def transfer(self, sender: str, receiver: str, **fields: Any) -> None:
        """The records of both sides."""
        self.now += 2.0
        self.write(sender, "sent", receiver, **fields)
        self.write(receiver, "received", sender, **fields)

    def round(self, number: int, slow: str = "") -> None:
        """The model goes to all sites, and comes back from each; to and from `slow` it takes three times as long."""
        self.runs["server"].round(number)
        for name, run in self.runs.items():
            if name != "server":
                seconds = 6.0 if name == slow else 2.0
                run.pull()
                self.transfer("server", name, seconds=seconds)
                run.task(number)
                self.now += 10.0
                self.transfer(name, "server", seconds=seconds)


def simulated(workspace: Path, rounds: int = 3) -> Path:
    """What a job in FLARE's simulator leaves behind."""
    names = ("server", "site-1", "site-2")
    with RecordedJob({name: workspace / name for name in names}) as job:
        for number in range(rounds):
            job.round(number, slow="site-2")
    return workspace


def provisioned(kits: Path, job_id: str = JOB, began: float = 1.8e9, rounds: int = 3) -> Path:
    """What a job leaves behind in start-up kits, with the server's part in the admin's, as it was downloaded. Returns
    the folder of the latter."""
    downloaded = kits / "admin@nvidia.com" / "transfer" / job_id / "workspace"
    names = ("server", "site-1", "site-2")
    with RecordedJob({name: kits / name for name in names}, job_id, began) as job:
        for number in range(rounds):
            job.round(number)
    downloaded.parent.mkdir(parents=True)
    (kits / "server" / job_id).rename(downloaded)
    return downloaded.parent
