"""How many threads may wait for one site."""

from __future__ import annotations

import contextlib
import logging
import types

from nvflare_rdma.transfer import waiting
from nvflare_rdma.transfer.waiting import PLACES, waiting_places
from tests.support.tcp_pair import in_parallel


def test_each_site_has_its_own_places():
    places = waiting_places()
    with contextlib.ExitStack() as stack:
        for n in range(PLACES):
            assert stack.enter_context(places.place(f"site-1.job-{n}"))
        assert not stack.enter_context(places.place("site-1"))
        assert not stack.enter_context(places.place("site-1.job-9.trainer"))
        assert stack.enter_context(places.place("site-2.job-1"))
    assert not places._taken


def test_a_place_comes_free_whatever_ends_it():
    places = waiting_places()
    for _ in range(3 * PLACES):
        with contextlib.suppress(ZeroDivisionError), places.place("site-1") as free:
            assert free
            raise ZeroDivisionError
    assert not places._taken


def test_one_without_a_place_frees_none():
    places = waiting_places()
    with contextlib.ExitStack() as stack:
        for _ in range(PLACES):
            stack.enter_context(places.place("site-1"))
        for _ in range(5):
            with places.place("site-1") as free:
                assert not free


def test_many_threads_never_have_more_than_there_are():
    places, held, most = waiting_places(), [], []

    def take() -> None:
        for _ in range(500):
            with places.place("site-1") as free:
                if free:
                    held.append(1)
                    most.append(len(held))
                    held.pop()

    in_parallel(*[take] * 8)
    assert 0 < max(most) <= PLACES
    assert not places._taken


def test_the_log_says_once_in_a_while_that_a_site_has_none_left(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(waiting, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    caplog.set_level(logging.INFO, "nvflare_rdma.transfer.waiting")
    places = waiting_places()

    def ask(site: str) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(PLACES + 3):
                stack.enter_context(places.place(site))

    for site in ("a.b", "a", "c\n"):
        now[0] += 1
        ask(site)
    assert [line.split("wait here for ")[1].split(",")[0] for line in caplog.messages] == ["'a'", "'c\\n'"]
    now[0] += waiting._SAY_AGAIN_SECONDS + 5
    ask("a")
    assert len(caplog.messages) == 3
    assert set(places._said) == {"a"}
