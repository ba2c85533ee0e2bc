"""How far transfers are that take long: lines of the log, and a bar on a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from nvflare_rdma.transfer import LongWaits, long_waits
from tests.support.direct_transfers import assert_equal, large
from tests.support.processes import environment
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

MB = 1_000_000


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def no_terminal(monkeypatch):
    monkeypatch.setattr(long_waits, "own_terminal", lambda: None)


@contextlib.contextmanager
def terminal() -> Iterator[tuple[TextIO, list[bytes]]]:
    """A terminal, and what was written to it, once it is closed."""
    here, there = pty.openpty()
    shown: list[bytes] = []
    with open(there, "w") as file:
        yield file, shown
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(here, 4096):
            shown.append(part)
    os.close(here)


def lines(said) -> list[str]:
    return [record.getMessage() for record in said.records if record.name == long_waits.__name__]


def test_a_slow_pull_is_told_of_while_it_lasts(direct, cell, said, monkeypatch, no_terminal):
    monkeypatch.setattr(long_waits, "LINE_SECONDS", 0.0)
    sent = large(200, 20_000)  # more than are offered ahead
    it, site = direct(sent), cell("site-1")
    it.go_on.clear()  # the sender stops when its first tensors are there
    got: list[dict] = []
    pulling = threading.Thread(target=lambda: got.append(it.pull(site)))
    pulling.start()
    eventually(lambda: any(" of 4.0 MB (" in line and " from server are here after" in line for line in lines(said)))
    it.go_on.set()
    pulling.join(DEADLINE)
    assert_equal(got[0], sent)
    assert not site.long_waits._waits


def test_a_fast_one_is_not(direct, cell, said, no_terminal):
    it, site = direct(large(3)), cell("site-1")
    it.pull(site)
    assert lines(said) == []


def test_a_line_comes_every_ten_seconds_at_most_whatever_is_waited_for(said, no_terminal):
    waits = LongWaits()
    with waits.wait("site-1", 0.0) as one, waits.wait("site-2", 0.0) as other:
        for tenth in range(0, 301, 2):
            now = tenth / 10
            waits.look(one, int(now * MB), 100 * MB, now)
            waits.look(other, int(now * MB / 2), 100 * MB, now)
    assert len(lines(said)) == 3
    assert lines(said)[0].startswith(
        "14.9 of 200.0 MB (7%) of 2 transfers are here after 10 s; from site-2, at this pace"
    )
    assert lines(said)[2].startswith("44.9 of 200.0 MB (22%) of 2 transfers are here after 30 s; from site-2")


def test_one_transfer_has_its_peer_and_what_is_left(said, no_terminal):
    waits = LongWaits()
    with waits.wait("site-1", 0.0) as one:
        waits.look(one, 25 * MB, 100 * MB, 9.9)
        waits.look(one, 25 * MB, 100 * MB, 10.0)
    with waits.wait("a\x1b[2Jb", 50.0) as one:
        waits.look(one, 0, 100 * MB, 70.0)
    assert lines(said) == [
        "25.0 of 100.0 MB (25%) from site-1 are here after 10 s, at this pace 30 s more",
        "0.0 of 100.0 MB (0%) from a\\x1b[2Jb are here after 20 s",
    ]


def test_a_bar_on_a_terminal_gives_way_to_log_lines(said):
    root, name = logging.getLogger(), "somebody"
    with terminal() as (file, shown):
        console = logging.StreamHandler(file)
        root.addHandler(console)
        try:
            waits = LongWaits(file)
            with waits.wait("site-1", 0.0) as one:
                for now in (1.0, 3.0, 3.1, 10.0, 20.0):
                    waits.look(one, int(now * MB), 100 * MB, now)
                logging.getLogger(name).warning("a line")
            logging.getLogger(name).warning("another one")
        finally:
            root.removeHandler(console)
    written = b"".join(shown)
    bars = [part for part in written.split(b"\r") if part.startswith(b"[")]
    assert [bar.count(b"#") for bar in bars] == [0, 2, 4]  # none before it takes long, and none too often
    assert bars[0].startswith(b"[" + b"." * 24 + b"] 3.0 of 100.0 MB (3%) from site-1 are here")
    assert all(len(bar) < 90 for bar in bars)
    assert b"\x1b[K\r\r\x1b[Ka line\r\n" in written  # wiped away before, and the line is whole
    assert written.endswith(b"\r\x1b[Kanother one\r\n")
    assert not [handler for handler in root.handlers if isinstance(handler, long_waits._Bar)]
    assert lines(said) == []


def test_a_bar_comes_and_goes_while_a_record_is_on_its_way(said):
    """Each handler gets it once, whatever becomes of the bar meanwhile."""

    class Drawing(logging.Handler):
        def emit(self, record):
            got.append(self.name)
            waits.look(one, MB, 100 * MB, 10.0)

    class Ending(logging.Handler):
        def emit(self, record):
            got.append(self.name)
            waiting.close()

    def handlers(*kinds):
        for number, kind in enumerate(kinds):
            made = kind()
            made.set_name(f"{kind.__name__} {number}")
            yield made

    class Other(logging.Handler):
        def emit(self, record):
            got.append(self.name)

    root = logging.getLogger()
    for kind in (Drawing, Ending):
        got: list[str] = []
        added = list(handlers(kind, Other, Other))
        with terminal() as (file, _), contextlib.ExitStack() as waiting:
            waits = LongWaits(file)
            one = waiting.enter_context(waits.wait("site-1", 0.0))
            if kind is Ending:
                waits.look(one, MB, 100 * MB, 10.0)
            for handler in added:
                root.addHandler(handler)
            try:
                root.warning("a line")
            finally:
                for handler in added:
                    root.removeHandler(handler)
        assert got == [handler.name for handler in added]


SCRIPT = """
import sys
from nvflare_rdma.transfer.long_waits import own_terminal
sys.exit(10 + (own_terminal() is sys.stderr))
"""


@pytest.mark.parametrize(("foreground", "code"), [(True, 11), (False, 10)])
def test_only_a_process_in_the_foreground_of_its_terminal_draws(foreground, code):
    here, there = pty.openpty()
    command = ["setsid", *(["--ctty"] if foreground else []), sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, stdin=there, stderr=there, env=environment(), timeout=DEADLINE, check=False)
    for end in (here, there):
        os.close(end)
    assert done.returncode == code


def test_a_stderr_that_is_closed_or_not_there_is_no_terminal(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        assert long_waits.own_terminal() is None
    assert long_waits.own_terminal() is None
    monkeypatch.setattr(sys, "stderr", None)
    assert long_waits.own_terminal() is None
