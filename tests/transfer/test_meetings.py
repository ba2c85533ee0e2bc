"""How a process asks parents for routes: once, and without holding up others."""

from __future__ import annotations

import threading

import pytest

from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.transfer.addresses import Reach
from nvflare_rdma.transfer.meetings import Meetings
from tests.support.tcp_pair import DEADLINE


class Parent:
    """Answers when it is told to, that it joins nothing."""

    def __init__(self) -> None:
        self.asked, self.answers = threading.Semaphore(0), threading.Event()
        self.count = 0

    def ask(self, parent: str):
        self.count += 1
        self.asked.release()
        assert self.answers.wait(DEADLINE)
        raise FabricUnavailable(f"{parent} joins nothing")


def no_door(listener, name):
    raise AssertionError("there is no route")


def in_thread(work):
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(work()), daemon=True)
    thread.start()
    return thread, ended


def test_a_parent_that_takes_its_time_is_asked_once_and_holds_up_no_end():
    parent = Parent()
    meetings = Meetings("site-1.job", parent.ask, no_door, lambda: Reach.WORLD)
    threads = [in_thread(lambda: meetings.ways_for("server.job")) for _ in range(3)]
    assert parent.asked.acquire(timeout=DEADLINE)
    closer, _ = in_thread(meetings.close)
    closer.join(DEADLINE)
    assert not closer.is_alive()
    parent.answers.set()
    for thread, ended in threads:
        thread.join(DEADLINE)
        ways, reasons = ended[0]
        assert ways == []
        assert reasons in ("site-1 joins nothing", "site-1.job is ending")
    assert parent.count == 1


def test_a_parent_that_joins_nothing_is_left_alone_for_a_while():
    parent = Parent()
    parent.answers.set()
    meetings = Meetings("site-1.job", parent.ask, no_door, lambda: Reach.WORLD)
    for _ in range(2):
        with pytest.raises(FabricUnavailable, match="site-1 joins nothing"):
            meetings.place_at("site-1")
    assert parent.count == 1
