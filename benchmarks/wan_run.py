"""The measurement of `wan.py`, in the test guest: every setting on every link, and how they recover."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wan_cells
import wan_peers
import wan_report
import wan_wire
from measuring import Peer, machine, versions
from wan_cells import LONG_MESSAGE, MESSAGE, Setting

from nvflare_rdma.errors import RdmaError

#: Seconds for the messages of a cell: what has landed by then counts. A huge write lands only at its end.
DEADLINE, HUGE_DEADLINE, ADAPTIVE_DEADLINE, RECOVERY_DEADLINE = 8.0, 20.0, 16.0, 40.0


def _length(setting: Setting) -> tuple[int, float]:
    """Messages, and the time for them."""
    if setting.adaptive and setting.rails == wan_cells.ADAPTIVE_RAILS:
        return wan_cells.ADAPTIVE_MESSAGES, ADAPTIVE_DEADLINE
    return 1, HUGE_DEADLINE if setting.chunk == MESSAGE else DEADLINE


class Run:
    """All of it, in the guest."""

    def __init__(self, out: Path, budget: float) -> None:
        self._out = out
        self._ends_at = time.monotonic() + budget
        self._wire = wan_wire.Wire()
        self._receiver = Peer([], {}, wan_peers.__file__)
        self._receiver.answer()
        self._noted = wan_peers.Noted()
        self._messages: dict[int, memoryview] = {}
        self._began = time.monotonic()
        self.result: dict[str, Any] = {
            "machine": machine(),
            "versions": versions("nvflare-rdma", "numpy"),
            "pings": [],
            "cells": [],
            "recovery": [],
            "left_out": [],
        }

    def matrix(self, rtts: Iterable[float], losses: Iterable[float], settings: list[Setting], repeats: int) -> None:
        for rtt in rtts:
            for loss in losses:
                self._wire.set(rtt, 0)
                ping = self._wire.ping()
                self._wire.set(rtt, loss)
                self.result["pings"].append({"rtt": rtt, "loss": loss, "ping": ping})
                print(f"\nRTT {rtt} ms (ping: {ping:.1f} ms), loss {loss} %\n", flush=True)
                highlighted = (rtt, loss) == wan_cells.REPEATED_LINK
                again = list(wan_cells.repeated()) * (repeats - 1) if highlighted else []
                for setting in [*settings, *(s for s in again if s in settings)]:
                    if time.monotonic() > self._ends_at:
                        self.result["left_out"].append(f"RTT {rtt} ms, loss {loss} %: {setting}")
                        continue
                    cell = self._cell(setting, MESSAGE, *_length(setting), step=0.5)
                    cell |= {"rtt": rtt, "loss": loss}
                    self.result["cells"].append(cell)
                    print(wan_report.one_line(cell), flush=True)
                self._save()

    def recovery(self, settings: Iterable[Setting]) -> None:
        self._wire.set(wan_cells.RECOVERY_RTT, 0)
        settings = list(settings)
        for how, words in wan_cells.DISTURBANCES.items():
            print(f"\n{words}\n", flush=True)
            for setting in settings:
                if time.monotonic() > self._ends_at:
                    self.result["left_out"].append(f"{how}: {setting}")
                    continue
                cell = self._cell(setting, LONG_MESSAGE, 1, RECOVERY_DEADLINE, step=0.05, disturbance=how)
                cell["disturbance"] = how
                self.result["recovery"].append(cell)
                print(wan_report.one_line(cell), wan_report.one_recovery(cell), flush=True)
            self._save()

    def _cell(
        self, setting: Setting, nbytes: int, messages: int, deadline: float, step: float, disturbance: str = ""
    ) -> dict[str, Any]:
        wire, counters = self._wire, self._wire.counters
        arguments = json.dumps(asdict(setting), separators=(",", ":"))
        self._receiver.ask(f"expect {arguments} {nbytes}")
        message = self._messages.setdefault(nbytes, wan_peers.data(nbytes))
        begin = time.monotonic()
        cell: dict[str, Any] = {"setting": asdict(setting), "bytes": nbytes, "messages": []}
        sender = None
        try:
            sender = wan_peers.Sender(setting)
            cell["opened_in"] = time.monotonic() - begin
            before, cpu = counters(), wan_wire.cpu_times()
            first = time.monotonic()
            for _ in range(messages):
                left = first + deadline - time.monotonic()
                self._receiver.tell(f"receive {left} {step}")
                start = time.monotonic()
                sender.send(message)
                if disturbance:
                    cell["disturbed"] = self._disturb(disturbance, start)
                answer = self._receiver.answer()
                seconds = (answer["at"] or first + deadline) - start
                cell["messages"].append({"start": start, "seconds": seconds, "landed": answer["landed"]})
                if answer["at"] is None:
                    break
            if disturbance:
                cell["samples"] = answer["samples"]
            idle, ticks = (now - then for now, then in zip(wan_wire.cpu_times(), cpu, strict=True))
            cell |= asdict(counters().since(before)) | {"idle": idle / max(ticks, 1)}
        except (OSError, RdmaError) as error:
            cell["error"] = str(error)
        finally:
            cell |= {"receiver": self._receiver.ask("state"), "notes": self._noted.take()}
            if sender is not None:
                sender.close()
            self._receiver.ask("close")
        if not wan_report.complete(cell):
            wire.settle()
        return cell

    def _disturb(self, how: str, start: float) -> tuple[float, float]:
        """From when to when."""
        time.sleep(max(0.0, start + wan_cells.DISTURB_AT - time.monotonic()))
        self._wire.disturb(how)
        began = time.monotonic()
        time.sleep(wan_cells.OUTAGE)
        self._wire.restore(how)
        return began, time.monotonic()

    def _save(self) -> None:
        self.result["took"] = time.monotonic() - self._began
        self._out.write_text(json.dumps(self.result))

    def close(self) -> None:
        self._save()
        left_out = self.result["left_out"]
        print(f"\n{self.result['took']:.0f} s; left out: {'; '.join(left_out) or 'nothing'}", flush=True)
        self._receiver.close()


def run(out: Path, quick: bool, budget: float) -> None:
    """Write the results to ``out`` as they come."""
    measuring = Run(out, budget)
    try:
        if quick:
            measuring.recovery([s for s in wan_cells.recovery_settings() if not s.adaptive])
            measuring.matrix((40,), (0.0, 1.0), list(wan_cells.quick_settings()), 1)
        else:
            measuring.recovery(wan_cells.recovery_settings())
            measuring.matrix(wan_cells.RTTS, wan_cells.LOSSES, list(wan_cells.settings()), wan_cells.REPEATS)
    finally:
        measuring.close()
