"""Chaos: processes pull tensors and files from each other. Meanwhile they are killed, stopped and started anew, and the
connections between them are cut, stalled and black-holed, and have bits flipped.

    python -m tests.chaos.run [--seed 1] [--seconds 300] [--round 60] [--workers 4] [--keep FOLDER]

The same seed plans the same faults and transfers; what meets what is up to the machine. A run has rounds, each with new
workers, in the clear or with TLS, and with other fabrics and budgets. What has to hold, always:

    right       what a pull gives is, bit for bit, what its sender's seed makes
    errors      everything else ends with an RdmaError, a MemoryError or an OSError
    deadlines   no pull outlives `worker.DEADLINE`
    rest        when all is over, nothing is held: memory, slots, sinks, threads, descriptors, files

It ends with 1 if any of it did not, and says what did not, and where the workers' logs are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.chaos import worker
from tests.chaos.proxy import Proxy
from tests.chaos.worker import DEADLINE, REST_SECONDS, STALL_SECONDS, Config, name_of
from tests.support.calls import Server
from tests.support.certificates import Authority

#: Whether a round has TLS, and its fabrics: all of them in turn.
KINDS = ((False, ("tcp",)), (True, ("tcp",)), (False, ("shm", "tcp")), (True, ("shm", "tcp")))
#: What is done to a worker, or to all connections, and how often.
FAULTS = {"kill": 2, "stop": 4, "leave": 1, "outage": 3}
_STOPS = (0.3, 1.0, 3.0, 2 * STALL_SECONDS)
_PAUSE = (0.2, 2.5)
_START_SECONDS = 120.0
#: So many violations of a round are printed; all of them are in the workers' journals.
_SHOWN = 10

#: Workers are forked from a process that has loaded all that they need.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.chaos.loaded"])
Process = CONTEXT.Process


@dataclass
class Findings:
    """What happened, of one round or of all."""

    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        self.faults += other.faults
        self.outcomes += other.outcomes
        self.errors += other.errors
        self.violations += other.violations

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {what}" for what, count in sorted(self.faults.items()))
        pulls = f"{self.outcomes['right']} pulls right, {self.outcomes['error']} ended with an error"
        return f"{pulls}; {sum(self.faults.values())} faults ({faults}); {len(self.violations)} violations"


class Round:
    """Workers that live, with what is done to them, until `close`."""

    def __init__(self, seed: str, number: int, workers: int, folder: Path) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        self.folder = folder
        self.secure, self.fabrics = KINDS[number % len(KINDS)]
        self.budget = self.rng.choice((2, 8, 32)) << 20
        self.findings = Findings()
        self._seed = f"{seed}/{number}"
        self._lives: Counter[int] = Counter()
        self._stopped: dict[int, float] = {}
        self._proxy = Proxy(random.Random(f"{seed}/{number}/proxy"), self.secure)
        self._server = Server(folder / "proxy", self._proxy.way_to)
        if self.secure:
            _issue(folder, workers)
        self.workers: dict[int, Process] = {}
        self._told: dict[int, Connection] = {}
        for number in range(workers):
            self._start(number, workers)

    def __str__(self) -> str:
        return f"{'TLS' if self.secure else 'clear'}, {'+'.join(self.fabrics)}, budget {self.budget >> 20} MiB"

    def _start(self, number: int, workers: int) -> None:
        life = self._lives[number]
        self._lives[number] += 1
        config = Config(str(self.folder), self._seed, number, life, workers, self.fabrics, self.secure, self.budget)
        ours, theirs = CONTEXT.Pipe()
        self.workers[number] = CONTEXT.Process(target=worker.start, args=(config, theirs), daemon=True)
        self.workers[number].start()
        theirs.close()
        self._told[number] = ours
        self._hear(number, "ready", _START_SECONDS)

    def _tell(self, number: int, what: str) -> None:
        with contextlib.suppress(OSError):
            self._told[number].send(what)

    def _hear(self, number: int, what: str, seconds: float) -> None:
        """Wait until a worker says what is expected. If it does not in time, that is a violation, and its end."""
        try:
            if not self._told[number].poll(seconds):
                self._violation(number, f"has not said {what!r} in {seconds:g} s")
                self.workers[number].kill()
            elif (said := self._told[number].recv()) != what:
                self._violation(number, f"said {said!r} instead of {what!r}")
        except (OSError, EOFError):
            self.workers[number].join(_START_SECONDS)
            self._violation(number, f"ended with {self.workers[number].exitcode} instead of saying {what!r}")

    def _violation(self, number: int, what: str) -> None:
        self.findings.violations.append(f"{name_of(number)}, life {self._lives[number] - 1}: {what}")

    def trouble(self, seconds: float) -> None:
        """Do faults for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(self.rng.uniform(*_PAUSE), left))
            self._go_on(lambda until: time.monotonic() > until)
            self._look_who_ended()
            number = self.rng.randrange(len(self.workers))
            fault = self.rng.choices(list(FAULTS), list(FAULTS.values()))[0]
            if number not in self._stopped:
                self._do(fault, number)
        self._go_on(lambda until: True)

    def _do(self, fault: str, number: int) -> None:
        process = self.workers[number]
        self.findings.faults[fault] += 1
        match fault:
            case "kill":
                process.kill()
                self._again(number)
            case "leave":
                self._tell(number, "leave")
                process.join(DEADLINE)
                if process.is_alive():
                    self._violation(number, "does not end, though it was told to leave")
                    process.kill()
                self._again(number)
            case "stop":
                self._send_signal(number, signal.SIGSTOP)
                self._stopped[number] = time.monotonic() + self.rng.choice(_STOPS)
            case "outage":
                self._proxy.cut_all()

    def _go_on(self, may: Callable[[float], bool]) -> None:
        for number, until in list(self._stopped.items()):
            if may(until):
                self._send_signal(number, signal.SIGCONT)
                del self._stopped[number]

    def _send_signal(self, number: int, what: signal.Signals) -> None:
        pid = self.workers[number].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, which is seen
            os.kill(pid, what)

    def _look_who_ended(self) -> None:
        for number, process in list(self.workers.items()):
            if not process.is_alive():
                self._violation(number, f"ended by itself, with {process.exitcode}")
                self._again(number)

    def _again(self, number: int) -> None:
        self._end(number)
        self._start(number, len(self.workers))

    def _end(self, number: int) -> None:
        self.workers[number].kill()
        self.workers[number].join()
        self._told[number].close()

    def end(self) -> None:
        """Let all workers come to an end, and collect what they have found."""
        for what, said, seconds in (
            ("end", "pulled", DEADLINE + _START_SECONDS),
            ("rest", "looked", 15 * REST_SECONDS),
            ("bye", "", 0.0),
        ):
            alive = [number for number, process in self.workers.items() if process.is_alive()]
            for number in alive:
                self._tell(number, what)
            for number in alive:
                if said:
                    self._hear(number, said, seconds)
        for number in self.workers:
            self._collect(number)
        self.findings.faults += self._proxy.happened

    def _collect(self, number: int) -> None:
        journal = self.folder / f"journal-{number}"
        for line in journal.read_text().splitlines() if journal.exists() else ():
            entry = json.loads(line)
            self.findings.outcomes[entry["outcome"]] += 1
            if entry["outcome"] == "violation":
                self.findings.violations.append(f"{name_of(number)}, life {entry['life']}: {entry['detail']}")
            elif entry["outcome"] == "error":
                self.findings.errors["".join(c for c in entry["detail"] if not c.isdigit())[:100]] += 1

    def close(self) -> None:
        """End all processes and connections of the round."""
        for number in self.workers:
            self._end(number)
        self._proxy.close()
        self._server.close()


def _issue(folder: Path, workers: int) -> None:
    """Certificates for all workers, each with those of both roles: whoever has a door dials as well."""
    authority = Authority(folder / "pki")
    for name in map(name_of, range(workers)):
        files = {**authority.issue("server", name), **authority.issue("client", name)}
        (folder / f"{name}.json").write_text(json.dumps(files))


def run(seed: str, seconds: float, each: float, workers: int, folder: Path) -> Findings:
    """Run rounds for so long altogether, and say what each has found."""
    found, number, left = Findings(), 0, seconds
    while left > 0:
        place = folder / f"round-{number}"
        place.mkdir()
        playing = Round(seed, number, workers, place)
        try:
            playing.trouble(min(each, left))
            playing.end()
        finally:
            playing.close()
        print(f"round {number} ({playing}): {playing.findings}", flush=True)
        for violation in playing.findings.violations[:_SHOWN]:
            print(f"  VIOLATION {violation}", flush=True)
        found.add(playing.findings)
        number, left = number + 1, left - each
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seed", default=str(random.randrange(10**6)), help="any text; the default is another each time"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="of all rounds together")
    parser.add_argument("--round", type=float, default=60.0, help="seconds of one round")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--keep", type=Path, help="a new folder for what workers write; else it is removed if all is well"
    )
    arguments = parser.parse_args()
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"))
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = run(arguments.seed, arguments.seconds, arguments.round, arguments.workers, folder)
    for reason, count in found.errors.most_common(25):
        print(f"  {count:5} {reason}")
    again = f"--seed {arguments.seed} --seconds {arguments.seconds:g} --round {arguments.round:g}"
    print(f"chaos {again}: {found}")
    if not found.outcomes["right"]:
        print("nothing arrived, so nothing is shown")
    well = bool(found.outcomes["right"]) and not found.violations
    if well and arguments.keep is None:
        shutil.rmtree(folder)
    else:
        print(f"what the workers wrote is in {folder}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
