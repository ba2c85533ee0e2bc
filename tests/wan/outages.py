"""What becomes of a job whose site can't be reached for a while: `make test-outages`, or outages.py FOLDER [CASE...],
apart. It takes a quarter of an hour and more for each case.

Each case is a federation of its own, whose site-1 gets or sends half of a model when the outage comes. The job has to
end well, with the results of both sites, and what went over site-1's wire is counted. Where the site's part of the job
is gone, the job has to end soon. What happened is printed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tests.support.processes import WITHOUT_TORCH, environment
from tests.support.waiting import eventually
from tests.wan import sites_job
from tests.wan.federation import SERVER, Federation, Job
from tests.wan.wire import Link, Star, is_apart

SITE, *_ = SITES = [f"site-{number + 1}" for number in range(sites_job.SITES)]
TO_SITE, TO_SERVER = 0, 1
#: 12 MiB, which take 10 s.
VALUES, LINK = (3 << 20) + 1, Link(rate=10, delay=20)
PAYLOAD = VALUES * 4 * sites_job.ROUNDS
PATIENCE = "1h"
#: So that FLARE's own connections are found dead within a minute, as docs/outages.md has it.
COMM_CONFIG = {
    "grpc": {
        "options": [
            ["grpc.max_send_message_length", 2145386496],
            ["grpc.max_receive_message_length", 2145386496],
            ["grpc.keepalive_time_ms", 30000],
            ["grpc.keepalive_timeout_ms", 20000],
            ["grpc.http2.max_pings_without_data", 0],
            ["grpc.http2.min_ping_interval_without_data_ms", 10000],
        ]
    }
}
#: Lines of the log that say what happened.
_TELLING = (
    "waited for",
    "answers again",
    "directly:",
    "broke off",
    "own path",
    "transfers wait",
    "connection lost",
    "ended",
    "dead",
)


@dataclass(frozen=True)
class Case:
    """An outage, which comes when half of a model went `way`, and lasts for so many seconds."""

    outage: Callable[[Star, Federation, float], None]
    way: int
    seconds: float
    #: How many sites the job needs to go on.
    needed: int = len(SITES)


@dataclass
class Report:
    """What became of a job. `carried` are the bytes of site-1's wire, to it and from it."""

    case: str
    status: str = "not run"
    seconds: float = 0.0
    began: float = 0.0
    over: float = 0.0
    carried: list[int] = field(default_factory=list)
    payload: int = PAYLOAD
    problems: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


def cut(star: Star, federation: Federation, seconds: float) -> None:
    """Everything on the wire is lost, and nobody is told."""
    star.wires[SITE].set(loss=100)
    time.sleep(seconds)
    star.wires[SITE].set(loss=0)


def move(star: Star, federation: Federation, seconds: float) -> None:
    """The site comes back with another address."""
    star.wires[SITE].set(loss=100)
    time.sleep(seconds)
    star.move(SITE)
    star.wires[SITE].set(loss=0)


def sleep(star: Star, federation: Federation, seconds: float) -> None:
    """All processes of the site stop, as those of a laptop that is closed."""
    stopped = star.processes(SITE)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


def restart(star: Star, federation: Federation, seconds: float) -> None:
    """The site's host fails, and starts again: its part of the job is gone."""
    for pid in star.processes(SITE):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(seconds)
    federation.start(SITE)


CASES = {
    "cut-down": Case(cut, TO_SITE, 900),
    "cut-up": Case(cut, TO_SERVER, 900),
    "sleep-down": Case(sleep, TO_SITE, 300),
    "sleep-up": Case(sleep, TO_SERVER, 300),
    "move-down": Case(move, TO_SITE, 60),
    "move-up": Case(move, TO_SERVER, 60),
    "restart-up": Case(restart, TO_SERVER, 10),
    "restart-up-enough": Case(restart, TO_SERVER, 10, needed=len(SITES) - 1),
}


def run(folder: Path, name: str) -> Report:
    """Run a job with an outage."""
    case, report = CASES[name], Report(name)
    star = Star(folder / "star", SERVER)
    for site in SITES:
        star.join(site, LINK)
    federation = Federation(
        star, folder / "federation", SITES, "grpc", configured=dict.fromkeys((SERVER, *SITES), COMM_CONFIG)
    )
    made = [sys.executable, sites_job.__file__, str(folder), "--values", str(VALUES), "--patience", PATIENCE]
    subprocess.run(made, env=environment(**WITHOUT_TORCH), check=True, timeout=200)
    meta = folder / sites_job.NAME / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "min_clients": case.needed}))
    federation.wait_for_sites()

    jobs: list[Job] = []
    wire, started = star.wires[SITE], time.monotonic()
    before = wire.count()
    limit = case.seconds + 900.0
    thread = threading.Thread(target=lambda: jobs.append(federation.run(folder / sites_job.NAME, limit)))
    thread.start()

    def is_half_there() -> bool:
        return (wire.count()[case.way] - before[case.way]).carried[1] > VALUES * 2 or not thread.is_alive()

    eventually(is_half_there, 200.0)
    report.began = time.monotonic() - started
    case.outage(star, federation, case.seconds)
    report.over = time.monotonic() - started
    thread.join()
    report.seconds = time.monotonic() - started
    report.carried = [(now - then).carried[1] for now, then in zip(wire.count(), before, strict=True)]
    for site in (SITE, SERVER):
        lines = federation.console(site).splitlines()
        report.log += [f"{site}: {line}" for line in lines if any(text in line for text in _TELLING)]
    if jobs:
        report.status = jobs[0].status
        if case.outage is not restart:
            check(report, jobs[0], case.way)
        else:
            check_without_site(report, jobs[0], case.needed)
    return report


def check_without_site(report: Report, job: Job, needed: int) -> None:
    """Note what is wrong with a job that has ended, and that one of its sites was in no more. FLARE calls it abnormal,
    as it can't know that site's outcome."""
    if report.seconds - report.over > 300:
        report.problems.append("somebody has waited for a process that has ended")
    if needed == len(SITES):
        if job.status != "FINISHED:EXECUTION_EXCEPTION":
            report.problems.append(f"{job.status}, though all {needed} sites are needed")
    elif job.status != "FINISHED:ABNORMAL":
        report.problems.append(f"{job.status}, though {needed} sites are enough")
    else:
        check_model(report, job, [site for site in SITES if site != SITE])


def check_model(report: Report, job: Job, sites: list[str]) -> None:
    """Note if the model is not what these sites' results make."""
    (saved,) = job.results.rglob("*.npy")
    mean = sum(int(site.rpartition("-")[2]) for site in sites) / len(sites)
    expected = sites_job.first_model(VALUES) + np.float32(sites_job.ROUNDS * mean)
    if not np.array_equal(np.load(saved), expected):
        report.problems.append(f"the model is not what the results of {', '.join(sites)} make")


def check(report: Report, job: Job, way: int) -> None:
    """Note what is wrong with a job that has ended."""
    if job.status != "FINISHED:COMPLETED":
        report.problems.append(job.status)
        return
    check_model(report, job, SITES)
    # With what FLARE says meanwhile, and TLS. Half of a model that is sent again is a quarter of all.
    if report.carried[way] > 1.2 * PAYLOAD:
        report.problems.append(f"{report.carried[way]} bytes went that way, for {PAYLOAD} of models")


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    if is_apart():
        report = run(folder / names[0], names[0])
        print(json.dumps(asdict(report), indent=1), flush=True)
        # FLARE's processes end with the namespaces that they are in.
        os._exit(bool(report.problems) or report.status == "not run")
    script = [sys.executable, str(Path(__file__).with_name("wire.py")), sys.executable, "-m", "tests.wan.outages"]
    cases = [subprocess.Popen([*script, str(folder), name]) for name in names or CASES]
    sys.exit(max(case.wait() for case in cases))


if __name__ == "__main__":
    main()
