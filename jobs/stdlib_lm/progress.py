"""Progress of a running job: sites and server append JSON lines, the job's own process shows them.

The folder for the lines comes in an environment variable that the simulator's processes inherit. Without it (in a
real deployment) nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "STDLIB_LM_PROGRESS"


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
    """

    def __init__(self, folder: Path, label: str, total: int) -> None:
        self._folder, self._label, self._total = Path(folder), label, total
        self._read: dict[Path, int] = {}
        self._steps = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProgressView:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if sys.stdout.isatty():
            from rich.progress import Progress

            with Progress() as bar:
                task = bar.add_task(f"{self._label}: starting", total=self._total)
                for text in self._follow():
                    bar.update(task, description=f"{self._label}: {text}", completed=self._steps)
        else:
            for text in self._follow():
                if text.startswith("held-out"):
                    print(f"{self._label}: {text} ({self._steps} of {self._total} steps)", flush=True)

    def _follow(self) -> Iterator[str]:
        """What is new, as text, until the block has ended and all has been read."""
        last = False
        while not last:
            last = self._stop.wait(0.3)
            for line in self._new_lines():
                if "held_out_loss" in line:
                    yield f"held-out loss {line['held_out_loss']:.3f} {_when(line['round'])}"
                else:
                    self._steps += 1
                    yield f"round {line['round'] + 1}, training"

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._folder.glob("*.jsonl")):
            with open(path) as file:
                file.seek(self._read.get(path, 0))
                while (text := file.readline()).endswith("\n"):
                    self._read[path] = file.tell()
                    yield json.loads(text)


def _when(number: int | None) -> str:
    return "before training" if number is None else f"after round {number + 1}"
