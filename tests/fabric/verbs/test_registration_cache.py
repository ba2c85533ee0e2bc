from __future__ import annotations

import gc
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nvflare_rdma.errors import FabricError
from nvflare_rdma.fabric.shm.process_memory import address_of
from nvflare_rdma.fabric.verbs.registration_cache import RegistrationCache, owner_of
from tests.support.waiting import eventually

PAGE = 4096
DEADLINE = 30.0


class Device:
    """Stands for a protection domain: it knows what is registered there."""

    def __init__(self) -> None:
        self.regions: dict[int, tuple[int, int]] = {}
        self.made = 0
        self.refuse_after: int | None = None
        self.closed = False

    def register(self, address: int, nbytes: int) -> Registered:
        assert not self.closed, "the device is closed: the real one would crash"
        if self.refuse_after is not None and self.made >= self.refuse_after:
            raise FabricError("Cannot allocate memory")
        self.made += 1
        self.regions[self.made] = (address, nbytes)
        return Registered(self, self.made)

    @property
    def pinned(self) -> int:
        return sum(nbytes for _, nbytes in self.regions.values())


class Registered:
    def __init__(self, device: Device, lkey: int) -> None:
        self.device, self.lkey = device, lkey

    def close(self) -> None:
        del self.device.regions[self.lkey]  # KeyError: it was closed before


def acquire(cache, device, source, abandoned=None):
    deadline = time.monotonic() + DEADLINE
    abandoned = abandoned or (lambda: time.monotonic() > deadline)
    return cache.acquire(device, device.register, memoryview(source).cast("B"), abandoned)


def array(pages):
    return np.zeros(pages * PAGE, np.uint8)


def covered(lease, device):
    """That the segments are the source, in order, within what is registered under their keys."""
    at = address_of(lease.source)
    for segment in lease.segments:
        base, size = device.regions[segment.lkey]
        assert base <= segment.address
        assert segment.address + segment.length <= base + size
        assert segment.address == at
        at += segment.length
    return at == address_of(lease.source) + len(lease.source)


# -- one after the other -----------------------------------------------------------------------------------


def test_what_is_sent_again_is_not_registered_again():
    cache, device, data = RegistrationCache(64 * PAGE), Device(), array(4)
    for _ in range(3):
        lease = acquire(cache, device, data)
        assert covered(lease, device)
        cache.release(lease)
    assert (device.made, cache.misses, cache.hits, cache.pinned) == (1, 1, 2, 4 * PAGE)


def test_views_of_one_array_share_its_pieces():
    cache, device, data = RegistrationCache(64 * PAGE, 4 * PAGE), Device(), array(10)
    views = [data, data[PAGE : 3 * PAGE], memoryview(data)[2 * PAGE : 5 * PAGE], data.reshape(10, -1)[9]]
    assert all(owner_of(memoryview(view)) is data for view in views)
    leases = [acquire(cache, device, view) for view in views]
    assert sorted(device.regions.values()) == [
        (address_of(data.data), 4 * PAGE),
        (address_of(data.data) + 4 * PAGE, 4 * PAGE),
        (address_of(data.data) + 8 * PAGE, 2 * PAGE),  # the last piece ends with the array
    ]
    assert [len(lease.segments) for lease in leases] == [3, 1, 2, 1]
    assert all(covered(lease, device) for lease in leases)


def test_pieces_are_small_where_the_limit_is():
    cache, device = RegistrationCache(16 * PAGE), Device()
    lease = acquire(cache, device, array(100)[: 2 * PAGE])
    assert (cache.pinned, len(lease.segments)) == (4 * PAGE, 1)


def test_what_was_used_least_recently_goes_first():
    cache, device = RegistrationCache(4 * PAGE, PAGE), Device()
    a, b, c, d, e = (array(1) for _ in range(5))
    for data in (a, b, c, d, a):
        cache.release(acquire(cache, device, data))
    cache.release(acquire(cache, device, e))
    known = {address for address, _ in device.regions.values()}
    assert known == {address_of(data.data) for data in (a, c, d, e)}


def test_no_more_goes_than_has_to_and_nothing_that_is_in_use():
    cache, device = RegistrationCache(4 * PAGE, PAGE), Device()
    used, idle, other = array(2), array(2), array(1)
    lease = acquire(cache, device, used)
    cache.release(acquire(cache, device, idle))
    cache.release(acquire(cache, device, other))
    assert cache.pinned == 4 * PAGE
    assert covered(lease, device)


def column_of_a_table():
    return np.zeros((2 * PAGE, 2), np.uint8, order="F")[:, 0]


@pytest.mark.parametrize("make", [lambda: bytes(PAGE), lambda: bytearray(PAGE), column_of_a_table])
def test_what_cannot_say_when_it_dies_is_registered_for_one_write(make):
    cache, device, data = RegistrationCache(64 * PAGE), Device(), make()
    source = memoryview(data)[100:300]
    first, second = acquire(cache, device, source), acquire(cache, device, source)
    assert list(device.regions.values()) == [(address_of(source), 200)]
    cache.release(first)
    assert covered(second, device)
    cache.release(second)
    assert (device.pinned, cache.pinned) == (0, 0)


def test_an_array_over_foreign_memory_is_kept_as_long_as_the_array():
    cache, device, memory = RegistrationCache(64 * PAGE), Device(), bytearray(2 * PAGE)
    data = np.frombuffer(memory, np.uint8)
    cache.release(acquire(cache, device, data))
    assert device.pinned == 2 * PAGE
    del data
    cache.release(acquire(cache, device, array(1)))
    assert (device.pinned, cache.pinned) == (PAGE, PAGE)


def test_an_array_that_dies_is_deregistered_before_its_address_is_used_again():
    cache, device = RegistrationCache(64 * PAGE), Device()
    pool = bytearray(PAGE)
    first = np.frombuffer(pool, np.uint8)
    cache.release(acquire(cache, device, first))
    del first
    again = np.frombuffer(pool, np.uint8)
    lease = acquire(cache, device, again)
    assert (device.made, len(device.regions), cache.hits) == (2, 1, 0)
    assert covered(lease, device)


def test_an_array_that_dies_in_a_cycle_is_deregistered_too():
    cache, device = RegistrationCache(64 * PAGE), Device()
    cycle = [array(1)]
    cycle.append(cycle)
    cache.release(acquire(cache, device, cycle[0]))
    del cycle
    gc.collect()
    cache.release(acquire(cache, device, bytes(10)))
    assert device.pinned == 0


def test_a_source_that_is_being_written_outlives_its_owner():
    cache, device = RegistrationCache(64 * PAGE), Device()
    lease = acquire(cache, device, array(3))  # nobody else has the array
    cache.release(acquire(cache, device, array(1)))
    assert covered(lease, device)
    cache.release(lease)
    del lease
    cache.release(acquire(cache, device, bytes(10)))
    assert device.pinned == 0


def test_two_arrays_over_the_same_memory_do_not_hinder_each_other():
    cache, device, memory = RegistrationCache(64 * PAGE), Device(), bytearray(4 * PAGE)
    whole, half = np.frombuffer(memory, np.uint8), np.frombuffer(memory, np.uint8, 2 * PAGE)
    for _ in range(100):
        cache.release(acquire(cache, device, whole))
        cache.release(acquire(cache, device, half))
    assert device.made == 2
    assert len(cache._watched) == 2
    lease = acquire(cache, device, half)
    del whole
    cache.release(acquire(cache, device, bytes(10)))
    assert covered(lease, device)  # in use: it stays, but not for longer
    cache.release(lease)
    assert device.pinned == 0


def test_a_refused_registration_leaves_nothing_in_use():
    cache, device, data = RegistrationCache(64 * PAGE, PAGE), Device(), array(5)
    device.refuse_after = 3
    with pytest.raises(FabricError, match="Cannot allocate memory"):
        acquire(cache, device, data)
    with pytest.raises(FabricError):
        acquire(cache, device, bytes(10))
    assert cache.pinned == device.pinned == 3 * PAGE  # kept for the next try, and the first to go
    device.refuse_after = None
    for _ in range(20):
        cache.release(acquire(cache, device, array(64)))
    assert device.pinned <= 64 * PAGE
    del data
    cache.drop(device)
    assert cache.pinned == device.pinned == 0


# -- domains -----------------------------------------------------------------------------------------------


def test_a_peer_without_anything_in_use_gets_its_turn_beyond_the_limit():
    cache, slow, other = RegistrationCache(4 * PAGE, PAGE), Device(), Device()
    held, data = acquire(cache, slow, array(4)), array(6)
    lease = acquire(cache, other, data)
    assert (slow.pinned, other.pinned, cache.pinned) == (4 * PAGE, 6 * PAGE, 10 * PAGE)
    cache.release(lease)
    cache.release(acquire(cache, other, data[:PAGE]))
    assert cache.pinned <= 10 * PAGE
    cache.release(held)
    cache.release(acquire(cache, other, array(1)))
    assert cache.pinned <= 4 * PAGE


def test_dropping_a_domain_deregisters_all_of_it_and_nothing_else():
    cache, one, other, data = RegistrationCache(64 * PAGE), Device(), Device(), array(2)
    lease = acquire(cache, one, data)
    cache.release(acquire(cache, other, data))
    cache.drop(one)
    assert (one.pinned, other.pinned, cache.pinned) == (0, 2 * PAGE, 2 * PAGE)
    cache.release(lease)  # of a write that was never posted
    cache.release(lease)
    assert (other.pinned, cache.pinned) == (2 * PAGE, 2 * PAGE)
    assert not any(cache._busy.values())


def test_nothing_is_registered_for_a_rail_that_is_over():
    cache, device = RegistrationCache(64 * PAGE), Device()
    cache.drop(device)
    device.closed = True
    with pytest.raises(FabricError, match="the rail broke before"):
        acquire(cache, device, array(1), abandoned=lambda: True)
    assert cache.pinned == 0


# -- waiting -----------------------------------------------------------------------------------------------


class Waiter(threading.Thread):
    """Acquires, in a thread of its own."""

    def __init__(self, cache, device, data):
        super().__init__(daemon=True)
        self.abandoned = False
        self.result = None
        self._acquire = lambda: acquire(cache, device, data, lambda: self.abandoned)
        self.start()

    def run(self):
        try:
            self.result = self._acquire()
        except FabricError as error:
            self.result = error


def full_cache():
    """Two leases take all there is; who waits for a third does not look by itself, and has to be woken."""
    cache, device = RegistrationCache(4 * PAGE, PAGE), Device()
    wait = cache._room.wait
    cache._room.wait = lambda timeout: wait(2 * DEADLINE)
    return cache, device, acquire(cache, device, array(2)), acquire(cache, device, array(2))


def test_one_that_finds_no_room_waits_until_something_is_released():
    cache, device, first, second = full_cache()
    waiter = Waiter(cache, device, array(3))
    waiter.join(0.2)
    assert waiter.result is None
    cache.release(first)
    waiter.join(0.2)
    assert waiter.result is None  # two pages are not enough
    cache.release(second)
    waiter.join(DEADLINE)
    assert covered(waiter.result, device)
    assert cache.pinned <= 4 * PAGE


def test_one_that_waits_is_woken_when_its_rail_breaks():
    cache, device, first, _ = full_cache()
    waiter = Waiter(cache, device, array(3))
    waiter.join(0.1)
    waiter.abandoned = True
    cache.wake()
    waiter.join(DEADLINE)
    assert "the rail broke" in str(waiter.result)
    assert device.pinned == 4 * PAGE
    assert covered(first, device)


def test_one_that_waits_goes_on_when_another_domain_is_dropped():
    cache, device, _, _ = full_cache()
    other, small, big = Device(), array(1), array(3)
    held = acquire(cache, other, small)
    waiter = Waiter(cache, other, big)
    waiter.join(0.1)
    assert waiter.result is None
    cache.drop(device)
    waiter.join(DEADLINE)
    assert covered(waiter.result, other)
    assert covered(held, other)


def test_many_threads_of_many_peers():
    cache, devices, errors = RegistrationCache(16 * PAGE, 2 * PAGE), [Device() for _ in range(3)], []
    shared = [array(n) for n in (1, 2, 3, 5, 9)]

    def work(seed):
        random = np.random.default_rng(seed)
        try:
            for _ in range(300):
                device = devices[random.integers(3)]
                kind = random.integers(4)
                data = bytes(300) if kind == 0 else array(3) if kind == 1 else shared[random.integers(5)]
                start = int(random.integers(len(data) - 1))
                lease = acquire(cache, device, memoryview(data)[start : int(random.integers(start + 1, len(data)))])
                assert covered(lease, device)
                del data
                assert covered(lease, device)
                cache.release(lease)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: not any(thread.is_alive() for thread in threads))
    assert errors == []
    assert cache.pinned == sum(device.pinned for device in devices) <= 16 * PAGE
    assert not any(extent.users for extent in cache._extents.values())
    for device in devices:
        cache.drop(device)
    assert cache.pinned == sum(device.pinned for device in devices) == 0


# -- any order of events -----------------------------------------------------------------------------------


class CacheMachine(RuleBasedStateMachine):
    """Writes begin and end, arrays live and die, peers come and go, the kernel refuses: in any order."""

    LIMIT = 8 * PAGE

    def __init__(self) -> None:
        super().__init__()
        self.cache = RegistrationCache(self.LIMIT, 2 * PAGE)
        self.devices = [Device(), Device()]
        self.sources: list[object] = []
        self.leases: list[tuple[Device, object]] = []
        #: Memory whose arrays come and go at the same address.
        self.pools = [bytearray(3 * PAGE), bytearray(5 * PAGE)]
        self.within_the_rules = True

    @rule(
        pages=st.integers(1, 7), kind=st.sampled_from([array, lambda n: bytes(n * PAGE), lambda n: bytearray(n * PAGE)])
    )
    def make(self, pages, kind):
        self.sources.append(kind(pages))

    @rule(pool=st.integers(0, 1))
    def use_an_address_again(self, pool):
        self.sources.append(np.frombuffer(self.pools[pool], np.uint8))

    @precondition(lambda self: self.sources)
    @rule(data=st.data())
    def forget(self, data):
        self.sources.pop(data.draw(st.integers(0, len(self.sources) - 1)))

    @precondition(lambda self: self.sources)
    @rule(data=st.data(), device=st.integers(0, 1), refuse=st.sampled_from([None, None, None, 0, 1, 2]))
    def begin(self, data, device, refuse):
        # sampled_from would keep the sources until the next garbage collection: no run could be repeated.
        chosen = data.draw(st.integers(0, len(self.sources) - 1))
        to, source = self.devices[device], memoryview(self.sources[chosen]).cast("B")
        start = data.draw(st.integers(0, len(source) - 1))
        view = source[start : data.draw(st.integers(start + 1, len(source)))]
        to.refuse_after = None if refuse is None else to.made + refuse
        before, busy = self.cache.pinned, self.in_use()[to] > 0
        waits = []

        def abandoned():
            waits.append(1)
            return len(waits) > 1  # the second look is after it had to wait

        self.cache._room.wait = lambda timeout: None
        try:
            lease = acquire(self.cache, to, view, abandoned)
        except FabricError:
            assert len(waits) > 1 or refuse is not None
            assert busy or refuse is not None, "it waited although nothing of it was in use"
        else:
            assert covered(lease, to)
            self.leases.append((to, lease))
        finally:
            to.refuse_after = None
            del view, source
        if busy:
            assert self.cache.pinned <= max(before, self.LIMIT)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data):
        _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.cache.release(lease)

    @rule(device=st.integers(0, 1))
    def close(self, device):
        gone = self.devices[device]
        self.cache.drop(gone)
        assert gone.pinned == 0
        gone.closed = True
        for _, lease in [pair for pair in self.leases if pair[0] is gone]:
            self.cache.release(lease)
        self.leases = [pair for pair in self.leases if pair[0] is not gone]
        self.devices[device] = Device()

    def in_use(self):
        used = Counter()
        for device, lease in self.leases:
            used[device] += sum(key[2] for key in lease.keys)
        return used

    @invariant()
    def what_is_counted_is_what_is_registered(self):
        assert self.cache.pinned == sum(device.pinned for device in self.devices)
        assert {device: n for device, n in self.cache._busy.items() if n} == dict(self.in_use())

    @invariant()
    def what_is_written_is_registered(self):
        assert all(covered(lease, device) for device, lease in self.leases)

    @invariant()
    def nothing_idle_is_beyond_the_limit(self):
        used = {key for _, lease in self.leases for key in lease.keys}
        assert self.cache.pinned <= max(self.LIMIT, sum(key[2] for key in used))

    def teardown(self):
        for _, lease in self.leases:
            self.cache.release(lease)
        for device in self.devices:
            self.cache.drop(device)
        assert self.cache.pinned == 0


TestAnyOrder = CacheMachine.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_turn_beyond_the_limit_takes_what_is_sent_and_no_more():
    """What may be locked is the limit and a little: a whole piece for each of many peers would be far beyond it."""
    cache, devices, data = RegistrationCache(64 * PAGE), [Device() for _ in range(20)], array(64)
    leases = [acquire(cache, device, data[5 * PAGE : 6 * PAGE]) for device in devices]
    assert cache.pinned <= cache.limit + len(devices) * PAGE
    assert all(covered(lease, device) for lease, device in zip(leases, devices, strict=True))
    for lease in leases:
        cache.release(lease)
    assert cache.pinned <= cache.limit


def test_a_turn_beyond_the_limit_leaves_nothing_idle():
    """Idle pieces of its own array are no use to a write that registers just what it sends."""
    cache, own, other, data = RegistrationCache(8 * PAGE, 2 * PAGE), Device(), Device(), array(5)
    cache.release(acquire(cache, own, data[:1]))
    busy = acquire(cache, other, data)
    lease = acquire(cache, own, data[: 2 * PAGE + 1])
    assert cache.pinned <= cache.limit
    assert covered(lease, own)
    for each in (busy, lease):
        cache.release(each)
