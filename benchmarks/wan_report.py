"""What the results of `wan_run.py` say: goodput, packets over the ideal, recovery."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from wan_cells import DISTURB_AT, Setting
from wan_wire import RATE, TCP_PAYLOAD, VERBS_PAYLOAD

#: Less than that came while nothing but the control stream's attempts did.
_SOME_BYTES = 64 * 1024
#: Recovered: this share of the pace before, over so many seconds.
_SHARE, _SPAN = 0.9, 0.5
#: Below that share of idle time the emulated CPU may have been the limit.
IDLE_ENOUGH = 0.1


@dataclass
class Results:
    """The lines of a results file: the header of each sitting, links as `ping` found them, cells."""

    headers: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)

    @property
    def header(self) -> dict[str, Any]:
        if not self.headers:
            raise SystemExit("no results")
        return self.headers[0]


def load(path: Path) -> Results:
    """The results so far; none if there is no file."""
    results = Results()
    lists = {"header": results.headers, "link": results.links, "cell": results.cells}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the run was cut off within it
        if (kind := line.pop("kind")) in lists:
            lists[kind].append(line)
    return results


def setting_of(cell: dict[str, Any]) -> Setting:
    return Setting(**cell["setting"])


def goodput(message: dict[str, Any]) -> float:
    """bit/s, of what had landed."""
    return float(message["landed"] * 8 / message["seconds"])


def payload(cell: dict[str, Any]) -> int:
    """Of a full packet."""
    return VERBS_PAYLOAD if setting_of(cell).fabric == "verbs" else TCP_PAYLOAD


def ideal_packets(cell: dict[str, Any]) -> int:
    """That carry what has landed, each filled."""
    return math.ceil(sum(message["landed"] for message in cell["messages"]) / payload(cell))


def over_ideal(cell: dict[str, Any]) -> float:
    """Packets sent for each that would have been enough; infinite if nothing landed."""
    ideal = ideal_packets(cell)
    return cell["packets"] / ideal if ideal else math.inf


def complete(cell: dict[str, Any]) -> bool:
    return "error" not in cell and all(m["landed"] == cell["bytes"] for m in cell["messages"])


def first_complete(cell: dict[str, Any]) -> bool:
    return "error" not in cell and bool(cell["messages"][0]["landed"] == cell["bytes"])


def fell_back(cell: dict[str, Any]) -> str:
    """The fabric that it ended on, if that is another than the setting's."""
    fabric = cell["receiver"].get("fabric", "")
    return fabric if fabric and fabric != cell["setting"]["fabric"] else ""


def breaks(cell: dict[str, Any]) -> int:
    """How often the last rail broke, so that all had to be opened again."""
    return sum("no rail is left" in text for _, text in cell["receiver"]["notes"])


def one_line(cell: dict[str, Any]) -> str:
    """A row of the table that is shown while it runs."""
    if "error" in cell:
        return f"| {setting_of(cell)} | failed: {cell['error']} |"
    speeds = ", ".join(f"{goodput(m) / 1e6:.1f}" for m in cell["messages"])
    columns = [
        f"{speeds} Mbit/s",
        f"{over_ideal(cell):.3f} x {ideal_packets(cell)} packets, {cell['lost']} lost, {cell['overflowed']} overflowed",
        f"idle {cell['idle']:.0%}",
    ]
    if cell["setting"]["adaptive"]:
        columns.append(f"chose {cell['receiver']['chunk'] >> 10} KiB / {cell['receiver']['window'] >> 10} KiB")
    if not complete(cell):
        columns.append(f"not done: {cell['messages'][-1]['landed'] >> 10} KiB")
    if breaks(cell):
        columns.append(f"all rails broke {breaks(cell)} x")
    if fabric := fell_back(cell):
        columns.append(f"ended on {fabric}")
    return f"| {setting_of(cell)} | {' | '.join(columns)} |"


def recovery(cell: dict[str, Any]) -> dict[str, float]:
    """In bit/s of the wire before and during, and seconds after the end of the disturbance; infinite for never.

    What came to the receiver's interface is looked at, not what has landed: a huge write lands only at its end."""
    start = cell["messages"][0]["start"]
    began, ended = cell["disturbed"]
    samples = [(start, 0, 0), *cell["samples"]]
    first = samples[1][1] if len(samples) > 1 else 0
    samples[0] = (start, first, 0)

    def at(when: float) -> float:
        """Bytes that had come by then, between samples."""
        for (t0, b0, _), (t1, b1, _) in pairwise(samples):
            if t0 <= when <= t1:
                return float(b0 + (b1 - b0) * (when - t0) / max(t1 - t0, 1e-9))
        return float(samples[-1][1])

    settled = start + DISTURB_AT / 2  # after slow start
    before = (at(began) - at(settled)) / (began - settled)
    during = (at(ended) - at(began)) / (ended - began)
    last = samples[-1][0]
    flows = next((t - ended for t, b, _ in samples if t > ended and b > at(ended) + _SOME_BYTES), math.inf)
    full = math.inf
    for t, b, _ in samples:
        if t >= ended + flows and t + _SPAN <= last and (at(t + _SPAN) - b) / _SPAN >= _SHARE * before:
            full = t - ended
            break
    return {"before": before * 8, "during": during * 8, "flows": flows, "full": full}


def one_recovery(cell: dict[str, Any]) -> str:
    if "error" in cell or "disturbed" not in cell:
        return ""
    found = recovery(cell)
    seconds = cell["messages"][0]["seconds"]
    return (
        f"before {found['before'] / 1e6:.1f}, during {found['during'] / 1e6:.1f} Mbit/s; data after "
        f"{found['flows']:.2f} s, at full pace after {found['full']:.2f} s; {seconds:.1f} s in all, "
        f"ideal {cell['bytes'] / RATE:.1f}"
    )
