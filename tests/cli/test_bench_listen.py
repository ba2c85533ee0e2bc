"""The command `bench`: what a peer may ask of one that listens."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from nvflare_rdma.channel import ControlStream
from nvflare_rdma.cli import main
from nvflare_rdma.cli.bench_link import LEAST_CHUNK, MOST_CHUNK, BenchExchange, bounds_of
from nvflare_rdma.cli.bench_listen import BenchListening
from nvflare_rdma.cli.bench_raw import MAGIC, MOST_CONNECTIONS, RawPeer
from nvflare_rdma.cli.bench_report import MIB
from nvflare_rdma.cli.peer_bodies import Room, item_of
from nvflare_rdma.cli.peer_kit import this_side
from nvflare_rdma.cli.peer_link import Exchange, context_for
from nvflare_rdma.errors import RdmaError
from nvflare_rdma.fabric import TICKET_BYTES
from nvflare_rdma.settings import Settings
from tests.support.bench_links import DEADLINE, RUN, Held, link_to, measured
from tests.support.commands import error_of
from tests.support.waiting import PATIENCE, eventually

# -- what a peer may ask for -------------------------------------------------------------------------------


def insist(exchange: BenchExchange, question: dict) -> None:
    exchange.ask(**question)
    exchange.ask("ping")


MOST = bounds_of(Settings()).message_bytes


@pytest.mark.parametrize(
    "question",
    [
        {"what": "receive", "labels": [1], "bytes": MOST + 1},
        {"what": "send", "labels": [*range(1, 300)], "bytes": 1},
        {"what": "send", "labels": [1], "bytes": 4, "codec": "zip"},
        {"what": "send", "labels": [1], "bytes": 4, "codec": ["int8"]},
        {"what": "send", "labels": [1], "bytes": 3, "codec": "int8"},
        {"what": "use", "chunk": LEAST_CHUNK - 1},
        {"what": "use", "chunk": MOST_CHUNK + 1},
        {"what": "use", "chunk": "1"},
        {"what": "leave"},
    ],
    ids=str,
)
def test_who_asks_for_too_much_loses_its_link_and_nobody_else_does(side, question):
    with BenchListening(side, "127.0.0.1", 0) as listening:
        with link_to(listening, side) as greedy:
            greedy.ask("about", run=RUN)
            with pytest.raises((RdmaError, OSError)):
                insist(greedy, question)
            eventually(lambda: not greedy.link.usable)
        eventually(lambda: listening.served)
        assert "it asks for" in listening.served[0]["failure"]
        with link_to(listening, side) as other:
            assert "bench" in other.ask("about", run=RUN[::-1])


@pytest.mark.parametrize("run", [None, 5, "", "x" * 1000])
def test_who_does_not_say_of_which_run_it_is_gets_nothing(side, run):
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as nameless:
        with pytest.raises((RdmaError, OSError)):
            nameless.ask("about", run=run)
        eventually(lambda: listening.served)
        assert "it does not say of which run it is" in listening.served[0]["failure"]


def test_before_that_nothing_is_answered(side):
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as hasty:
        with pytest.raises((RdmaError, OSError)):
            hasty.ask("used")
        eventually(lambda: listening.served)
        assert "before it has said of which run it is" in listening.served[0]["failure"]


def test_one_run_at_a_time_and_as_many_as_were_asked_for(side, capsys):
    with BenchListening(side, "127.0.0.1", 0, runs=1) as listening:
        with link_to(listening, side) as first, link_to(listening, side) as other:
            first.ask("about", run=RUN)
            assert other.ask("about", run=RUN[::-1]) == {"busy": "another run is going on there"}
            assert main(["bench", "--connect", f"127.0.0.1:{listening.port}", "--fabrics", "tcp"]) == 1
            assert "another run is going on there" in capsys.readouterr().err
            first.move(False, 4096)
        assert listening.over.wait(DEADLINE)
        with link_to(listening, side) as late:
            assert late.ask("about", run=RUN) == {"busy": "it has had as many runs as it was to have"}


def test_a_bench_of_its_own_process_is_for_nobody_else(side):
    with BenchListening(side, "127.0.0.1", 0, only=RUN) as listening, link_to(listening, side) as other:
        assert other.ask("about", run=RUN[::-1]) == {"busy": "it is there for its own process only"}


def test_what_waits_for_memory_comes_when_there_is_some(side):
    """More messages at once than there are places."""
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as one:
        one.ask("about", run=RUN)
        count = 3 * one.bounds.at_once
        labels = [*range(1, count + 1)]
        one.ask("receive", labels=labels, bytes=256 * 1024)
        for each in [one._offer(label, 256 * 1024, "") for label in labels]:
            each.wait(DEADLINE)
    eventually(lambda: listening.served)
    assert listening.served[0]["received_bytes"] == count * 256 * 1024


def test_all_links_of_a_run_have_the_memory_of_one(side):
    nbytes = 256 * 1024
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as greedy:
        greedy.ask("about", run=RUN)
        labels = [*range(1, greedy.bounds.at_once + 1)]
        greedy.ask("receive", labels=labels, bytes=nbytes)
        held = [Held(nbytes) for _ in labels]
        sending = [greedy.link.offer(each, label) for each, label in zip(held, labels, strict=True)]
        with link_to(listening, side) as other:
            other.ask("about", run=RUN)
            eventually(lambda: listening._room.is_full)
            other.ask("receive", labels=[1], bytes=nbytes)
            late = other._offer(1, nbytes, "")
            other.ask("ping")
            assert not late.ended
            for each in held:
                each.go_on.set()
            late.wait(DEADLINE)
        for each in sending:
            each.wait(DEADLINE)


def test_a_link_that_has_ended_gives_back_its_memory(side):
    nbytes = 256 * 1024
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as lead:
        lead.ask("about", run=RUN)
        with link_to(listening, side) as broken:
            broken.ask("about", run=RUN)
            labels = [*range(1, broken.bounds.at_once + 3)]  # and two that wait
            broken.ask("receive", labels=labels, bytes=nbytes)
            held = [Held(nbytes) for _ in labels]
            for each, label in zip(held, labels, strict=True):
                broken.link.offer(each, label)
            eventually(lambda: listening._room.is_full)
        for each in held:
            each.go_on.set()
        assert lead.move(True, 2 * lead.bounds.at_once * nbytes, most_seconds=10.0 * PATIENCE) > 0


def test_a_place_that_is_lost_counts_until_its_link_is_over(side):
    """Else a peer whose messages break off has memory without end: where they were to land, it may still write."""
    room, later = Room(4, 1), threading.Event()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = Exchange(ControlStream(ours), {}, context_for(side.runtime.context, ("tcp",)), "made", lambda link: {})
        made.room = room
        made._expect([1], item_of(4, ""))
        made._place(1, lambda: None).failed("it was withdrawn")
        assert "it was withdrawn" in made.link.failure
        assert room.take(later.set) is None
        made.receive()
        assert later.is_set()
        assert (room.take(lambda: None) is None, room.is_full) == (False, True)


def test_runs_that_follow_each_other_have_the_memory_of_one(side):
    with BenchListening(side, "127.0.0.1", 0) as listening:
        rooms = []
        for run in (RUN, RUN[::-1]):
            with link_to(listening, side) as one:
                one.ask("about", run=run)
                rooms += [member.room for member in listening._present.members]
            eventually(lambda: listening._present is None)
        assert len(rooms) == 2
        assert rooms[0] is rooms[1]


def test_who_waits_for_memory_is_asked_after_one_that_has_gone():
    room, got = Room(4, 1), []
    place = room.take(lambda: None)
    assert room.take(lambda: None) is None  # has gone when there is some
    assert room.take(lambda: got.append(room.take(lambda: None))) is None
    room.give_back(place)
    assert got == [place]


def test_a_run_takes_all_its_links_with_it(side):
    with BenchListening(side, "127.0.0.1", 0) as listening, contextlib.ExitStack() as links:
        with link_to(listening, side) as lead:
            lead.ask("about", run=RUN)
            other = links.enter_context(link_to(listening, side))
            other.ask("about", run=RUN)
        eventually(lambda: not other.link.usable, 10.0 * PATIENCE)
        with link_to(listening, side) as honest:
            assert "bench" in honest.ask("about", run=RUN)


def test_a_run_that_does_not_go_on_is_ended(side, monkeypatch):
    monkeypatch.setattr("nvflare_rdma.cli.bench_listen._IDLE_SECONDS", 2.0 * PATIENCE, raising=False)
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as silent:
        silent.ask("about", run=RUN)
        eventually(lambda: not silent.link.usable, 10.0 * PATIENCE)
        with link_to(listening, side) as other:
            assert "bench" in other.ask("about", run=RUN[::-1])


def test_a_run_that_goes_on_is_not_ended(side, monkeypatch):
    idle = 2.5 * PATIENCE
    monkeypatch.setattr("nvflare_rdma.cli.bench_listen._IDLE_SECONDS", idle, raising=False)
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as slow:
        slow.ask("about", run=RUN)
        ending = time.monotonic() + 1.2 * idle
        while time.monotonic() < ending:
            slow.move(False, 4096)
        assert slow.ask("ping") == {}


def test_who_is_told_that_it_is_busy_has_no_place(side):
    with BenchListening(side, "127.0.0.1", 0) as listening, contextlib.ExitStack() as links:
        lead, *others = (links.enter_context(link_to(listening, side)) for _ in range(6))
        lead.ask("about", run=RUN)
        for each in others:
            assert each.ask("about", run=RUN[::-1]) == {"busy": "another run is going on there"}
        second = links.enter_context(link_to(listening, side))
        assert "bench" in second.ask("about", run=RUN)


def test_a_run_has_so_many_links(side):
    with BenchListening(side, "127.0.0.1", 0) as listening, contextlib.ExitStack() as links:
        five = [links.enter_context(link_to(listening, side)) for _ in range(5)]
        told = [each.ask("about", run=RUN) for each in five]
        assert ["bench" in each for each in told] == [True] * 4 + [False]
        assert told[4] == {"busy": "this run has 4 links already, which is the most"}


def test_so_many_links_wait(side, monkeypatch):
    monkeypatch.setattr("nvflare_rdma.cli.peer_listen._MOST_WAITING", 1, raising=False)
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as silent:
        eventually(lambda: listening._waiting._value == 0)  # its link is open before it has the one place
        with link_to(listening, side) as other:
            eventually(lambda: not other.link.usable, 10.0 * PATIENCE)
        silent.ask("about", run=RUN)
        with link_to(listening, side) as third:
            assert "bench" in third.ask("about", run=RUN)


def test_nothing_waits_for_a_link_that_has_ended(side, monkeypatch):
    monkeypatch.setattr("nvflare_rdma.cli.bench_listen._JOIN_SECONDS", 1234.0)
    with BenchListening(side, "127.0.0.1", 0) as listening:
        with link_to(listening, side) as one:
            one.ask("about", run=RUN)
        timers = (each for each in threading.enumerate() if isinstance(each, threading.Timer))
        eventually(lambda: listening.served)
        for each in [each for each in timers if each.interval == 1234.0]:
            each.join(10.0 * PATIENCE)
            assert not each.is_alive()


def test_a_run_that_has_moved_nothing_does_not_count(side):
    with BenchListening(side, "127.0.0.1", 0, runs=1) as listening:
        for moves in (False, True):
            with link_to(listening, side) as one:
                one.ask("about", run=RUN)
                if moves:
                    one.move(False, 4096)
            eventually(lambda: listening._present is None)
            assert (listening.over.is_set(), listening.was_of_use) == (moves, moves)


# -- plain connections -------------------------------------------------------------------------------------


def plain(port: int, *data: bytes) -> bytes:
    """What a stranger gets."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as sock:
        for each in data:
            sock.sendall(each)
        with contextlib.suppress(ConnectionError):
            return sock.recv(1)
    return b""


def test_a_plain_connection_needs_a_ticket_which_works_once(side):
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as one:
        one.ask("about", run=RUN)
        question = b"\x00" + (1000).to_bytes(8, "big")
        assert plain(listening.port, MAGIC, bytes(TICKET_BYTES), question) == b""
        ticket = bytes.fromhex(one.ask("raw")["ticket"])
        assert plain(listening.port, MAGIC, ticket, question) != b""
        assert plain(listening.port, MAGIC, ticket, question) == b""


def test_with_certificates_it_needs_one_as_well(provisioned):
    server = this_side(provisioned / "server")
    with BenchListening(server, "127.0.0.1", 0) as listening:
        assert plain(listening.port, MAGIC, bytes(TICKET_BYTES), b"\x00" + (1000).to_bytes(8, "big")) == b""


def test_plain_connections_have_bounds(side):
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as one:
        one.ask("about", run=RUN)
        address = ("127.0.0.1", listening.port)
        raw = RawPeer(address, [one.ask("raw")["ticket"]])
        with contextlib.closing(raw):
            assert raw.move(True, MIB, DEADLINE) > 0
            assert raw.move(False, MIB, DEADLINE) > 0
            with pytest.raises((RdmaError, OSError)):
                raw.move(False, 1 << 50, DEADLINE)
        eventually(lambda: not listening._raw._open)
        for _ in range(MOST_CONNECTIONS):
            one.ask("raw")
        assert one.ask("raw") == {"busy": "there are as many plain connections as there may be"}
        assert one.ask("ping") == {}


def test_a_ticket_that_is_none_leaves_no_connection_open():
    with socket.create_server(("127.0.0.1", 0)) as there:
        with pytest.raises(ValueError, match="hex") as found:
            RawPeer(there.getsockname()[:2], ["no ticket"])
        sock, _ = there.accept()
        with sock:
            sock.settimeout(10.0 * PATIENCE)
            assert sock.recv(1) == b"", found


def test_a_plain_peer_that_stops_is_given_up(side):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        raw = RawPeer(silent.getsockname()[:2], ["00" * TICKET_BYTES])
        with contextlib.closing(raw), pytest.raises((RdmaError, OSError)):
            raw.move(False, MIB, 0.2)


def test_who_says_nothing_has_no_link_for_long(side, monkeypatch):
    monkeypatch.setattr("nvflare_rdma.cli.bench_listen._JOIN_SECONDS", 0.1)
    with BenchListening(side, "127.0.0.1", 0) as listening, link_to(listening, side) as silent:
        eventually(lambda: not silent.link.usable)
        assert not listening.over.is_set()


def test_a_picture_goes_where_it_can(capsys, tmp_path):
    folder = tmp_path / "x.svg"
    folder.mkdir()
    assert error_of(*measured(capsys, "--plot", folder))[0] == "INVALID_INPUT"
    assert Path(folder).is_dir()
