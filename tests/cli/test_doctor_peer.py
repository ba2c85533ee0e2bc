"""Two hosts' doctors: a live check over a job's own links, between two processes or two networks."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nvflare_rdma.cli import main, peer_link, peer_listen
from nvflare_rdma.cli.peer_bodies import item_of
from nvflare_rdma.cli.peer_kit import this_side
from nvflare_rdma.cli.peer_link import MOST_AT_ONCE, MOST_BYTES, Exchange
from nvflare_rdma.cli.peer_listen import Listening, parse_listen, parse_peer
from nvflare_rdma.errors import RdmaError
from nvflare_rdma.version import __version__
from tests.support import namespaces
from tests.support.bench_links import Held, exchange_with
from tests.support.certificates import Authority
from tests.support.commands import error_of, told
from tests.support.kits import change
from tests.support.processes import SMALL, environment
from tests.support.waiting import PATIENCE, eventually

DEADLINE = 60.0 * PATIENCE


@dataclass
class Listener:
    """`doctor --listen` in a process of its own."""

    process: subprocess.Popen[str]
    first: str
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        found = re.search(r"listens at \S+:(\d+)", self.first)
        assert found, self.first
        return int(found[1])

    def says(self, text: str) -> None:
        """Wait until a line of its log has this: the peer may know earlier, and who is ended logs nothing more."""
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        try:
            while text not in (line := self.process.stderr.readline()):
                assert line, self.lines
                self.lines.append(line)
        finally:
            watchdog.cancel()

    def end(self) -> tuple[int, str]:
        """Its exit code and output."""
        self.process.terminate()
        out, err = self.process.communicate(timeout=DEADLINE)
        self.lines += err.splitlines()
        return self.process.returncode, out


CLI = ("-m", "nvflare_rdma.cli")
OTHER_RELEASE = (
    "-c",
    "import sys; from nvflare_rdma import version; version.__version__ = '99.0'\n"
    "from nvflare_rdma.cli import main; sys.exit(main(sys.argv[1:]))",
)


@contextlib.contextmanager
def listener(*options: str, program: tuple[str, str] = CLI, **extra: str) -> Iterator[Listener]:
    command = [sys.executable, *program, "doctor", "--listen", *options]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(**extra), cwd=SMALL, **pipes) as process:
        try:
            lines: list[str] = []
            while not lines or " listens at " not in lines[-1]:
                line = process.stderr.readline()
                assert line, lines
                lines.append(line)
            yield Listener(process, lines[-1], lines)
        finally:
            process.kill()


def check(capsys, *options) -> tuple[int, dict]:
    """What `doctor` says to a program."""
    return told(capsys, "doctor", *options)


def certify(kit: Path, authority: Authority, **how) -> None:
    """Give a kit another certificate."""
    role = "server" if (kit / "startup/fed_server.json").exists() else "client"
    for key, path in authority.issue(role, kit.name, **how).items():
        shutil.copy(path, kit / "startup" / ("rootCA.pem" if key == "ca_cert" else Path(path).name))


# -- what is found -----------------------------------------------------------------------------------------


def test_a_site_checks_its_way_to_the_server(provisioned, capsys):
    server, site = provisioned / "server", provisioned / "site-1"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        in_use = taken.getsockname()[1]
        change(server / "local/comm_config.json", rdma_data_ports=str(in_use))
        with listener("127.0.0.1:0", "--kit", str(server)) as there:
            code, answer = check(capsys, "--peer", f"localhost:{there.port}", "--kit", site)
            assert there.end()[0] == 0
    found = answer["data"]
    assert (code, found["problems"]) == (0, [])
    assert (found["secure"], found["site"], found["peer_site"]) == (True, "site-1", "server")
    assert found["fabric"] == "shm"
    assert found["passed_over"].startswith("verbs: ")
    for name in ("shm", "tcp"):  # the one that a job's link takes, and another that both have
        fabric = found["fabrics"][name]
        assert (fabric["usable"], fabric["reason"]) == (True, "")
        for way in ("to_peer", "from_peer"):
            assert fabric[way]["bytes_per_second"] > 0
            assert fabric[way]["moved_bytes"] < 300e6
    assert 0 < found["round_trip_seconds"] < DEADLINE
    assert found["versions"] == found["peer_versions"]
    ports = {port["port"]: (port["what"], port["open"], port["state"]) for port in found["ports"]}
    assert ports[there.port] == ("the check", True, "reached")
    assert ports[in_use] == ("rdma_data_ports", False, "reached")  # whoever has it
    assert ports[8002][:2] == ("FLARE", False)


def test_two_networks_with_and_without_a_firewall(provisioned, tmp_path):
    namespaces.require(
        "ip link add near type veth peer name far && ip rule add pref 50 ipproto tcp dport 1-2 blackhole"
    )
    kits = [str(provisioned / name) for name in ("server", "site-1")]
    results = namespaces.run_apart("doctor_apart.py", tmp_path, 120 * PATIENCE, *kits)
    clear, range_dropped, dropped = (results["peer"][key] for key in ("", "20003-20010", "8004"))
    found = json.loads(clear["out"])["data"]
    assert (clear["code"], found["problems"], found["fabric"]) == (0, [], "tcp")
    assert found["fabrics"]["tcp"]["usable"]
    assert {port["state"] for port in found["ports"] if port["open"]} == {"reached"}
    assert [port["port"] for port in found["ports"] if port["what"] == "rdma_data_ports"] == [*range(20000, 20011)]

    assert range_dropped["code"] == 1
    text = re.sub(r"\n {7,}(?=\S)", " ", range_dropped["out"])
    assert re.search(r"^  20000-20002 +reached: rdma_data_ports$", text, re.MULTILINE)
    assert re.search(r"^  20003-20010 +no answer: rdma_data_ports$", text, re.MULTILINE)
    assert "PROBLEM: TCP 20003-20010 of 10.9.0.1: no answer: a firewall drops what is sent there" in text
    assert re.search(r"^tcp +yes +\S+ .B/s", text, re.MULTILINE)

    assert dropped["code"] == 1
    first, hint, code = dropped["err"].splitlines()
    assert "10.9.0.1:8004: nothing answered within 5 s: a firewall drops it" in first
    assert (hint, code) == ("Hint: let TCP port 8004 of 10.9.0.1 pass, for this host", "Code: TIMED_OUT (exit 1)")

    assert results["listen"]["code"] == 0
    assert results["listen"]["out"].count("site-1 from 10.9.0.2:") == 2


def test_without_a_kit_both_sides_say_that_nobody_is_known(capsys):
    with listener("0", NVFLARE_RDMA_FABRICS="tcp") as there:
        assert "CLEAR: without certificates" in there.lines[0]
        assert f"this host listens at 127.0.0.1:{there.port}" in there.first  # where only this host gets
        assert main(["doctor", "--peer", f"127.0.0.1:{there.port}"]) == 0
        text = capsys.readouterr().out
        assert re.search(r"^shm +no +left out by rdma_fabrics of the peer$", text, re.MULTILINE)
        assert "CLEAR" in text
        assert "nothing is encrypted and nobody is known" in text
        code, out = there.end()
    assert (code, out.startswith("somebody from 127.0.0.1:")) == (0, True)


def test_two_sides_without_a_fabric_in_common(capsys, monkeypatch):
    with listener("0", NVFLARE_RDMA_FABRICS="tcp") as there:
        monkeypatch.setenv("NVFLARE_RDMA_FABRICS", "shm")
        code, message = error_of(*check(capsys, "--peer", f"127.0.0.1:{there.port}"))
    assert (code, "no fabric that both sides allow" in message) == ("NO_FABRIC", True)


def test_another_release_at_the_peer_is_told_with_the_fix(capsys):
    with listener("0", program=OTHER_RELEASE) as other:
        code, told = check(capsys, "--peer", f"127.0.0.1:{other.port}")
    (problem,) = told["data"]["problems"]
    assert code == 1
    assert problem == f"nvflare-rdma is {__version__} here and 99.0 there: install the same on both sides"


def test_who_listens_until_nobody_came_says_so(capsys):
    code, answer = check(capsys, "--listen", "0", "--timeout", "10ms")
    assert (code, answer["data"]["peers"]) == (1, [])


def test_who_is_ended_as_soon_as_he_says_that_he_listens_ends_as_later(monkeypatch):
    early = []

    class Ending(io.StringIO):
        def write(self, text):
            if " listens at " in text:
                signal.raise_signal(signal.SIGTERM)
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Ending())
    before = signal.signal(signal.SIGTERM, lambda number, frame: early.append(number))
    try:
        assert main(["doctor", "--listen", "0", "--timeout", f"{60 * PATIENCE}s"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not early


def test_addresses():
    assert parse_peer("host.example:8004") == ("host.example", 8004)
    assert parse_peer("[::1]:8004") == ("::1", 8004)
    assert parse_listen("8004") == ("", 8004)
    assert parse_listen("[::]:0") == ("::", 0)


# -- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "address"),
    [
        *(("--peer", bad) for bad in ("host", "host:", ":8004", "host:0", "host:65536", "host:x", "::1:8004")),
        *(("--listen", bad) for bad in ("host", "host:", "-1", "65536", "::1:8004", "a b")),
        *(("--timeout", bad) for bad in ("0s", "25h", "10")),
    ],
)
def test_what_is_no_address(capsys, option, address):
    others = ["--listen=0"] if option == "--timeout" else []
    code, message = error_of(*check(capsys, f"{option}={address}", *others))
    assert (code, option in message) == ("INVALID_INPUT", True)


def test_a_port_in_use_is_told_with_who_has_it(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = error_of(*check(capsys, "--listen", f"127.0.0.1:{port}"))
    assert code == "PORT_IN_USE"
    assert re.match(rf"port {port} is in use by \S.* \(process \d+\), so nothing can listen", message)


def test_nobody_listens(capsys):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    code, message = error_of(*check(capsys, "--peer", f"127.0.0.1:{port}"))
    assert (code, message.startswith(f"127.0.0.1:{port} refuses the connection")) == ("REFUSED", True)


def test_a_name_that_nobody_has(capsys):
    name = "x" * 64  # no name server is asked for it
    code, message = error_of(*check(capsys, "--peer", f"{name}:8004"))
    assert (code, f"the name '{name}' is unknown here" in message) == ("NAME_UNKNOWN", True)


@pytest.mark.parametrize("secure", [False, True])
def test_something_else_listens(provisioned, capsys, secure):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            sock, _ = other.accept()
            with sock:
                sock.recv(1)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        kit = ["--kit", provisioned / "site-1"] if secure else []
        code, message = error_of(*check(capsys, "--peer", f"127.0.0.1:{other.getsockname()[1]}", *kit))
    assert (code, "is reached" in message or "protocol" in message) == ("TLS_FAILED" if secure else "NOT_A_PEER", True)


def test_one_side_with_a_kit_and_the_other_without(provisioned, capsys):
    with listener("127.0.0.1:0", "--kit", str(provisioned / "server")) as there:
        code, message = error_of(*check(capsys, "--peer", f"127.0.0.1:{there.port}"))
        assert (code, "no link opens" in message) == ("NOT_A_PEER", True)
        there.says("it does not speak TLS, which this listener requires")
    with listener("0") as there:
        code, message = error_of(*check(capsys, "--peer", f"127.0.0.1:{there.port}", "--kit", provisioned / "site-1"))
        assert (code, "the connection ends before anything is agreed" in message) == ("NOT_A_PEER", True)


def test_a_certificate_of_another_project_is_refused_on_both_sides(provisioned, tmp_path, capsys):
    certify(provisioned / "site-1", Authority(tmp_path / "other", "other"))
    with listener("127.0.0.1:0", "--kit", str(provisioned / "server")) as there:
        code, message = error_of(*check(capsys, "--peer", f"127.0.0.1:{there.port}", "--kit", provisioned / "site-1"))
        assert code == "TLS_FAILED"
        assert "the server's certificate is not trusted here" in message
        assert "must come from the same provisioning" in message
        there.says("does not trust this side's certificate")


@pytest.mark.parametrize(
    ("age", "code", "says"),
    [(400, "CERTIFICATE_EXPIRED", "expired on 2"), (-2, "CERTIFICATE_NOT_YET_VALID", "before 2")],
)
@pytest.mark.parametrize("option", [["--peer", "127.0.0.1:8004"], ["--listen", "0"]])
def test_an_own_certificate_of_another_time_is_told_before_anything_is_tried(
    provisioned, tmp_path, capsys, age, code, says, option
):
    kit = provisioned / "site-1"
    certify(kit, Authority(tmp_path / "pki"), age=age)
    found, message = error_of(*check(capsys, *option, "--kit", kit))
    assert (found, f"{kit}/startup/client.crt, the certificate of 'site-1'," in message) == (code, True)
    assert says in message


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda kit: shutil.rmtree(kit / "local"), "HALF_A_KIT"),
        (lambda kit: shutil.rmtree(kit), "NO_SUCH_TARGET"),
        (lambda kit: (kit / "startup/client.key").unlink(), "NO_CERTIFICATE"),
        (lambda kit: (kit / "startup/client.crt").write_text("nothing"), "NO_CERTIFICATE"),
        (lambda kit: (kit / "startup/rootCA.pem").write_text("nothing"), "NO_CERTIFICATE"),
        (lambda kit: (kit / "local/comm_config.json").write_text("{"), "INVALID_INPUT"),
        (lambda kit: change(kit / "local/comm_config.json", rdma_rails=1000), "INVALID_INPUT"),
    ],
    ids=["half", "gone", "no key", "no certificate", "no root", "no JSON", "bad setting"],
)
def test_a_kit_that_cannot_be_used(provisioned, capsys, spoil, code):
    kit = provisioned / "site-1"
    spoil(kit)
    found, message = error_of(*check(capsys, "--peer", "127.0.0.1:8004", "--kit", kit))
    assert (found, str(kit) in message or "rdma_rails" in message or "comm_config" in message) == (code, True)


def test_several_kits_are_not_one(provisioned, capsys):
    code, message = error_of(*check(capsys, "--listen", "0", "--kit", provisioned))
    assert (code, "several kits: " in message) == ("NO_KIT", True)


# -- what a peer may ask for -------------------------------------------------------------------------------


def insist(exchange: Exchange, *questions: dict) -> None:
    for question in questions:
        exchange.ask(**question)
    exchange.ask("ping")


@pytest.mark.parametrize(
    "question",
    [
        {"what": "receive", "labels": [1], "bytes": MOST_BYTES + 1},
        {"what": "receive", "labels": [*range(1, MOST_AT_ONCE + 2)], "bytes": 1},
        {"what": "send", "labels": [1, 1], "bytes": 1},
        {"what": "send", "labels": [0], "bytes": 1},
        {"what": "send", "labels": [1], "bytes": 0},
        {"what": "send", "labels": [1.5], "bytes": 1},
        {"what": "leave"},
    ],
    ids=str,
)
def test_who_asks_for_too_much_loses_its_link_and_nobody_else_does(question):
    side = this_side(None)
    with Listening(side, "127.0.0.1", 0) as listening:
        with exchange_with(listening, side) as greedy:
            with pytest.raises((RdmaError, OSError)):
                insist(greedy, question)
            eventually(lambda: not greedy.link.usable)
        with exchange_with(listening, side) as other:
            assert other.ask("ping") == {}
    assert len(listening.served) == 2
    assert "it asks for" in listening.served[0]["failure"]


def test_what_is_asked_for_and_never_sent_is_not_asked_for_again_and_again():
    side = this_side(None)
    with Listening(side, "127.0.0.1", 0) as listening, exchange_with(listening, side) as greedy:
        with pytest.raises((RdmaError, OSError)):
            insist(greedy, *({"what": "receive", "labels": [2 * n + 1, 2 * n + 2], "bytes": 1} for n in range(10)))
        eventually(lambda: not greedy.link.usable)
        assert "before those that it has asked for are over" in greedy.link.failure


def test_a_message_that_breaks_off_ends_its_link():
    """Where it was to land may still be written, so it would take more memory for each."""
    side = this_side(None)
    with Listening(side, "127.0.0.1", 0) as listening, exchange_with(listening, side) as greedy:
        greedy.ask("receive", labels=[1], bytes=4)
        held = Held(4)
        sending = greedy.link.offer(held, 1)
        try:
            assert held.begun.wait(DEADLINE)  # the grant is here, and is not answered
            greedy.link.withdraw(sending, "given up")
            eventually(lambda: not greedy.link.usable)
            assert "a message of the check has broken off: given up" in greedy.link.failure
        finally:
            held.go_on.set()


@pytest.fixture
def without_place(monkeypatch):
    """A listener all of whose places are taken, and its side."""
    monkeypatch.setattr(peer_listen, "_WAIT_SECONDS", 0.1)
    monkeypatch.setenv("NVFLARE_RDMA_FABRICS", "tcp")
    side = this_side(None)
    with Listening(side, "127.0.0.1", 0) as listening, contextlib.ExitStack() as held:
        for _ in range(4):
            assert "versions" in held.enter_context(exchange_with(listening, side)).ask("about")
        yield listening, side


def test_a_listener_that_has_no_place_left_says_so(without_place, capsys):
    listening, _ = without_place
    assert main(["doctor", "--peer", f"127.0.0.1:{listening.port}"]) != 0
    assert "can't be checked now: 4 checks are going on there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "question",
    [
        {"what": "receive", "labels": [1], "bytes": 4},
        {"what": "send", "labels": [1], "bytes": 4},
        {"what": "ping"},
    ],
    ids=str,
)
def test_who_was_told_that_there_is_no_place_gets_nothing_else(without_place, question):
    with exchange_with(*without_place) as fifth:
        assert "busy" in fifth.ask("about")
        with pytest.raises((RdmaError, OSError)):
            fifth.ask(**question)
        eventually(lambda: not fifth.link.usable)
        assert "it was told that there is none now" in fifth.link.failure


def test_so_many_links_wait_for_a_place_and_others_are_closed(monkeypatch):
    monkeypatch.setattr(peer_listen, "_MOST_WAITING", 1, raising=False)
    monkeypatch.setattr(peer_listen, "_WAIT_SECONDS", DEADLINE)
    monkeypatch.setenv("NVFLARE_RDMA_FABRICS", "tcp")
    side = this_side(None)
    with Listening(side, "127.0.0.1", 0) as listening, contextlib.ExitStack() as held:
        for _ in range(4):
            assert "versions" in held.enter_context(exchange_with(listening, side)).ask("about")
        waits, other = (held.enter_context(exchange_with(listening, side)) for _ in range(2))
        eventually(lambda: not (waits.link.usable and other.link.usable), 10.0 * PATIENCE)
        assert waits.link.usable or other.link.usable


def test_checks_at_once_do_not_land_in_each_others_memory():
    side = this_side(None)
    with (
        Listening(side, "127.0.0.1", 0) as listening,
        exchange_with(listening, side) as one,
        exchange_with(listening, side) as other,
    ):
        for each in (one, other):
            each._expect([101, 102], item_of(1000, ""))
        places = [each._place(label, lambda: None).buffer for each in (one, other) for label in (101, 102)]
    for i, place in enumerate(places):
        place[:] = bytes([i]) * 1000
    assert [bytes(place) for place in places] == [bytes([i]) * 1000 for i in range(4)]


class Liar(Listening):
    """Says of itself what a check does not expect."""

    def _about(self, link):
        return self.lie


@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"versions": [], "order": 5, "fabrics": [], "ports": 1, "passed_over": {}, "data_ports": None},
        {"versions": {"\x1b[2J": "\x1b[2J", "x": 5}, "ports": [5, {"port": 70000, "what": "", "open": True}]},
        {"ports": [{"port": 1, "what": "\x1b[2J", "open": True}] * 1000, "passed_over": "\x1b[2J" * 10_000},
    ],
    ids=["nothing", "other types", "orders to the terminal", "much"],
)
def test_what_a_peer_says_is_taken_for_what_it_is(lie, capsys, monkeypatch):
    monkeypatch.setenv("NVFLARE_RDMA_FABRICS", "tcp")
    monkeypatch.setattr(peer_link, "_BUDGET_SECONDS", 0.0)  # for a test's sake
    side = this_side(None)
    with Liar(side, "127.0.0.1", 0) as liar:
        liar.lie = lie
        assert main(["doctor", "--peer", f"127.0.0.1:{liar.port}"]) == 1  # it has another version, if any
        text = capsys.readouterr().out
        assert "\x1b" not in text
        assert len(text) < 10_000
