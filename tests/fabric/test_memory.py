from __future__ import annotations

import gc

import pytest

from nvflare_rdma.fabric.memory import MemoryBudget, SlotPool


def test_requests_are_served_first_come_first_served():
    budget, served = MemoryBudget(100), []
    budget.request(60, lambda: served.append("a"))
    budget.request(60, lambda: served.append("b"))
    budget.request(10, lambda: served.append("c"))  # would fit, but b was first
    assert served == ["a"]
    budget.release(60)
    assert served == ["a", "b", "c"]
    assert (budget.in_use, budget.peak) == (70, 70)


def test_a_request_beyond_the_budget_is_admitted_alone():
    budget, served = MemoryBudget(100), []
    budget.request(1, lambda: served.append("small"))
    budget.request(1000, lambda: served.append("huge"))
    budget.request(1, lambda: served.append("next"))
    assert served == ["small"]
    budget.release(1)
    assert served == ["small", "huge"]
    budget.release(1000)
    assert served == ["small", "huge", "next"]
    assert budget.peak == 100


def test_a_waiting_request_can_be_withdrawn_and_lets_the_next_one_through():
    budget, served = MemoryBudget(100), []
    budget.request(100, lambda: served.append("a"))

    def big() -> None:
        served.append("big")

    budget.request(100, big)
    assert budget.cancel(big)
    assert not budget.cancel(big)
    budget.release(100)
    assert (served, budget.in_use) == (["a"], 0)


def test_a_budget_needs_bytes():
    with pytest.raises(ValueError, match="positive number of bytes, not 0"):
        MemoryBudget(0)


def test_a_slot_comes_back_when_the_last_slice_of_it_is_gone():
    pool = SlotPool()
    view = pool.take(100_000)
    address = _address(view)
    part = view[100:200]
    del view
    gc.collect()
    assert pool.idle_bytes == 0
    del part
    gc.collect()
    assert pool.idle_bytes == pool.cost(100_000) == 131_072
    assert _address(pool.take(99_000)) == address


def test_a_pool_keeps_no_more_than_it_may_and_nothing_larger_than_a_slot():
    pool = SlotPool(slot_bytes=1 << 20, keep_bytes=3 << 20)
    views = [pool.take(1 << 20) for _ in range(5)]
    large = pool.take((1 << 20) + 1)
    assert len(large) == pool.cost((1 << 20) + 1) == (1 << 20) + 1
    del views, large
    gc.collect()
    assert pool.idle_bytes == 3 << 20


def _address(view: memoryview) -> int:
    import numpy as np

    return np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
