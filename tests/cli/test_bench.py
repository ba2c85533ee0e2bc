"""The command `bench`: what it finds between two processes, and what it says where that is not possible."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from nvflare_rdma.channel import Link
from nvflare_rdma.cli import main
from nvflare_rdma.cli.bench_listen import BenchListening
from nvflare_rdma.cli.bench_progress import steps_on
from nvflare_rdma.cli.bench_raw import MOST_CONNECTIONS
from nvflare_rdma.cli.bench_report import MIB, RAW, BenchReport, Figure
from nvflare_rdma.cli.bench_text import line_of, to_data, to_svg, to_text
from nvflare_rdma.cli.peer_bodies import item_of
from nvflare_rdma.cli.peer_listen import Listening
from tests.support.bench_links import DEADLINE, RUN, link_to, measured
from tests.support.commands import error_of
from tests.support.processes import SMALL, environment
from tests.support.waiting import PATIENCE


@contextlib.contextmanager
def listener(*options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`bench --listen` in a process of its own, and its port."""
    command = [sys.executable, "-m", "nvflare_rdma.cli", "bench", "--listen", *options]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), cwd=SMALL, **pipes) as process:
        try:
            while not (found := re.search(r"listens at \S+:(\d+)", line := process.stderr.readline())):
                assert line
            assert "On the other host: nvflare-rdma bench --connect" in line
            yield process, int(found[1])
        finally:
            process.kill()


# -- what is found -----------------------------------------------------------------------------------------


def test_two_processes_of_this_host(capsys, tmp_path):
    picture = tmp_path / "bench.svg"
    options = ["--sizes", "1,17", "--repeat", 1, "--codecs", "exact,int8", "--rails", 1, "--chunk-mib", "0.5"]
    code, answer = measured(capsys, *options, "--plot", picture)
    found = answer["data"]
    assert (code, found["same_host"], found["secure"], found["line"]) == (0, True, False, None)
    rows = [(each["fabric"], each["rails"], each["codec"], each["size_bytes"]) for each in found["figures"]]
    links = [(fabric, 1, codec, n * MIB) for fabric in ("shm", "tcp") for codec in ("exact", "int8") for n in (1, 17)]
    assert rows == [(RAW, 1, "exact", 1 * MIB), (RAW, 1, "exact", 17 * MIB), *links]
    for each in found["figures"]:
        assert min(each["to_peer"], each["from_peer"], each["cpu_seconds"], each["peer_cpu_seconds"]) > 0
        assert min(each["peak_bytes"], each["peer_peak_bytes"]) > 10 * MIB
        assert each["chunk_bytes"] == (None if each["fabric"] == RAW else MIB // 2)
    assert found["round_trip_seconds"] > 0
    assert found["versions"] == found["peer_versions"]
    assert [each.partition(":")[0] for each in found["left_out"]] == ["verbs"]
    drawn = ElementTree.fromstring(picture.read_text())
    assert len([each for each in drawn.iter() if each.tag.endswith("rect")]) == 1 + 2 * len(rows)


def test_a_site_measures_the_way_to_the_server(provisioned, capsys):
    with listener("127.0.0.1:0", "--kit", str(provisioned / "server"), "--runs", "1") as (process, port):
        options = ["--sizes", 1, "--repeat", 1, "--fabrics", "tcp", "--kit", provisioned / "site-1"]
        code, answer = measured(capsys, "--connect", f"localhost:{port}", *options)
        out, err = process.communicate(timeout=DEADLINE)  # one run is all that it was to have
    found = answer["data"]
    assert (code, found["secure"], found["site"], found["peer_site"]) == (0, True, "site-1", "server")
    # More rails are dialled while a link is in use.
    assert [(each["fabric"], each["size_bytes"]) for each in found["figures"]][:2] == [(RAW, MIB), ("tcp", MIB)]
    assert "site-1 from 127.0.0.1:" in err
    assert process.returncode == 0
    assert "site-1 from" in out


def test_one_deadline_for_all_of_it(side, capsys):
    with BenchListening(side, "127.0.0.1", 0) as listening:
        options = ["--sizes", "1,4096", "--repeat", 50, "--timeout", f"{6 * PATIENCE}s"]
        code, answer = measured(capsys, "--connect", f"127.0.0.1:{listening.port}", *options)
    assert code in (0, 1)
    assert any("of --timeout are left" in each for each in answer["data"]["left_out"])


def test_a_bar_is_on_a_terminal_only(tmp_path):
    here, there = pty.openpty()
    with open(there, "w") as terminal, steps_on(terminal) as steps:
        steps.begin(2)
        steps.step("tcp, exact, 1 MiB to the peer")
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(here, 4096):
            shown += part
    os.close(here)
    assert b"1 MiB to the peer" in shown
    with (tmp_path / "log").open("w+") as file:
        with steps_on(file) as steps:
            steps.begin(2)
            steps.step("tcp")
        assert file.tell() == 0


FIGURE = Figure(
    fabric=RAW, rails=1, most_rails=1, chunk_bytes=None, codec="exact", size_bytes=24 * MIB, repeat=3, to_peer=12e6,
    from_peer=11e6, cpu_seconds=0.1, peer_cpu_seconds=0.2, peak_bytes=10**8, peer_peak_bytes=10**8,
)  # fmt: skip


def report_of(*figures: Figure, same_host: bool = False) -> BenchReport:
    report = BenchReport(
        peer="far:1", same_host=same_host, secure=True, site="a", peer_site="b", left_out=["verbs: no"]
    )
    report.figures += figures
    report.round_trip_seconds = 0.04
    return report


def test_what_plan_says_of_the_line_stands_beside_what_was_measured():
    link = Figure(**{**vars(FIGURE), "fabric": "tcp", "rails": 2, "to_peer": 10e6, "from_peer": 10e6})
    report = report_of(FIGURE, link)
    assert line_of(report).rate == 11e6 * 1.06 * 8  # with headers
    text = " ".join(to_text(report).split())
    assert "--site NAME=93.3Mbit,40ms" in text
    assert re.search(r"It says 2\.\d+ s for 24 MiB each way over such a line \(93.3 Mbit/s\); measured 2.52 s", text)
    assert 2.3 < to_data(report)["figures"][1]["planned_seconds"] < 3
    assert "not measured: verbs: no" in text
    assert line_of(report_of(FIGURE, same_host=True)) is None


def test_the_table_has_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    link = Figure(**{**vars(FIGURE), "codec": "normfloat4_e4m3", "chunk_bytes": MIB // 4, "size_bytes": 4096 * MIB})
    text = to_text(report_of(FIGURE, link))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^ raw x1 +256 +normfloat4_e4m3 +4096 ", text, re.MULTILINE)


def test_names_of_peers_are_no_markup():
    report = report_of(FIGURE)
    report.peer_site = "<script>"
    assert "<script>" not in to_svg(report)


# -- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sizes", "0"], "--sizes '0' is no number of 1 to 4096"),
        (["--sizes", "x"], "--sizes 'x'"),
        (["--sizes", "nan"], "--sizes 'nan'"),
        (["--rails", "1,1000"], "--rails '1000'"),
        (["--chunk-mib", "0.01"], "--chunk-mib '0.01'"),
        (["--codecs", "exact,zip"], "--codecs 'zip' is unknown"),
        (["--fabrics", "fax"], "--fabrics 'fax' is unknown"),
        (["--repeat", "0"], "--repeat 0"),
        (["--timeout", "0s"], "--timeout 0s"),
        (["--plot", "x.png"], "--plot x.png is no .svg file"),
        (["--plot", "nowhere/x.svg"], "there is no folder nowhere"),
        (["--runs", "1"], "--runs is for the side that listens"),
        (["--listen", "0", "--runs", "0"], "--runs 0"),
        (["--listen", "0", "--fabrics", "tcp"], "--fabrics is for the side that connects"),
        (["--connect", "host"], "--connect 'host' is not HOST:PORT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_asked_for(capsys, options, says):
    code, message = error_of(*measured(capsys, *options))
    assert (code, says in message) == ("INVALID_INPUT", True), message


def test_a_fabric_that_this_host_has_not(capsys):
    code, message = error_of(*measured(capsys, "--fabrics", "verbs"))
    assert (code, message.startswith("--fabrics verbs can't be used here: ")) == ("NO_FABRIC", True)


def test_sizes_are_within_the_budget(capsys, monkeypatch):
    monkeypatch.setenv("NVFLARE_RDMA_MEMORY_BUDGET_BYTES", str(MIB))
    code, message = error_of(*measured(capsys, "--sizes", "256"))
    assert (code, "64 MiB are the most with this side's memory budget" in message) == ("INVALID_INPUT", True)


def test_nobody_listens(capsys):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert main(["bench", "--connect", f"127.0.0.1:{port}"]) == 1
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port} refuses the connection" in err
    assert f"Hint: run `nvflare-rdma bench --listen {port}` there" in err


# -- what breaks off ---------------------------------------------------------------------------------------


class Odd(BenchListening):
    """Does something else than a bench expects: `on_use` when it is asked for chunks, and `busy` for later links."""

    on_use, busy = staticmethod(lambda listening: None), ""

    def use_chunk(self, nbytes):
        self.on_use(self)

    def join(self, key, exchange):
        if self._present is not None and self.busy:
            return self.busy
        return super().join(key, exchange)


def measured_at(capsys, listening, *options) -> tuple[int, dict]:
    return measured(capsys, "--connect", f"127.0.0.1:{listening.port}", "--sizes", 1, "--repeat", 1, *options)


def test_what_was_measured_is_told_if_the_run_ends_early(side, capsys):
    with Odd(side, "127.0.0.1", 0) as listening:
        listening.on_use = lambda listening: listening._present.lead.link.close(0.0)
        code, answer = measured_at(capsys, listening)
    assert (code, answer["status"]) == (1, "ok")
    assert [each["fabric"] for each in answer["data"]["figures"]] == [RAW]
    assert "the link has ended" in answer["data"]["broke_off"]


def test_a_link_that_is_not_let_in_leaves_out_one_case_only(side, capsys):
    with Odd(side, "127.0.0.1", 0) as listening:
        listening.busy = "no more of them"
        code, answer = measured_at(capsys, listening)
    assert code == 0
    assert [each["fabric"] for each in answer["data"]["figures"]] == [RAW]
    assert any("tcp: " in each and "no more of them" in each for each in answer["data"]["left_out"])


class NoCodec(BenchListening):
    """Ends a link that asks for a codec, which it has said to have."""

    def _exchange(self, stream, sock, name):
        made = super()._exchange(stream, sock, name)
        made.knows = lambda codec: codec == ""
        return made


def test_what_breaks_off_takes_no_other_codec_with_it(side, capsys):
    with NoCodec(side, "127.0.0.1", 0) as listening:
        code, answer = measured_at(capsys, listening, "--codecs", "int8,exact")
    assert code == 0
    assert ("tcp", "exact") in [(each["fabric"], each["codec"]) for each in answer["data"]["figures"]]
    assert any(each.startswith("tcp, int8, 1 MiB: ") for each in answer["data"]["left_out"])


def test_there_are_no_more_plain_connections_than_there_may_be(side, capsys, monkeypatch):
    monkeypatch.setattr(Link, "rails", MOST_CONNECTIONS + 1)  # as over a long path, if --rails allows it
    with BenchListening(side, "127.0.0.1", 0) as listening:
        code, answer = measured_at(capsys, listening)
    assert code == 0
    rows = [(each["fabric"], each["rails"]) for each in answer["data"]["figures"]]
    assert rows == [(RAW, 1), ("tcp", MOST_CONNECTIONS + 1), (RAW, MOST_CONNECTIONS)]


def test_all_questions_are_within_the_deadline(side, capsys, monkeypatch):
    monkeypatch.setattr("nvflare_rdma.cli.bench.ANSWER_SECONDS", DEADLINE)  # nothing else ends a question
    go_on = threading.Event()
    with Odd(side, "127.0.0.1", 0) as listening:
        listening.on_use = lambda listening: go_on.wait(DEADLINE)
        try:
            _, answer = measured_at(capsys, listening, "--chunk-mib", "1,2", "--timeout", f"{6 * PATIENCE}s")
        finally:
            go_on.set()
    told = answer["data"]["left_out"]
    assert any("chunks of 1024 KiB: " in each and "does not answer" in each for each in told)
    assert any("chunks of 2048 KiB: 0 s of --timeout are left" in each for each in told)


def test_an_answer_that_comes_late_is_none_to_the_next_question(side):
    go_on = threading.Event()
    with Odd(side, "127.0.0.1", 0) as listening, link_to(listening, side) as one:
        listening.on_use = lambda listening: go_on.wait(DEADLINE)
        one.ask("about", run=RUN)
        with pytest.raises(TimeoutError):
            one.ask("use", 0.1, chunk=0)
        go_on.set()
        assert "cpu_seconds" in one.ask("used")
        assert one.ask("ping") == {}


def test_what_lands_late_is_none_of_the_next_round(side):
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as one:
        one.ask("about", run=RUN)
        one._expect([10**6], item_of(4, ""))
        one._place(10**6, lambda: None).failed("of a round before")
        assert one.move(False, 4096) > 0


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Has something else run in place of Python."""

    def put(script: str) -> None:
        other = tmp_path / "python"
        other.write_text(f"#!/bin/sh\n{script}\n")
        other.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(other))

    return put


@pytest.mark.parametrize(
    ("script", "timeout", "says"),
    [
        ("echo why it has ended >&2; exit 3", "60s", "has ended: why it has ended"),
        ("exec 0<&-; echo gone >&2; exit 3", "60s", "has ended: gone"),
        ("exec sleep 50", "500ms", "did not start within --timeout"),
    ],
    ids=["ends", "hears nothing", "says nothing"],
)
def test_another_process_that_does_not_come(capsys, python, script, timeout, says):
    python(script)
    code, message = error_of(*measured(capsys, "--timeout", timeout))
    assert (code, says in message) == ("NO_PEER", True), message


def test_nothing_comes_from_the_folder_that_the_user_is_in(capsys, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('this is another json')")
    monkeypatch.chdir(tmp_path)
    assert measured(capsys, "--fabrics", "tcp", "--sizes", 1, "--repeat", 1)[0] == 0


class Liar(BenchListening):
    """Says of itself what a bench does not expect."""

    lie: dict = {}

    def _about(self, link):
        return {**super()._about(link), **self.lie}

    def raw_ticket(self, exchange):
        return self.lie.get("ticket", super().raw_ticket(exchange))


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({"bench": {"message_bytes": True, "codecs": []}}, "listens for `doctor --peer`, and not"),
        ({"bench": []}, "listens for `doctor --peer`, and not"),
        ({"bench": {"message_bytes": 4096, "codecs": []}}, "moves no more than 1 MiB at once"),
        ({"ticket": "\x1b[2J", "order": 5, "fabrics": "\x1b[2J", "versions": {"\x1b[2J": "\x1b[2J"}}, ""),
    ],
    ids=["no number", "no object", "little", "orders to the terminal"],
)
def test_what_a_listener_says_is_taken_for_what_it_is(side, capsys, lie, says):
    with Liar(side, "127.0.0.1", 0) as liar:
        liar.lie = lie
        assert main(["bench", "--connect", f"127.0.0.1:{liar.port}", "--sizes", "2", "--repeat", "1"]) == 1
        out, err = capsys.readouterr()
    assert says in err
    assert "\x1b" not in out + err
    assert says or "not measured: raw tcp: " in out


def test_doctors_listener_is_no_bench(side, capsys):
    with Listening(side, "127.0.0.1", 0) as listening:
        assert main(["bench", "--connect", f"127.0.0.1:{listening.port}"]) == 1
    err = capsys.readouterr().err
    assert "listens for `doctor --peer`, and not for `bench --connect`" in err
    assert "Hint: run `nvflare-rdma bench --listen` there" in err
