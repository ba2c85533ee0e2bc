"""From `traffic.jsonl` lines to one row a round. Knows nothing of FLARE.

Seconds of a row are means over the sites, each from the site's own clock:

- `seconds_down`: pulling the task, less the server's encoding for that site (that is: request, serialization,
  transfer of all tensors, deserialization);
- `seconds_up`: sending the result, less the server's decoding and aggregating of it, which the site waits for;
- `seconds_codec`: encoding and decoding by filters on both ends, for both directions. Zero without filters.

When several sites move data at once they share the machine and the link, so a site's seconds include waiting for the
others'.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: In the run folder of every process of a job.
FILE_NAME = "traffic.jsonl"


@dataclass(frozen=True)
class RoundTraffic:
    """One round: bytes as counted at the server, seconds as means over the sites (see the module's text)."""

    round: int
    bytes_down: int  # server -> sites
    bytes_up: int  # sites -> server
    seconds_down: float
    seconds_up: float
    seconds_codec: float
    bytes_retransmitted: int = 0  # server -> sites, not in bytes_down


@dataclass(frozen=True)
class Traffic:
    """A whole job: its rounds, and the bytes of starting and ending it."""

    rounds: tuple[RoundTraffic, ...]
    outside_down: int
    outside_up: int


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All recorded lines under a job's workspace; a half-written last line is left out."""
    lines = []
    for path in sorted(Path(folder).rglob(FILE_NAME)):
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def summarize(lines: Iterable[dict[str, Any]]) -> Traffic:
    """Add up the lines of the server and all sites."""
    moved: dict[int | None, list[int]] = defaultdict(lambda: [0, 0, 0])
    seconds: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    for line in lines:
        if line["kind"] == "bytes":
            moved[line["round"]][0] += line["sent"]
            moved[line["round"]][1] += line["received"]
            moved[line["round"]][2] += line.get("retransmitted", 0)
        elif line["round"] is not None and line["site"]:
            prefix = "server_" if line["kind"] == "serve" else ""
            for name, value in line["seconds"].items():
                seconds[line["round"]][line["site"]][prefix + name] += value
    rounds = tuple(
        _row(number, moved[number], list(seconds[number].values()))
        for number in sorted(n for n in moved if n is not None)
    )
    return Traffic(rounds, moved[None][0], moved[None][1])


def _row(number: int, moved: list[int], sites: list[dict[str, float]]) -> RoundTraffic:
    def mean(*names: str, less: tuple[str, ...] = ()) -> float:
        total = sum(site.get(n, 0.0) for site in sites for n in names)
        total -= sum(site.get(n, 0.0) for site in sites for n in less)
        return round(max(total, 0.0) / max(len(sites), 1), 4)

    return RoundTraffic(
        round=number,
        bytes_down=moved[0],
        bytes_up=moved[1],
        bytes_retransmitted=moved[2],
        seconds_down=mean("pull", less=("server_encode",)),
        seconds_up=mean("send", less=("server_decode", "server_accept")),
        seconds_codec=mean("encode", "decode", "server_encode", "server_decode"),
    )
