"""Progress of a running job: sites and server append JSON lines, the job's own process shows them.

The folder for the lines comes in an environment variable that the simulator's processes inherit. Without it (in a
real deployment) nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "STDLIB_LM_PROGRESS"
#: Outside a terminal there is a line at least this often, also when nothing has happened.
SECONDS_A_LINE = 5.0
_SECONDS_A_LOOK = 0.3


def append_progress(**line: Any) -> None:
    """Append one line to this process's own file in the progress folder, if there is one."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        with open(Path(folder) / f"{os.getpid()}.jsonl", "a") as out:
            out.write(json.dumps(line) + "\n")


class ProgressView:
    """Shows a job's progress while the block under ``with`` runs: a bar in a terminal, plain lines elsewhere.

    Args:
        folder: where the lines are appended; must exist.
        label: of the bar.
        total: steps of all sites and rounds.
        clock: tells the seconds.
        wait: is given seconds to wait before the next look, and says whether the block has ended.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._folder, self._label, self._total = Path(folder), label, total
        self._read: dict[Path, int] = {}
        self._steps = 0
        self._stop = threading.Event()
        self._clock = clock
        self._wait = wait or self._stop.wait
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProgressView:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if sys.stdout.isatty():
            self._show_bar()
        else:
            self._print_lines()

    def _show_bar(self) -> None:
        from rich.progress import Progress, TimeElapsedColumn

        with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
            task = bar.add_task(f"{self._label}: starting", total=self._total)
            for text in self._follow():
                if text is not None:
                    bar.update(task, description=f"{self._label}: {text}", completed=self._steps)

    def _print_lines(self) -> None:
        doing = "starting"
        began = said = self._clock()
        for text in self._follow():
            now = self._clock()
            if text is not None and text.startswith("held-out"):
                doing = "moving models"
                print(f"{self._label}: {text} ({self._steps} of {self._total} steps)", flush=True)
                said = now
            elif text is not None:
                doing = text
            elif now - said >= SECONDS_A_LINE:
                done = f"{self._steps} of {self._total} steps, {now - began:.0f} s"
                print(f"{self._label}: {doing} ({done})", flush=True)
                said = now

    def _follow(self) -> Iterator[str | None]:
        """What is new, as text, and None after each look for it, until the block has ended and all has been read."""
        last = False
        while not last:
            last = self._wait(_SECONDS_A_LOOK)
            for line in self._new_lines():
                if "held_out_loss" in line:
                    yield f"held-out loss {line['held_out_loss']:.3f} {_when(line['round'])}"
                else:
                    self._steps += 1
                    yield f"round {line['round'] + 1}, training"
            yield None

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._folder.glob("*.jsonl")):
            with open(path) as file:
                file.seek(self._read.get(path, 0))
                while (text := file.readline()).endswith("\n"):
                    self._read[path] = file.tell()
                    yield json.loads(text)


def _when(number: int | None) -> str:
    return "before training" if number is None else f"after round {number + 1}"
