"""How a receiver's half of a stream ends."""

from __future__ import annotations

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from nvflare.apis.shareable import ReturnCode, make_reply

from nvflare_rdma.errors import TransferError
from nvflare_rdma.streaming.streams import containers, receiver, sender
from nvflare_rdma.streaming.streams.messages import KEY, Said
from nvflare_rdma.streaming.streams.receiver import Receiving, _Consumer
from nvflare_rdma.transfer.waiting import PLACES, STREAMS, stream_places, waiting_places
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

START = {"do": "start", "stream": "x", "timeout": 12.0}


class _Quick(Receiving):
    kind, size = "file", (1, 1)

    def run(self, channels, peer, ask, aborted, meter):
        pass

    def finish(self, stream_ctx):
        stream_ctx["finished"] = True

    def may_fall_back(self, error):
        return True


class Stream:
    """A `_Consumer`, and how it has ended by itself."""

    def __init__(self, receiving: Receiving | None = None, peer: str = "server") -> None:
        self.peer = peer
        self.over = threading.Event()
        self.codes: list[str] = []
        self.context = {"__END_STREAM__": None}
        self.context[receiver.StreamContextKey.END_STREAM] = self._end
        self.consumer = _Consumer(self.context, lambda context, site, sender_site: receiving or _Quick())
        cell = types.SimpleNamespace(get_fqcn=lambda: "site-1")
        self.fl_ctx = types.SimpleNamespace(
            get_engine=lambda: types.SimpleNamespace(get_cell=lambda: cell),
            get_identity_name=lambda: "site-1",
            get_run_abort_signal=lambda: None,
        )

    def _end(self, code, fl_ctx) -> None:
        self.codes.append(code)
        self.finalize(code)
        self.over.set()

    def finalize(self, code) -> None:
        self.context[receiver.StreamContextKey.RC] = code
        self.consumer.finalize(self.context, self.fl_ctx)

    def say(self, message: dict):
        return self.consumer.consume({KEY: Said(message, self.peer)}, self.context, self.fl_ctx)

    def wait(self) -> str:
        while (state := self.say({"do": "wait"})[1][KEY]["state"]) == "running":
            pass
        return state


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(receiver, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(receiver, "_LOOK_SECONDS", 0.01)
    return now


@pytest.fixture(autouse=True)
def places(monkeypatch):
    found = types.SimpleNamespace(budget=types.SimpleNamespace(watch=lambda: None))
    links = types.SimpleNamespace(of=lambda cell: found)
    places = {"waiting_places": waiting_places(), "stream_places": stream_places()}
    ours = types.SimpleNamespace(links=links, ledger=None, **places)
    monkeypatch.setattr(receiver, "shared", lambda: ours)
    monkeypatch.setattr(receiver, "name_in_certificate", lambda cell, peer: peer)
    return ours.waiting_places


@pytest.mark.parametrize(("timeout", "patience"), [(12.0, 120), (100, 400)])
def test_it_waits_as_long_as_its_sender_lives(timeout, patience, clock):
    stream = Stream()
    stream.say({**START, "timeout": timeout})
    assert stream.wait() == "done"
    for _ in range(3):  # another target is slow
        clock[0] += patience
        assert not stream.over.wait(0.05)
        assert stream.wait() == "done"
    clock[0] += patience + 1
    assert stream.over.wait(DEADLINE)
    assert stream.codes == ["OK"]
    assert stream.context["finished"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("code", "undone"), [("OK", 0), ("TASK_ABORTED", 1)])
def test_what_came_goes_if_its_stream_fails(code, undone, late, monkeypatch):
    monkeypatch.setattr(receiver, "TURN_SECONDS", 0.01)  # what finalize waits is not enough
    going, calls = threading.Event(), []
    receiving = _Quick()
    receiving.run = lambda *args: going.wait(DEADLINE)
    receiving.undo = lambda: calls.append(1)
    stream = Stream(receiving)
    stream.say(START)
    if not late:
        going.set()
        stream.wait()
    stream.finalize(code)
    going.set()
    stream.consumer._thread.join(DEADLINE)
    assert len(calls) == undone


def test_only_so_many_streams_of_a_site_are_received_at_once():
    going, receiving = threading.Event(), _Quick()
    receiving.run = lambda *args: going.wait(DEADLINE)
    streams = [Stream(receiving, f"site-2.job-{n}") for n in range(STREAMS)]
    for stream in streams:
        stream.say(START)
    late, other = Stream(receiving, "site-2.late"), Stream(receiving, "site-3")
    late.say(START)
    other.say(START)
    assert (late.consumer._state, late.consumer._thread) == (receiver.FALLBACK, None)
    assert late.consumer._reason == "too many streams of this site are being received"
    assert other.consumer._thread is not None
    going.set()
    for stream in (*streams, other):
        assert stream.wait() == "done"
        stream.finalize("OK")
        stream.consumer._thread.join(DEADLINE)
    again = Stream(receiving, "site-2.late")
    again.say(START)
    assert again.wait() == "done"
    again.finalize("OK")


def test_one_site_holds_no_more_than_its_places(places, monkeypatch):
    monkeypatch.setattr(receiver, "TURN_SECONDS", 10 * DEADLINE)
    going, receiving = threading.Event(), _Quick()
    receiving.run = lambda *args: going.wait(DEADLINE)
    streams = [Stream(receiving, f"site-2.job-{n}") for n in range(PLACES + 3)]
    for stream in streams:
        stream.say(START)
    wait = {"do": "wait"}
    with ThreadPoolExecutor(PLACES + 1) as pool:
        held = [pool.submit(stream.say, wait) for stream in streams[:PLACES]]
        eventually(lambda: places._taken["site-2"] == PLACES, DEADLINE)
        for stream in streams[PLACES:]:  # these come back at once
            assert stream.say(wait)[1][KEY]["state"] == "running"
            stream.finalize("TASK_ABORTED")
        other = Stream(receiving, "site-3")
        other.say(START)
        answer = pool.submit(other.say, wait)
        eventually(lambda: places._taken["site-3"] == 1, DEADLINE)
        going.set()
        assert {future.result(DEADLINE)[1][KEY]["state"] for future in [*held, answer]} == {"done"}
    for stream in (*streams[:PLACES], other):
        stream.finalize("OK")
    assert not places._taken


def test_a_sender_that_is_answered_at_once_asks_no_more_often(monkeypatch):
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(sender, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    abort = types.SimpleNamespace(triggered=False)
    fl_ctx = types.SimpleNamespace(get_run_abort_signal=lambda: abort)
    streamed = types.SimpleNamespace(more=lambda: iter(()), broken="")
    asks = sender._Announcements(streamed, START, ["site-1"], 1.0)
    running = make_reply(ReturnCode.OK)
    running[KEY] = {"state": "running", "reason": ""}
    asked = []
    for _ in range(20):
        message, _ = asks.produce({}, fl_ctx)
        asked.append(message[KEY].words["do"])
        assert asks.process_replies({"site-1": running}, {}, fl_ctx) is None
    assert asked == ["start"] + ["wait"] * 19
    assert now[0] - 100.0 == pytest.approx(18 * sender._PACE_SECONDS)
    abort.triggered = True  # is not waited for
    before = now[0]
    asks.produce({}, fl_ctx)
    assert now[0] == before


@pytest.mark.parametrize("timeout", [None, 0, -1, "5", float("nan"), float("inf"), True])
def test_timeouts_that_lie(timeout):
    with pytest.raises(TransferError, match="a stream begins with a timeout"):
        Stream().say({**START, "timeout": timeout})


def test_whatever_breaks_it_is_told(monkeypatch):
    def broken(*args):
        raise RuntimeError("no meter")

    monkeypatch.setattr(receiver, "Meter", broken)
    stream = Stream()
    stream.say(START)
    assert stream.wait() == "failed"
    stream.finalize("EXECUTION_EXCEPTION")


def test_only_entries_of_known_size_share_a_message():
    arrays = {"a": np.zeros(10)}
    entries = [("a", 1), ("b", "x"), ("c", arrays), ("d", arrays), ("e", 2.0), ("f", np.float32(1)), ((1, 2), 3)]
    assert containers._batches(entries, set(), True) == [[0, 1], [2], [3], [4, 5], [6]]
    assert containers._batches([value for _, value in entries], {0}, False) == [[1], [2], [3], [4, 5, 6]]


def test_a_receiver_out_of_reach_is_waited_for_as_long_as_transfers_are():
    lost = {"site-1": make_reply(ReturnCode.COMMUNICATION_ERROR)}

    def state_after(patience, messages, replies):
        announcements = sender._Announcements(sender.StreamedObject(), {}, ["site-1"], 1.0, patience)
        for _ in range(messages):
            announcements.process_replies(replies, {}, None)
        return announcements.states["site-1"]

    assert state_after(0.0, 2, lost) == "running"
    assert state_after(0.0, 3, lost) == "failed"
    assert state_after(3600.0, 30, lost) == "running"
    assert state_after(3600.0, 1, {"site-1": make_reply(ReturnCode.EXECUTION_EXCEPTION)}) == "failed"
