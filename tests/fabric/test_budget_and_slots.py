from __future__ import annotations

import gc
import queue
import threading
import time

import pytest

from nvflare_rdma.fabric import budget
from nvflare_rdma.fabric.budget import HURRY_SECONDS, MemoryBudget, Reservation
from nvflare_rdma.fabric.send_memory import SendMemory
from nvflare_rdma.fabric.slots import SlotPool


class Requests:
    def __init__(self, limit: int) -> None:
        self.budget = MemoryBudget(limit)
        self.served: list[str] = []
        self.refused: list[str] = []
        self.taken: list[tuple[Reservation, str]] = []

    def ask(self, name: str, nbytes: int, deadline: float = float("inf")) -> Reservation:
        made = Reservation(
            *(self.budget, nbytes, name),
            granted=lambda: self.served.append(name),
            refused=self.refused.append,
            revoked=lambda reason: self.taken.append((made, reason)),
            deadline=deadline,
        )
        made.request()
        return made


def test_requests_are_served_first_come_first_served():
    it = Requests(100)
    a = it.ask("a", 60)
    it.ask("b", 60)
    it.ask("c", 10)  # would fit, but b was first
    assert it.served == ["a"]
    a.release()
    a.release()
    assert it.served == ["a", "b", "c"]
    assert (it.budget.in_use, it.budget.peak) == (70, 70)


def test_a_request_beyond_the_budget_is_admitted_alone():
    it = Requests(100)
    small, huge = it.ask("small", 1), it.ask("huge", 1000)
    it.ask("next", 1)
    assert it.served == ["small"]
    small.release()
    assert it.served == ["small", "huge"]
    huge.release()
    assert it.served == ["small", "huge", "next"]
    assert it.budget.peak == 100


def test_a_waiting_request_can_be_withdrawn_and_lets_the_next_one_through():
    it = Requests(100)
    a, big = it.ask("a", 90), it.ask("big", 100)
    it.ask("small", 10)
    big.release()
    assert it.served == ["a", "small"]
    a.release()
    big.request()  # it was given up for good
    assert (it.served, it.budget.in_use) == (["a", "small"], 10)


def test_a_request_that_waits_too_long_is_told_who_has_the_memory():
    it = Requests(100 << 20)
    it.ask("site-1", 50 << 20)
    it.ask("site-2", 20 << 20)
    it.ask("site-2", 30 << 20)
    it.ask("site-3", 5 << 20, deadline=10.0)
    it.ask("site-4", 50 << 20, deadline=30.0)
    it.budget.expire(10.0)
    assert it.refused == []
    it.budget.expire(10.1)
    assert it.refused == [
        "no 5.0 MiB came free in time of the memory budget of 100.0 MiB (rdma_memory_budget_bytes); "
        "held by site-1: 50.0 MiB, site-2: 50.0 MiB"
    ]
    assert it.served == ["site-1", "site-2", "site-2"]


def test_the_most_that_is_held_is_seen_from_when_one_looks():
    it = Requests(100)
    it.ask("before", 90).release()
    held = it.ask("a", 10)
    watch = it.budget.watch()
    assert watch.peak == 10
    it.ask("b", 50).release()
    assert watch.peak == 60
    held.release()
    assert it.budget.watch().peak == 0
    assert (watch.peak, it.budget.peak) == (60, 90)


def test_a_site_keeps_to_half_while_another_one_asks_for_some_now_and_then():
    it = Requests(100)
    it.ask("site-2", 10).release()
    held = [it.ask("site-1", 20) for _ in range(4)]
    assert it.served == ["site-2", "site-1", "site-1"]  # site-2 may come again
    it.ask("site-2", 50)
    assert it.served == ["site-2", "site-1", "site-1", "site-2"]
    held[0].release()
    assert it.budget.in_use == 20 + 50 + 20


def test_a_site_that_is_alone_may_have_it_all():
    it = Requests(100)
    for _ in range(5):
        it.ask("site-1", 20)
    assert it.budget.in_use == 100


def test_what_is_more_than_half_by_itself_is_not_shut_out_by_others():
    it = Requests(100)
    small = it.ask("site-2", 10)
    large = it.ask("site-1", 80)
    assert it.served == ["site-2", "site-1"]
    large.release()
    small.release()


def test_what_a_site_holds_beyond_half_is_taken_back_when_another_one_waits_too_long():
    it = Requests(100)
    held = [it.ask("site-1", 20) for _ in range(5)]
    began = time.monotonic()
    other = it.ask("site-2", 30)
    it.budget.expire(began + HURRY_SECONDS / 2)
    assert it.taken == []
    it.budget.expire(time.monotonic() + HURRY_SECONDS + 0.1)
    assert [reservation for reservation, _ in it.taken] == [held[4], held[3], held[2]]  # what came last goes first
    it.budget.expire(time.monotonic() + HURRY_SECONDS + 0.1)
    assert len(it.taken) == 3  # once
    assert "site-1 holds 0.0 MiB, more than half of the memory budget" in it.taken[0][1]
    for reservation, _ in it.taken:
        reservation.release()
    assert it.served[5:] == ["site-2"]
    it.budget.expire(time.monotonic() + 1000.0)
    assert len(it.taken) == 3
    other.release()


def test_a_site_with_many_requests_has_one_turn_like_all_others():
    """Its requests are the oldest, and each is as large as the budget."""
    it = Requests(100)
    hostile = [it.ask("hostile", 1000) for _ in range(16)]
    honest = [it.ask(f"site-{n}", 10) for n in range(8)]
    assert it.served == ["hostile"]
    it.budget.expire(time.monotonic() + HURRY_SECONDS + 0.1)
    hostile[0].release()  # as it has to
    assert it.served[1:9] == [f"site-{n}" for n in range(8)]
    for reservation in honest:
        reservation.release()
    assert it.served[9:] == ["hostile"]


def test_a_site_whose_neighbours_ask_no_more_has_all_again(monkeypatch):
    it = Requests(100)
    it.ask("site-2", 10).release()
    for _ in range(4):
        it.ask("site-1", 25)
    assert it.budget.in_use == 50
    monkeypatch.setattr(budget, "_NEIGHBOUR_SECONDS", -1.0)
    it.budget.expire(time.monotonic())
    assert it.budget.in_use == 100


def test_one_large_message_of_a_site_is_taken_back_too():
    it = Requests(100)
    held = it.ask("site-1", 1000)
    it.ask("site-2", 1)
    it.budget.expire(time.monotonic() + HURRY_SECONDS + 0.1)
    assert [reservation for reservation, _ in it.taken] == [held]


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


def test_a_pool_keeps_no_more_than_it_may():
    pool = SlotPool(keep_bytes=3 << 20)
    views = [pool.take(1 << 20) for _ in range(5)]
    too_large = pool.take(3 << 20)
    assert pool.cost(3 << 20) == 4 << 20  # whole huge pages
    del views, too_large
    gc.collect()
    assert pool.idle_bytes == 3 << 20


def test_what_was_of_use_least_recently_makes_room():
    pool = SlotPool(keep_bytes=8 << 20)
    old, older = pool.take(2 << 20), pool.take(1 << 20)
    large = pool.take(6 << 20)
    del old, older
    gc.collect()
    pool.take(1 << 20)  # used again, and given back at once
    del large
    gc.collect()
    assert pool.idle_bytes == 7 << 20  # the slot of 2 MiB is gone


def test_the_memory_of_a_large_message_is_used_again_for_the_next_of_its_shape():
    pool = SlotPool(keep_bytes=64 << 20)
    addresses = set()
    for _ in range(5):
        view = pool.take((32 << 20) + 5)
        addresses.add(_address(view))
        del view
        gc.collect()
    assert len(addresses) == 1


def test_memory_that_the_kernel_does_not_have_is_a_memory_error():
    with pytest.raises(MemoryError, match="can't map"):
        SlotPool().take(1 << 60)


def _address(view: memoryview) -> int:
    import numpy as np

    return np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]


def test_without_a_limit_of_its_own_idle_and_used_stay_within_the_busiest_moment():
    mib = 1 << 20
    pool = SlotPool(keep_bytes=None)
    large = pool.take(8 * mib)
    del large
    assert pool.idle_bytes == 8 * mib
    small = [pool.take(2 * mib) for _ in range(3)]
    assert pool.idle_bytes + pool.used_bytes <= 8 * mib
    del small
    pool.clear()
    assert pool.idle_bytes == 0


def test_what_was_taken_at_the_busiest_moment_keeps_no_more_idle_than_it_may():
    mib = 1 << 20
    pool = SlotPool(keep_bytes=None, most_bytes=8 * mib)
    pool.take(100 * mib)
    for size in (2, 4, 6, 8):
        pool.take(size * mib)
    assert pool.idle_bytes == 8 * mib


def test_what_is_announced_and_does_not_come_keeps_nothing_idle():
    mib = 1 << 20
    pool = SlotPool(keep_bytes=None)
    pool.filled(pool.take_for_announced(6 * mib))
    assert pool.idle_bytes == 6 * mib
    announced = [pool.take_for_announced(100 * mib) for _ in range(3)]
    pool.filled(pool.take_for_announced(8 * mib))
    del announced
    for size in (2, 4, 6, 8, 10):
        pool.take_for_announced(size * mib)
    assert pool.idle_bytes <= 8 * mib


def test_a_site_has_only_so_many_requests_that_wait(monkeypatch):
    monkeypatch.setattr(budget, "MAX_WAITING_OF_SITE", 3)
    it = Requests(100)
    held = it.ask("site-1", 100)
    waiting = [it.ask("site-2", 1) for _ in range(4)]
    it.ask("site-3", 1)
    assert it.refused == ["3 messages of site-2 wait for memory already, which is the most for one site"]
    waiting[1].release()
    it.ask("site-2", 1)
    assert len(it.refused) == 1
    waiting[3].release()  # it was refused
    held.release()
    assert sorted(it.served[1:]) == ["site-2"] * 3 + ["site-3"]


def test_who_holds_the_least_is_next_and_who_waits_for_much_is_not_passed_over():
    it = Requests(100)
    first = [it.ask("busy", 30) for _ in range(6)]
    other = it.ask("other", 30)
    large = it.ask("large", 60)
    assert it.served == ["busy"] * 3
    first[0].release()
    assert it.served == ["busy"] * 3 + ["other"]
    first[1].release()
    assert it.served == ["busy"] * 3 + ["other"], "it waits for the rest of what is large"
    first[2].release()
    assert it.served[4:] == ["large"], "of two who hold nothing its turn was longest ago"
    other.release()
    assert it.served[5:] == ["busy"]
    large.release()
    assert it.served[6:] == [], "the others may come again"
    first[3].release()
    assert it.served[6:] == ["busy"]


def sends(limit: int = 1 << 20) -> tuple[SlotPool, SendMemory]:
    pool = SlotPool()
    return pool, SendMemory(pool, limit)


def test_what_is_made_to_be_sent_waits_for_what_is_not_sent_yet():
    pool, memory = sends()
    shares = [memory.share(f"site-{n}") for n in range(6)]
    held = [take(256 << 10) for take in shares[:4]]  # all there is
    for take in (shares[0], shares[5]):  # its own share is used up, or all is
        more: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        waiting = threading.Thread(target=lambda take=take, more=more: more.put(take(100)), daemon=True)
        waiting.start()
        waiting.join(0.05)
        assert more.empty()
        del held[0]
        assert len(more.get(timeout=30.0)) == 100
        held.append(memory.share(f"more after {len(held)}, {id(more)}")(256 << 10))
    assert pool.used_bytes <= 1 << 20


def test_what_is_larger_than_all_that_may_be_sent_at_once_is_sent_alone():
    _, memory = sends()
    take = memory.share("site-1")
    slot = take(5 << 20)
    assert len(slot) == 5 << 20
    more: queue.SimpleQueue[int] = queue.SimpleQueue()
    waiting = threading.Thread(target=lambda: more.put(len(memory.share("site-2")(10))), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert more.empty()
    del slot
    assert more.get(timeout=30.0) == 10


def test_memory_that_can_not_be_had_gives_its_allowance_back():
    pool, memory = sends()
    take = memory.share("site-1")
    with pytest.raises(MemoryError):
        take(1 << 60)
    take(100)
    assert pool.used_bytes == 0


def test_all_links_to_a_site_have_one_share_of_what_is_sent():
    _, memory = sends()
    links = [memory.share("site-1") for _ in range(3)]
    held = links[0](256 << 10)
    more: queue.SimpleQueue[int] = queue.SimpleQueue()
    waiting = threading.Thread(target=lambda: more.put(len(links[1](10))), daemon=True)
    waiting.start()
    assert len(memory.share("site-2")(256 << 10)) == 256 << 10
    waiting.join(0.05)
    assert more.empty()
    del held
    assert more.get(timeout=30.0) == 10
