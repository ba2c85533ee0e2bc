"""How far transfers are that take long: lines of the log, and a bar on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

import pytest

from nvflare_rdma.transfer import LongWaits, long_waits
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, PartDigests
from tests.support.direct_transfers import assert_equal, large
from tests.support.file_transfers import PART, Files
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
    monkeypatch.setattr(long_waits, "own_terminal", lambda process: None)


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


def looks_at(site, monkeypatch) -> list[tuple[long_waits.Wait, int, int]]:
    """What the transfers of a cell tell of themselves: how many bytes are here, of how many."""
    told, look = [], site.long_waits.look

    def note(wait, nbytes, total, now):
        told.append((wait, nbytes, total))
        look(wait, nbytes, total, now)

    monkeypatch.setattr(site.long_waits, "look", note)
    return told


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


def test_what_an_earlier_transfer_has_brought_is_neither_here_nor_to_come(files, cell, monkeypatch):
    it, site = files(os.urandom(4 * PART)), cell("site-1")
    found = it.partial(site.name)
    for part in (0, 2):
        data = memoryview(it.content)[part * PART : (part + 1) * PART]
        digests = PartDigests(PART)
        digests.add(0, data)
        found.write(part, 0, data)
        found.add(part, digests.whole(), digests.whole())
    found.keep()
    told, go_on, read = looks_at(site, monkeypatch), threading.Event(), it.file.read_into
    it.file.read_into = lambda memory, at: (at < 3 * PART or go_on.wait(DEADLINE)) and read(memory, at)
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(it.pull, site)
        eventually(lambda: (PART, 2 * PART) in {(nbytes, total) for _, nbytes, total in told})
        go_on.set()
        pulling.result(DEADLINE)
    assert {total for _, _, total in told} == {2 * PART}


def test_one_of_two_transfers_does_not_count_the_bytes_of_the_other(files, cell, tmp_path, monkeypatch):
    """They come from one peer. One of them stops before its last block, the other one before its first."""
    (tmp_path / "other").mkdir()
    one, other = files(os.urandom(PART)), Files(cell, tmp_path / "other", os.urandom(2 * PART))
    other.channels = one.channels
    site, go_on = cell("site-1", fabrics=("tcp",), budget=1 << 20), threading.Event()
    told = looks_at(site, monkeypatch)

    def stop_at(it, place):
        read = it.file.read_into
        it.file.read_into = lambda memory, at: (at < place or go_on.wait(DEADLINE)) and read(memory, at)

    stop_at(one, PART - BLOCK_BYTES)
    stop_at(other, 0)
    with ThreadPoolExecutor(2) as pool:
        pulling = [pool.submit(one.pull, site)]
        try:
            eventually(lambda: any(nbytes for _, nbytes, _ in told))
            pulling.append(pool.submit(other.pull, site))
            eventually(lambda: any(total == 2 * PART for *_, total in told))
            assert {nbytes for _, nbytes, total in told if total == 2 * PART} == {0}
        finally:
            go_on.set()
        for each in pulling:
            each.result(DEADLINE)
    other.service.close()


def test_the_pace_is_that_of_this_attempt(direct, cell, monkeypatch):
    """Not of an earlier one, nor of the time until the link was there again."""
    sent = large(200, 20_000)
    it, site = direct(sent), cell("site-1")
    waits, wait = list[long_waits.Wait](), site.long_waits.wait

    @contextlib.contextmanager
    def note(*what):
        with wait(*what) as made:
            waits.append(made)
            yield made

    monkeypatch.setattr(site.long_waits, "wait", note)
    progress = it.once_some_are_here(lambda: it.channels.find("site-1").close(0.0))
    assert_equal(it.pull(site, progress=progress), sent)
    first, *_, last = waits
    assert first.paced_nbytes == 0 < last.paced_nbytes
    assert first.began == last.began < last.paced_from


def test_what_is_left_is_told_at_the_pace_of_what_came_since(said, no_terminal):
    waits = LongWaits()
    with waits.wait("site-1", 0.0, 100.0, 50 * MB) as one:
        waits.look(one, 75 * MB, 100 * MB, 105.0)
    assert lines(said) == ["75.0 of 100.0 MB (75%) from site-1 are here after 105 s, at this pace 5 s more"]


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
    assert bars[0] == b"[" + b"." * 24 + b"] 3%, 97 s more: 3.0 of 100.0 MB from site-1\x1b[K"
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


def test_a_bar_fits_on_a_narrow_terminal():
    with terminal() as (file, shown):
        fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 41, 0, 0))
        waits = LongWaits(file)
        with waits.wait("site-1", 0.0) as one:
            waits.look(one, 3 * MB, 100 * MB, 3.0)
    (bar,) = [part for part in b"".join(shown).split(b"\r") if part.startswith(b"[")]
    assert bar == b"[" + b"." * 24 + b"] 3%, 97 s more\x1b[K"  # 40 characters


def test_a_bar_says_how_long_it_takes_however_long_the_name_of_a_cell_is():
    with terminal() as (file, shown):
        waits = LongWaits(file)
        with waits.wait("site-1.0f9cbf3a-1c7f-4f6d-8a6e-2f1f0f6f4d55", 0.0) as one:
            waits.look(one, 0, 1400 * MB, 4.0)
            waits.look(one, 420 * MB, 1400 * MB, 60.0)
            with waits.wait("site-2.0f9cbf3a-1c7f-4f6d-8a6e-2f1f0f6f4d55", 50.0) as other:
                waits.look(other, 70 * MB, 1400 * MB, 70.0)
    bars = [part for part in b"".join(shown).decode().split("\r") if part.startswith("[")]
    assert [bar[26:].removesuffix("\x1b[K") for bar in bars] == [
        " 0%: 0.0 of 1,400.0 MB from site-1.0f9cbf3a-1c7f-4f6",
        " 30%, 140 s more: 420.0 of 1,400.0 MB from site-1.0f",
        " 18%, 380 s more: 490.0 of 2,800.0 MB in 2 transfers",
    ]


def test_a_terminal_that_takes_nothing_stops_no_transfer():
    here, there = pty.openpty()
    os.set_blocking(there, False)
    for size in (1000, 1):
        with contextlib.suppress(BlockingIOError):
            while True:  # nobody reads at the other end
                os.write(there, b"x" * size)
    os.set_blocking(there, True)
    with open(there, "w") as file, ThreadPoolExecutor(2) as pool:
        waits = LongWaits(file)

        def transfer(name):
            with waits.wait(name, 0.0) as one:
                waits.look(one, 3 * MB, 100 * MB, 3.0 + len(name))

        try:
            for name in ("one", "the other"):
                pool.submit(transfer, name).result(5)
        finally:
            os.set_blocking(there, False)
            while select.select([here], [], [], 0)[0]:
                os.read(here, 4096)
    os.close(here)


def test_what_a_forked_process_logs_leaves_the_bar_to_its_parent(said):
    with terminal() as (file, shown):
        waits = LongWaits(file)
        with waits.wait("site-1", 0.0) as one:
            waits.look(one, 3 * MB, 100 * MB, 3.0)
            if not (child := os.fork()):
                logging.getLogger("somebody").warning("a line")
                os._exit(0)
            os.waitpid(child, 0)
    written = b"".join(shown)
    assert written.count(b"\r\x1b[K") == 1, "it is wiped away at its end only"


BACKGROUND = """
import logging, os, sys
from nvflare_rdma.transfer import LongWaits
waits = LongWaits()
def is_there(): return any("Bar" in type(handler).__name__ for handler in logging.root.handlers)
logging.root.addHandler(logging.NullHandler())
with waits.wait("site-1", 0.0) as one:
    waits.look(one, 3, 100, 3.0)
    assert is_there()
    ends = os.pipe()
    if not (other := os.fork()):  # what is in the foreground from now on
        os.setpgid(0, 0)
        os.close(ends[1])
        os.read(ends[0], 1)
        os._exit(0)
    try:
        os.setpgid(other, other)
    except PermissionError:
        pass
    os.tcsetpgrp(2, other)
    os.write(2, b"|")
    logging.warning("a line")
    waits.look(one, 4, 100, 4.0)
    assert not is_there()
os.close(ends[1])
os.waitpid(other, 0)
sys.exit(17)
"""


def test_a_process_that_has_gone_to_the_background_leaves_the_terminal_alone():
    here, there = pty.openpty()
    command = ["setsid", "--ctty", "--wait", sys.executable, "-c", BACKGROUND]
    kinds = {"stdin": there, "stderr": there, "env": environment(), "timeout": DEADLINE, "check": False}
    done = subprocess.run(command, **kinds)
    os.close(there)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(here, 4096):
            shown += part
    os.close(here)
    assert done.returncode == 17, shown
    before, after = shown.split(b"|")
    assert b"[......" in before
    assert after == b""


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


APART = """
import os, subprocess, sys
code = "import os, sys; from nvflare_rdma.transfer.long_waits import own_terminal; "
code += f"sys.exit(10 + (own_terminal({sys.argv[1]}) is sys.stderr))"
sys.exit(subprocess.run([sys.executable, "-c", code], start_new_session=True).returncode)
"""


@pytest.mark.parametrize(
    ("foreground", "process", "code"),
    [(True, "os.getppid()", 11), (True, "None", 10), (False, "os.getppid()", 10), (True, str(2**22 + 1), 10)],
    ids=["its starter's", "its own", "no foreground", "no such process"],
)
def test_a_process_apart_draws_while_the_one_that_started_it_is_in_the_foreground(foreground, process, code):
    """As FLARE's simulator does for the script that runs a recipe."""
    here, there = pty.openpty()
    command = ["setsid", *(["--ctty"] if foreground else []), "--wait", sys.executable, "-c", APART, process]
    done = subprocess.run(command, stdin=there, stderr=there, env=environment(), timeout=DEADLINE, check=False)
    for end in (here, there):
        os.close(end)
    assert done.returncode == code


def test_the_terminal_of_another_is_asked_for_when_one_draws_for_it(monkeypatch, said):
    with terminal() as (file, shown):
        monkeypatch.setattr(long_waits, "own_terminal", lambda process: file if process == 17 else None)
        waits = LongWaits()
        waits.draw_for(17)
        with waits.wait("site-1", 0.0) as one:
            waits.look(one, 3 * MB, 100 * MB, 3.0)
    assert b"".join(shown).startswith(b"\r[")
    assert lines(said) == []


def test_a_stderr_that_is_closed_or_not_there_is_no_terminal(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        assert long_waits.own_terminal() is None
    assert long_waits.own_terminal() is None
    monkeypatch.setattr(sys, "stderr", None)
    assert long_waits.own_terminal() is None
