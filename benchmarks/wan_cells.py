"""What `wan.py` measures: the settings, the links, and the disturbances of the recovery runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

KIB, MIB = 1 << 10, 1 << 20
MESSAGE = 16 * MIB
#: Of the recovery runs: 5.4 s of the link, and as large as one chunk can be.
LONG_MESSAGE = 64 * MIB
RTTS = (1, 40, 80)  # ms
LOSSES = (0.0, 0.1, 1.0)  # %
CHUNKS = (256 * KIB, 1 * MIB, 4 * MIB)
DEPTHS = (1, 4, 16)
RAILS = (1, 4, 8)
FABRICS = ("verbs", "tcp")
PLAIN = "plain"
#: Of the adaptive controller with ADAPTIVE_RAILS, one after the other: the first is its start, the last what it has
#: learned. With more and fewer rails only the first.
ADAPTIVE_MESSAGES, ADAPTIVE_RAILS = 4, 4
REPEATS = 5
REPEATED_LINK = 40, 1.0  # ms, %

RECOVERY_RTT = 40
#: Applied for OUTAGE seconds in the middle of a transfer.
DISTURBANCES = {
    "5 % loss": "2 s with 5 % loss of data packets",
    "path outage": "2 s in which the path loses everything, both ways",
    "link down": "2 s with the receiver's link down (ip link set va down)",
}
DISTURB_AT, OUTAGE = 1.5, 2.0


@dataclass(frozen=True)
class Setting:
    """``fabric``: one of `FABRICS`, or `PLAIN` for a TCP socket without any of this package. ``adaptive`` starts from
    ``chunk`` and ``depth``."""

    fabric: str
    rails: int = 1
    chunk: int = 0
    depth: int = 0
    adaptive: bool = False

    @property
    def what(self) -> str:
        """Without fabric and rails."""
        if self.fabric == PLAIN:
            return "one socket"
        if self.adaptive:
            return "adaptive"
        return "one huge write" if self.depth == 1 and self.chunk > CHUNKS[-1] else f"{size(self.chunk)} x {self.depth}"

    def __str__(self) -> str:
        return f"{self.fabric}, {self.what}, {self.rails} rail{'s' if self.rails > 1 else ''}"


def size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def huge(fabric: str, message: int) -> Setting:
    return Setting(fabric, 1, message, 1)


def settings() -> Iterator[Setting]:
    """All that differ. A chunk goes over one rail, so there are never more rails in use than chunks in flight; and a
    message has no more chunks in flight than it has chunks (4 MiB x 16 is 4 MiB x 4)."""
    yield Setting(PLAIN)
    for fabric in FABRICS:
        yield huge(fabric, MESSAGE)
        for chunk in CHUNKS:
            for depth in DEPTHS:
                if chunk * depth <= MESSAGE:
                    yield from (Setting(fabric, rails, chunk, depth) for rails in RAILS if rails <= depth)
        yield from (Setting(fabric, rails, MIB, 4, adaptive=True) for rails in RAILS)


def reduced_settings() -> Iterator[Setting]:
    """A sample of `settings`, to try a change of the benchmark."""
    yield Setting(PLAIN)
    for fabric in FABRICS:
        yield huge(fabric, MESSAGE)
        yield Setting(fabric, 1, 256 * KIB, 1)
        yield Setting(fabric, 4, 256 * KIB, 16)
        yield Setting(fabric, 1, MIB, 4)
        yield Setting(fabric, 4, MIB, 4)
        yield Setting(fabric, 8, MIB, 16)
        yield Setting(fabric, 4, 4 * MIB, 4)
        yield Setting(fabric, 4, MIB, 4, adaptive=True)


def repeated() -> Iterator[Setting]:
    """Those that are measured `REPEATS` times on `REPEATED_LINK`."""
    yield Setting(PLAIN)
    for fabric in FABRICS:
        yield huge(fabric, MESSAGE)
        yield from (Setting(fabric, rails, MIB, 4) for rails in (1, 4))


def recovery_settings() -> Iterator[Setting]:
    yield Setting(PLAIN)
    for fabric in FABRICS:
        yield huge(fabric, LONG_MESSAGE)
        yield Setting(fabric, 4, MIB, 4)
        yield Setting(fabric, 4, MIB, 4, adaptive=True)


@dataclass(frozen=True)
class Step:
    """One cell: what is measured, on what link (ms, %), and with what disturbance, if with one."""

    setting: Setting
    rtt: float
    loss: float
    disturbance: str = ""
    repeat: int = 0

    @property
    def key(self) -> dict[str, Any]:
        """Says which cell a line of the results is of."""
        return asdict(self)

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Step:
        return cls(Setting(**cell["setting"]), cell["rtt"], cell["loss"], cell["disturbance"], cell["repeat"])


def plan(full: bool) -> list[Step]:
    """All cells in the order in which they are measured: what there is no time for is at the end."""
    chosen = list(settings() if full else reduced_settings())
    steps = [Step(s, RECOVERY_RTT, 0.0, how) for how in DISTURBANCES for s in recovery_settings()]
    steps += [Step(s, rtt, loss) for rtt in RTTS for loss in LOSSES for s in chosen]
    if full:
        steps += [Step(s, *REPEATED_LINK, repeat=n) for n in range(1, REPEATS) for s in repeated()]
    return steps
