"""How a receiver's half of a stream ends."""

from __future__ import annotations

import threading
import types

import numpy as np
import pytest

from nvflare_rdma.errors import TransferError
from nvflare_rdma.streaming.streams import containers, receiver
from nvflare_rdma.streaming.streams.messages import KEY, Said
from nvflare_rdma.streaming.streams.receiver import Receiving, _Consumer
from tests.support.tcp_pair import DEADLINE

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
def channels(monkeypatch):
    found = types.SimpleNamespace(budget=types.SimpleNamespace(watch=lambda: None))
    links = types.SimpleNamespace(of=lambda cell: found)
    ours = types.SimpleNamespace(links=links, ledger=None)
    monkeypatch.setattr(receiver, "shared", lambda: ours)
    monkeypatch.setattr(receiver, "site_of", lambda cell, peer: peer)


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
