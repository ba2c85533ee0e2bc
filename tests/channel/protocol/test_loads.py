"""Chunks go over the rail that will have delivered them soonest."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.channel.protocol.loads import RailLoads

CHUNK = 64 * 1024


def deliver(
    loads: RailLoads, paces: list[float], chunks: int, window: int, start: float = 0.0
) -> tuple[float, list[int]]:
    """Rails take `paces` seconds for a chunk, and their round trip is 40 ms: how long it takes until all have landed,
    and how many went over each. No more than `window` chunks are on their way at once."""
    free, counts = [start] * len(paces), [0] * len(paces)
    landings: list[tuple[float, int]] = []
    now, left = start, chunks
    while left or landings:
        while left and len(landings) < window:
            rail = loads.soonest(CHUNK, now)
            loads.granted(rail, CHUNK, now)
            free[rail] = max(free[rail], now) + paces[rail]
            heapq.heappush(landings, (free[rail] + 0.04, rail))
            counts[rail] += 1
            left -= 1
        now, rail = heapq.heappop(landings)
        loads.ended(rail, CHUNK)
        loads.landed(rail, CHUNK, now)
    return now - start, counts


def opened(rails: int) -> RailLoads:
    loads = RailLoads()
    loads.open(range(rails))
    return loads


def test_where_nothing_is_known_the_rail_with_the_least_on_its_way_is_taken():
    loads = RailLoads()
    loads.open([0, 1, 2])
    taken = []
    for nbytes in (3, 1, 1, 1, 1):
        taken.append(loads.soonest(nbytes, 0.0))
        loads.granted(taken[-1], nbytes, 0.0)
    assert taken == [0, 1, 2, 1, 2]


def test_a_slow_rail_does_not_hold_the_end_of_a_message():
    loads, paces = opened(8), [0.02] * 7 + [0.4]
    first, _ = deliver(loads, paces, 100, window=24)
    seconds, counts = deliver(loads, paces, 100, 24, start=first)
    assert counts[7] <= 1
    assert seconds < min(first, 100 * 0.02 / 7 + 0.4)


def test_rails_of_one_kind_get_as_much_each():
    _, counts = deliver(opened(8), [0.02] * 8, 800, window=24)
    assert min(counts) > 90


def test_a_rail_that_was_slow_once_is_tried_again():
    loads = RailLoads()
    loads.open([0, 1])
    loads.granted(0, CHUNK, 0.0)
    loads.granted(1, CHUNK, 0.0)
    loads.ended(0, CHUNK)
    loads.landed(0, CHUNK, 0.1)
    loads.ended(1, CHUNK)
    loads.landed(1, CHUNK, 10.0)
    for _ in range(200):
        loads.granted(0, CHUNK, 10.0)
    assert loads.soonest(CHUNK, 10.0) == 1


def test_rails_that_were_idle_are_alike_again():
    loads = opened(8)
    end, _ = deliver(loads, [0.02] * 4 + [0.1] * 4, 100, window=16)
    taken = []
    for _ in range(8):
        taken.append(loads.soonest(CHUNK, end + 2.0))
        loads.granted(taken[-1], CHUNK, end + 2.0)
    assert sorted(taken) == list(range(8))


def test_a_rail_that_is_stuck_gets_nothing_more():
    loads = RailLoads()
    loads.open([0, 1])
    for now in (0.1, 0.2, 0.3):
        for rail in (0, 1):
            loads.granted(rail, CHUNK, now - 0.1)
            loads.ended(rail, CHUNK)
            loads.landed(rail, CHUNK, now)
    loads.granted(0, CHUNK, 0.3)
    for now in (0.3, 0.35, 0.4):
        loads.granted(1, CHUNK, now)
    assert loads.soonest(CHUNK, 0.4) == 0
    loads.ended(1, CHUNK)
    loads.landed(1, CHUNK, 0.45)
    assert loads.soonest(CHUNK, 0.45) == 0
    for now in (0.65, 0.75):
        assert loads.soonest(CHUNK, now) == 1  # which has more on its way
        loads.granted(1, CHUNK, now)
        loads.ended(1, CHUNK)
        loads.landed(1, CHUNK, now)


def test_a_rail_over_which_nothing_ever_landed_is_stuck_as_soon_as_another_would_be():
    loads = opened(2)
    loads.granted(0, CHUNK, 0.0)
    for now in (0.0, 0.1, 0.2, 0.3, 0.4):
        loads.granted(1, CHUNK, now)
        if now:
            loads.ended(1, CHUNK)
            loads.landed(1, CHUNK, now)
    loads.granted(1, CHUNK, 0.4)
    assert loads.soonest(CHUNK, 0.4) == 1  # which has more on its way


def test_what_is_told_of_a_rail_that_is_gone_is_forgotten():
    loads = RailLoads()
    loads.open([0, 1])
    loads.granted(1, CHUNK, 0.0)
    loads.remove(1)
    loads.ended(1, CHUNK)
    loads.landed(1, CHUNK, 1.0)
    assert list(loads) == [0]
    assert loads.soonest(CHUNK, 1.0) == 0
    loads.add(7)
    assert len(loads) == 2


@settings(max_examples=100, deadline=None)
@given(paces=st.lists(st.floats(0.001, 0.1), min_size=1, max_size=16), chunks=st.integers(1, 400))
def test_whatever_the_rails_are_like_together_they_are_used(paces, chunks):
    """Not slower than the fastest alone would be, but for a start that knows nothing."""
    window = 64
    seconds, counts = deliver(opened(len(paces)), paces, chunks, window)
    assert sum(counts) == chunks
    assert seconds < chunks * min(paces) + 2 * 0.04 + (-(-window // len(paces)) + 2) * max(paces)


@pytest.mark.parametrize("clock", [[0.0, 0.0, 0.0], [5.0, 5.0, 5.0], [1.0, 0.5, 0.2]])
def test_a_clock_that_stands_or_goes_back_breaks_nothing(clock):
    loads = RailLoads()
    loads.open([0, 1])
    for now in clock:
        rail = loads.soonest(CHUNK, now)
        loads.granted(rail, CHUNK, now)
        loads.ended(rail, CHUNK)
        loads.landed(rail, CHUNK, now)
    assert loads.soonest(CHUNK, clock[-1]) in (0, 1)
