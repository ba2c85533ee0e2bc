"""What a fuzz target is: a function that makes one case from a random generator, and runs it.

It may raise what it was declared with, `@target(ProtocolError)`; anything else is a finding. What it shows is written
down with a finding.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Show: TypeAlias = Callable[..., None]
Run: TypeAlias = Callable[[random.Random, Show], None]

PACKAGE = Path(__file__).resolve().parents[2] / "nvflare_rdma"
TARGETS: dict[str, Target] = {}


@dataclass(frozen=True)
class Finding:
    """A case that raised what it may not."""

    target: str
    seed: str
    number: int
    error: str
    where: str
    """Where in the package, so that one fault is told once."""
    trace: str
    shown: list[tuple[Any, ...]] = field(repr=False)

    @property
    def case(self) -> str:
        """What runs it again: `python -m tests.fuzz.run --case CASE`."""
        return f"{self.target}:{self.seed}:{self.number}"

    def __str__(self) -> str:
        shown = "\n".join(" ".join(map(repr, what))[:2000] for what in self.shown)
        return (
            f"{self.error}\n{self.where}\nagain: python -m tests.fuzz.run --case {self.case}\n\n{shown}\n\n{self.trace}"
        )


@dataclass(frozen=True)
class Target:
    """A target by name; `allowed` is what it may raise."""

    name: str
    run: Run
    allowed: tuple[type[Exception], ...]

    def attempt(self, seed: str, number: int) -> Finding | None:
        """Run a case. The same seed and number make the same one."""
        shown: list[tuple[Any, ...]] = []
        try:
            self.run(random.Random(f"{self.name}/{seed}/{number}"), lambda *what: shown.append(what))
        except self.allowed:
            return None
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            trace = "".join(traceback.format_exception(error))
            return Finding(self.name, seed, number, f"{type(error).__name__}: {error}", _place(error), trace, shown)
        return None


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    return f"{ours[-1].filename}:{ours[-1].lineno}"


def target(*allowed: type[Exception]) -> Callable[[Run], Run]:
    """A decorator that makes a function a target, which may raise `allowed`."""

    def register(run: Run) -> Run:
        TARGETS[run.__name__] = Target(run.__name__, run, allowed)
        return run

    return register
