"""The measurement of `wan.py`, in the test guest: every setting on every link, and how they recover."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wan_cells
import wan_peers
import wan_report
import wan_wire
from measuring import Peer, machine, versions
from wan_cells import LONG_MESSAGE, MESSAGE, Step

from nvflare_rdma.errors import RdmaError

#: Seconds for the messages of a cell: what has landed by then counts. A huge write lands only at its end.
DEADLINES = {"chunks": 10.0, "huge": 20.0, "adaptive": 16.0, "recovery": 40.0}

#: Of them, what has to be left for one more message to begin.
ENOUGH = 2.0


def _length(step: Step) -> tuple[int, float]:
    """Messages, and the time for them."""
    if step.disturbance:
        return 1, DEADLINES["recovery"]
    if step.setting.adaptive and step.setting.rails == wan_cells.ADAPTIVE_RAILS:
        return wan_cells.ADAPTIVE_MESSAGES, DEADLINES["adaptive"]
    return 1, DEADLINES["huge" if step.setting.chunk == MESSAGE else "chunks"]


class Run:
    """All of it, in the guest. Every result is a line of its own, written at once."""

    def __init__(self, out: Path, minutes: float) -> None:
        self._results = wan_report.load(out)
        self._out = open(out, "a", buffering=1)  # noqa: SIM115 - closed by `close`
        self._out.write("\n")  # after what a run that was cut off may have left
        self._began = time.monotonic()
        self._ends_at = self._began + minutes * 60
        self._wire = wan_wire.Wire()
        self._receiver = Peer([], {}, wan_peers.__file__)
        self._receiver.answer()
        self._noted = wan_peers.Noted()
        self._messages: dict[int, memoryview] = {}

    def begin(self, facts: dict[str, Any]) -> None:
        self._write("header", facts | wan_wire.facts() | {"guest": machine(), "deadlines": DEADLINES})

    def measure(self, steps: list[Step]) -> None:
        done = {Step.of(cell) for cell in self._results.cells}
        link: tuple[float, float, str] | None = None
        for step in steps:
            if step in done:
                continue
            if time.monotonic() > self._ends_at:
                break
            if link != (link := (step.rtt, step.loss, step.disturbance)):
                self._set_link(step)
            cell = step.key | self._cell(step)
            self._write("cell", cell)
            done.add(step)
            print(wan_report.one_line(cell), wan_report.one_recovery(cell), flush=True)
        left = sum(step not in done for step in steps)
        print(f"\n{time.monotonic() - self._began:.0f} s; {left} of {len(steps)} cells are left", flush=True)

    def _set_link(self, step: Step) -> None:
        self._wire.set(step.rtt, 0)
        ping = self._wire.ping()
        self._wire.set(step.rtt, step.loss)
        self._write("link", {"rtt": step.rtt, "loss": step.loss, "ping": ping})
        what = wan_cells.DISTURBANCES.get(step.disturbance, "")
        print(f"\nRTT {step.rtt} ms (ping: {ping:.1f} ms), loss {step.loss} % {what}\n", flush=True)

    def _cell(self, step: Step) -> dict[str, Any]:
        wire, counters, setting = self._wire, self._wire.counters, step.setting
        nbytes = LONG_MESSAGE if step.disturbance else MESSAGE
        messages, deadline = _length(step)
        every = 0.05 if step.disturbance else 0.5
        arguments = json.dumps(asdict(setting), separators=(",", ":"))
        self._receiver.ask(f"expect {arguments} {nbytes}")
        message = self._messages.setdefault(nbytes, wan_peers.data(nbytes))
        begin = time.monotonic()
        cell: dict[str, Any] = {"bytes": nbytes, "deadline": deadline, "messages": []}
        sender, unanswered = None, False
        try:
            sender = wan_peers.Sender(setting)
            cell["opened_in"] = time.monotonic() - begin
            before, cpu = counters(), wan_wire.cpu_times()
            first = time.monotonic()
            for _ in range(messages):
                left = first + deadline - time.monotonic()
                if left < ENOUGH:
                    break
                self._receiver.tell(f"receive {left} {every}")
                unanswered = True
                start = time.monotonic()
                sender.send(message)
                if step.disturbance:
                    cell["disturbed"] = self._disturb(step.disturbance, start)
                answer, unanswered = self._receiver.answer(), False
                seconds = (answer["at"] or first + deadline) - start
                cell["messages"].append({"start": start, "seconds": seconds, "landed": answer["landed"]})
                if answer["at"] is None:
                    break
            if step.disturbance:
                cell["samples"] = answer["samples"]
            idle, ticks = (now - then for now, then in zip(wan_wire.cpu_times(), cpu, strict=True))
            cell |= asdict(counters().since(before)) | {"idle": idle / max(ticks, 1)}
        except (OSError, RdmaError) as error:
            cell["error"] = str(error)
        finally:
            if unanswered:
                self._receiver.answer()
            cell |= {"receiver": self._receiver.ask("state"), "notes": self._noted.take()}
            if sender is not None:
                sender.close()
            self._receiver.ask("close")
        if not wan_report.complete(cell):
            wire.settle()
        cell["took"] = time.monotonic() - begin
        return cell

    def _disturb(self, how: str, start: float) -> tuple[float, float]:
        """From when to when."""
        time.sleep(max(0.0, start + wan_cells.DISTURB_AT - time.monotonic()))
        self._wire.disturb(how)
        began = time.monotonic()
        time.sleep(wan_cells.OUTAGE)
        self._wire.restore(how)
        return began, time.monotonic()

    def _write(self, kind: str, line: dict[str, Any]) -> None:
        self._out.write(json.dumps({"kind": kind} | line) + "\n")

    def close(self) -> None:
        self._out.close()
        self._receiver.close()


def run(out: Path, full: bool, minutes: float, facts: dict[str, Any]) -> None:
    """Append to ``out`` what it has not yet, until ``minutes`` have passed."""
    measuring = Run(out, minutes)
    try:
        measuring.begin(facts | {"full": full, "versions": versions("nvflare-rdma", "numpy")})
        measuring.measure(wan_cells.plan(full))
    finally:
        measuring.close()
