"""How a bench gets on, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nvflare_rdma.cli.bench_report import Steps


class _Bar(Steps):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._count = self._done = 0

    def begin(self, count: int) -> None:
        """See `Steps.begin`."""
        self._count += count
        self._progress.update(self._task, total=self._count)

    def step(self, what: str, count: int = 1) -> None:
        """See `Steps.step`."""
        self._done += count
        self._progress.update(self._task, description=what, completed=min(self._done, self._count) - 1)


@contextmanager
def steps_on(stream: TextIO) -> Iterator[Steps]:
    """A bar on `stream` if that is a terminal, which is gone afterwards; else nothing."""
    if not stream.isatty():
        yield Steps()
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield _Bar(progress, progress.add_task("connecting", total=None))
