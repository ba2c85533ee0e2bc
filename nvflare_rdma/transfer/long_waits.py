"""Tells people how far transfers are that take long: in lines of the log, or by a bar where stderr is a terminal.

One line is about all of them together, and none comes sooner than `LINE_SECONDS` after the last one. A transfer that is
over before that has none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from nvflare_rdma.logs import escaped, get_logger

log = get_logger(__name__)

LINE_SECONDS = 10.0
#: A bar is there after so long, and drawn anew so often.
_BAR_SECONDS, _DRAW_SECONDS = 2.0, 0.5
#: Characters of the bar, and of all that is drawn: less than a log line has, so that one of another process covers it.
_WIDTH, _MOST = 24, 78
_MB = 1e6


@dataclass(eq=False)
class Wait:
    """One transfer that is waited for. Times are as `time.monotonic` has them. `paced_from` is when the bytes that came
    after `paced_nbytes` began to come: what an earlier attempt brought, and what passed until this one, say nothing of
    its pace."""

    peer: str
    began: float
    paced_from: float
    paced_nbytes: int = 0
    nbytes: int = 0
    total: int = 0

    def left(self, now: float) -> float:
        """Seconds that it takes from now on, at the pace that it has had."""
        came = self.nbytes - self.paced_nbytes
        return (self.total - self.nbytes) * (now - self.paced_from) / came if came > 0 else float("inf")


class LongWaits:
    """Knows what a process waits for. Any number of threads may use it at once. `terminal` is where the bar goes; None
    for stderr, if that is a terminal of this process's own."""

    def __init__(self, terminal: TextIO | None = None) -> None:
        self._lock = threading.Lock()
        self._waits: list[Wait] = []
        self._said_at = self._drawn_at = float("-inf")
        self._terminal = terminal
        self._drawn_for: int | None = None
        #: Who writes to the terminal holds this one, and not `_lock`, which all transfers need: it may take long.
        self._drawing = threading.Lock()
        self._bar: _Bar | None = None

    def draw_for(self, process: int) -> None:
        """Draw on stderr also while not this process but that one is in the terminal's foreground: it has started this
        one in a session apart, and waits for it."""
        self._drawn_for = process

    def anew(self) -> LongWaits:
        """Those of a process that was forked from this one: they go to the same terminal, and wait for nothing."""
        made = LongWaits(self._terminal)
        made._drawn_for = self._drawn_for
        return made

    @contextlib.contextmanager
    def wait(self, peer: str, began: float, now: float | None = None, nbytes: int = 0) -> Iterator[Wait]:
        """Wait for a transfer from `peer`; `look` is to be called meanwhile. Of a transfer that goes on, `nbytes` are
        here already `now`, and it `began` before."""
        wait = Wait(peer, began, began if now is None else now, nbytes)
        with self._lock:
            self._waits.append(wait)
        try:
            yield wait
        finally:
            with self._lock:
                self._waits.remove(wait)
                over = not self._waits
            if over:
                self._show(None)

    def look(self, wait: Wait, nbytes: int, total: int, now: float) -> None:
        """`nbytes` of `total` are here: say so if it is time."""
        terminal, text = self._find_terminal(), ""
        with self._lock:
            wait.nbytes, wait.total = min(nbytes, total), total
            if terminal is not None:
                if now - self._drawn_at >= _DRAW_SECONDS and (long := self._longer_than(_BAR_SECONDS, now)):
                    self._drawn_at = now
                    text = _bar(long, now)
            elif now - self._said_at >= LINE_SECONDS and (long := self._longer_than(LINE_SECONDS, now)):
                self._said_at = now
                text = describe(long, now)
        if terminal is None:
            self._show(None)
            if text:
                log.info("%s", text)
        elif text:
            self._show(terminal, text)

    def _find_terminal(self) -> TextIO | None:
        return self._terminal or own_terminal(self._drawn_for)

    def _show(self, terminal: TextIO | None, text: str = "") -> None:
        """Draw the bar on `terminal`; if that is None, end it. Does nothing while another thread does so: that one may
        have to wait for the terminal, and no other transfer waits with it."""
        if not self._drawing.acquire(blocking=False):
            return
        try:
            if self._bar is not None and not self._bar.is_on(terminal):
                self._bar.end()
                self._bar = None
            if terminal is not None:
                self._bar = self._bar or _Bar(terminal, self._find_terminal)
                self._bar.draw(text)
        finally:
            self._drawing.release()

    def _longer_than(self, seconds: float, now: float) -> list[Wait]:
        return [wait for wait in self._waits if now - wait.began >= seconds and wait.total]


def describe(waits: list[Wait], now: float) -> str:
    """How far transfers are: in a line for people."""
    nbytes, total = _sum(waits)
    slowest = max(waits, key=lambda wait: wait.left(now))
    left, seconds = slowest.left(now), max(now - wait.began for wait in waits)
    more = f", at this pace {left:.0f} s more" if left < float("inf") else ""
    far = f"{nbytes / _MB:,.1f} of {total / _MB:,.1f} MB ({nbytes / total:.0%})"
    if len(waits) == 1:
        return f"{far} from {slowest.peer} are here after {seconds:.0f} s{more}"
    return f"{far} of {len(waits)} transfers are here after {seconds:.0f} s; from {slowest.peer}{more}"


def _sum(waits: list[Wait]) -> tuple[int, int]:
    return sum(wait.nbytes for wait in waits), sum(wait.total for wait in waits)


def _bar(waits: list[Wait], now: float) -> str:
    """The same in fewer words, and what one looks for first: names of cells are long, and what has no room is cut."""
    nbytes, total = _sum(waits)
    done = _WIDTH * nbytes // total
    left = max(wait.left(now) for wait in waits)
    more = f", {left:.0f} s more" if left < float("inf") else ""
    source = f"from {waits[0].peer}" if len(waits) == 1 else f"in {len(waits)} transfers"
    drawn = f"[{'#' * done}{'.' * (_WIDTH - done)}]"
    return f"{drawn} {nbytes / total:.0%}{more}: {nbytes / _MB:,.1f} of {total / _MB:,.1f} MB {source}"


def own_terminal(process: int | None = None) -> TextIO | None:
    """stderr, if it is a terminal in whose foreground the process is (None for this one); else None: FLARE's job
    processes write to files, or share a terminal with others."""
    try:
        if sys.stderr.isatty() and _is_in_foreground(process, sys.stderr.fileno()):
            return sys.stderr
    except (OSError, ValueError, AttributeError):  # it is closed, no file, or not there
        pass
    return None


def _is_in_foreground(process: int | None, terminal: int) -> bool:
    """Whether the process, None for this one, is in the foreground of the terminal that is open there."""
    if process is None:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    # A terminal of another session says nothing to tcgetpgrp. Up to the last ")" stands the program's name.
    _, _, group, _, device, foreground, *_ = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return group == foreground and int(device) == _device_number(os.fstat(terminal).st_rdev)


def _device_number(device: int) -> int:
    """A device as /proc writes it: the kernel's own packing of major and minor, and not that of the C library."""
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


class _Bar(logging.Handler):
    """A line on a terminal that is not there when something is logged: as the first of the handlers it wipes it away
    before the others write. The cursor stands at its beginning, so that whatever else is written covers it."""

    def __init__(self, terminal: TextIO, find: Callable[[], TextIO | None]) -> None:
        """`find` gives the terminal on which bars may be drawn now."""
        super().__init__()
        self._terminal = terminal
        self._find = find
        self._process = os.getpid()

    def is_on(self, terminal: TextIO | None) -> bool:
        """Whether it is drawn there."""
        return self._terminal is terminal

    def draw(self, text: str) -> None:
        """Draw it, in place of what was drawn before."""
        handlers = logging.root.handlers
        if handlers and handlers[0] is not self:  # without any, Python has a way of its own
            self._put(first=True)
        self._write(f"\r{escaped(text)[: self._most()]}\x1b[K\r")

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self._write("\r\x1b[K")

    def end(self) -> None:
        """Wipe it away."""
        self._put(first=False)
        self._write("\r\x1b[K")

    def _put(self, first: bool) -> None:
        """Become the first of the root logger's handlers, or none of them. They get a new list: whoever logs in this
        moment goes through the old one, and would skip a handler, or come to one twice, if that changed. The lock is
        the one that `logging` itself adds and removes handlers under."""
        root = logging.root
        with logging._lock:  # type: ignore[attr-defined]
            others = [handler for handler in root.handlers if handler is not self]
            root.handlers = [self, *others] if first else others

    def _most(self) -> int:
        """How many characters the terminal has room for, so that none of them goes to another line."""
        try:
            columns = os.get_terminal_size(self._terminal.fileno()).columns
        except (OSError, ValueError):
            return _MOST
        return min(_MOST, columns - 1) if columns else _MOST  # it may not know

    def _write(self, text: str) -> None:
        """Write, unless that is another's terminal now: that of a process forked from this one, or of what is in the
        foreground; or it takes nothing."""
        if os.getpid() != self._process or self._find() is not self._terminal:
            return
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # nobody looks, or this thread writes already
            ready = select.poll()
            ready.register(self._terminal, select.POLLOUT)
            if any(events & select.POLLOUT for _, events in ready.poll(0)):
                self._terminal.write(text)
                self._terminal.flush()
