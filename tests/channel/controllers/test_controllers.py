"""Controllers on simulated links (see links.py): the pipe is full, the chunk suits the link, nothing ever collapses.

No test looks at a real clock: all times are the simulation's. benchmarks/controllers.py runs the whole grid.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.channel.controllers import CONTROLLERS, MAX_GRANTS, Controller, make_controller
from nvflare_rdma.channel.controllers.estimators import DeliveryRate, LatencyFloor
from tests.support.link_search import best_fixed, mean_goodput, restart_goodput
from tests.support.links import GIB, KIB, MIB, MODELS, RESTART, RESUME, TCP, Link, simulate

GBIT = 1e9 / 8
CHUNKS, DEPTHS = tuple(64 * KIB << i for i in range(0, 9, 2)), (1, 8, 64, 256)


def adaptive(chunk_bytes: int = MIB, depth: int = 8, max_window_bytes: int = 8 * GIB) -> Controller:
    return make_controller("adaptive", chunk_bytes, depth, max_window_bytes)


def share(link: Link, run_for: float, controller: Controller | None = None, **options: object) -> float:
    """Of the link, in the second half of the time."""
    run = simulate(controller or adaptive(), link, seconds=run_for, trace=True, **options)
    return run.between(run_for / 2, run_for) / link.bandwidth


# -- the simulation itself ----------------------------------------------------------------------------------


def test_one_chunk_takes_a_round_trip_its_overhead_and_its_time_on_the_wire():
    link = Link(1e6, 0.1, overhead=0.01)
    run = simulate(make_controller("fixed", 100_000, 1, GIB), link, nbytes=100_000)
    assert run.seconds == pytest.approx(0.1 + 0.01 + 0.1)


@pytest.mark.parametrize("model", [TCP, RESUME])
def test_a_chunk_that_loses_packets_comes_a_round_trip_later(model):
    link = Link(GBIT, 0.1, 1e-2, model)  # some ten of a chunk's thousand packets are lost
    clean = simulate(make_controller("fixed", MIB, 1, GIB), Link(GBIT, 0.1, model=model), nbytes=MIB)
    lossy = simulate(make_controller("fixed", MIB, 1, GIB), link, nbytes=MIB)
    assert lossy.seconds > clean.seconds + 0.09


@pytest.mark.parametrize("model", MODELS)
def test_a_window_below_the_bdp_is_what_limits(model):
    link = Link(GBIT, 0.1, model=model)
    run = simulate(make_controller("fixed", 256 * KIB, 4, GIB), link, seconds=30)
    assert run.goodput == pytest.approx(MIB / 0.1, rel=0.1)


def test_tcp_under_loss_brings_what_the_formula_says():
    link = Link(GBIT, 0.05, 1e-3, TCP)
    assert simulate(make_controller("fixed", MIB, 16, GIB), link, seconds=link.long).goodput == pytest.approx(
        link.rails * 1460 * math.sqrt(1.5 / 1e-3) / 0.05, rel=0.05
    )


@pytest.mark.parametrize(("loss", "chunk_bytes"), [(1e-3, 64 * KIB), (1e-4, MIB), (1e-4, 4 * MIB)])
def test_writes_that_restart_bring_what_the_formula_says(loss, chunk_bytes):
    link = Link(GBIT, 0.01, loss, RESTART)
    run = simulate(make_controller("fixed", chunk_bytes, 64, GIB), link, seconds=60)
    assert run.goodput == pytest.approx(restart_goodput(link, chunk_bytes), rel=0.1)


def test_where_a_loss_restarts_the_message_the_best_chunk_grows_with_bandwidth_and_shrinks_with_loss():
    """FedRDMA's finding, and that a fast link needs requests in flight together."""

    def best(gbit: float, loss: float, depth: int = 256) -> tuple[float, int, int]:
        link = Link(gbit * GBIT, 1e-3, loss, RESTART)
        return best_fixed(link, depths=(depth,), seconds=0.5)

    assert best(1, 1e-4)[1] < best(100, 1e-4)[1]
    assert best(100, 1e-2)[1] < best(100, 1e-3)[1] < best(100, 1e-4)[1]
    assert best(100, 1e-4, depth=1)[0] < 0.3 * best(100, 1e-4)[0]


# -- how much of the link -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rtt", [0.05e-3, 10e-3, 200e-3])
@pytest.mark.parametrize("gbit", [0.01, 1, 100])
def test_without_loss_adaptive_fills_the_link(gbit, rtt, model):
    link = Link(gbit * GBIT, rtt, model=model)
    seconds = max(60 * rtt, min(link.long, 4000 * MIB / link.bandwidth), 0.1)
    run = simulate(adaptive(), link, seconds=seconds, trace=True)
    assert run.between(seconds / 2, seconds) > 0.85 * link.bandwidth
    assert run.trace[-1][2] < 4 * link.bdp + 8 * run.trace[-1][1]  # not by filling memory


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize(("gbit", "rtt"), [(0.1, 10e-3), (1, 0.05e-3), (1, 10e-3), (10, 50e-3)])
def test_with_loss_adaptive_is_close_to_the_best_fixed_setting(gbit, rtt, loss, model):
    link = Link(gbit * GBIT, rtt, loss, model)
    _, chunk, depth = best_fixed(link, CHUNKS, DEPTHS, seconds=link.long)
    best = simulate(make_controller("fixed", chunk, depth, 1 << 62), link, seconds=link.long, trace=True)
    run = simulate(adaptive(), link, seconds=link.long, trace=True)
    half = (link.long / 2, link.long)
    # On a long fat link with losses 256 grants of one size do not suit both the loss and the window.
    wanted = 0.5 if (gbit, rtt) == (10, 50e-3) else 0.85
    assert run.between(*half) > wanted * best.between(*half)
    assert run.goodput > min(wanted, 0.7) * best.goodput


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", [0, 1e-3, 1e-2])
@pytest.mark.parametrize(("gbit", "rtt"), [(0.1, 10e-3), (1, 50e-3), (100, 1e-3)])
def test_a_short_transfer_is_not_ruined_by_the_search(gbit, rtt, loss, model):
    link = Link(gbit * GBIT, rtt, loss, model)
    best = best_fixed(link, CHUNKS, DEPTHS, seeds=3, nbytes=64 * MIB)[0]
    assert mean_goodput(adaptive, link, 3, nbytes=64 * MIB) > 0.5 * best


@pytest.mark.parametrize("start", [(64 * KIB, 1), (64 * KIB, 64), (16 * MIB, 1), (16 * MIB, 64), (1_000_000, 3)])
def test_wherever_it_starts_it_gets_there(start):
    assert share(Link(10 * GBIT, 10e-3, model=RESUME), 4, adaptive(*start)) > 0.85


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_start_that_was_much_too_small_is_left_again(seed):
    """The first losses lead to 64 KiB, of which 256 can't fill this link; they have to grow with the bandwidth."""
    link = Link(GBIT, 200e-3, 1e-2, RESUME)
    assert share(link, 40, seed=seed) > 0.7


def test_the_chunk_grows_where_each_grant_costs_time():
    """64 KiB at 50 us each are a tenth of the link."""
    assert share(Link(100 * GBIT, 0.5e-3), 2, adaptive(64 * KIB, 64)) > 0.85


def test_the_latency_floor_knows_that_large_chunks_take_longer():
    floor = LatencyFloor()
    assert floor.get(MIB, 1e8) == 0
    floor.add(MIB, 0.030)  # 20 ms, and 10 ms on the wire
    assert floor.get(MIB, 1e8) == 0.030
    assert floor.get(5 * MIB, 1e8) == pytest.approx(0.030 + 7 * MIB / 1e8)  # sizes are powers of two
    assert floor.get(64 * KIB, 1e8) == pytest.approx(0.030 - 15 / 16 * MIB / 1e8)
    floor.add(64 * KIB, 0.2)  # it had to queue
    assert floor.get(64 * KIB, 1e8) < 0.05


def test_order_is_judged_within_a_rail():
    rate = DeliveryRate()
    for now, rail in ((1.0, 0), (2.0, 0), (3.0, 1), (4.0, 1), (5.0, 0)):
        rate.granted(100, now, rail)
    rate.landed(100, 3.0, 6.0, 1)
    rate.landed(100, 4.0, 6.0, 1)
    assert (rate.overtaken, rate.in_order) == (0, True)
    rate.landed(100, 5.0, 6.0, 0)
    assert rate.overtaken > 0
    assert not rate.in_order


@given(chunks=st.lists(st.tuples(st.sampled_from(["land", "lose", "forget"]), st.integers(0, 1)), max_size=40))
def test_nothing_is_in_flight_when_no_grant_is_open_and_what_is_forgotten_leaves_the_order(chunks):
    controller = adaptive()
    for number, (_, rail) in enumerate(chunks):
        controller.granted(1000, float(number), rail)
    for number, (what, rail) in enumerate(chunks):
        now = float(len(chunks) + number)
        if what == "lose":
            controller.lost(1000, now, rail)
        else:
            (controller.landed if what == "land" else controller.forgotten)(1000, float(number), now, rail)
    assert controller._rate.in_flight == controller._rate.overtaken == 0
    assert controller._rate.in_order or any(what == "lose" for what, _ in chunks)


def test_chunks_that_were_granted_together_are_on_time_in_any_order():
    rate = DeliveryRate()
    for now in range(1, 9):
        for length in (100, 200, 300):
            rate.granted(length, float(now))
    for now in range(1, 9):
        for length in (300, 100, 200):
            rate.landed(length, float(now), 10.0 + now)
            assert rate.in_order
            assert rate.passed == rate.on_time == (now - 1) * 600


def test_many_rails_get_small_chunks_and_each_gets_two():
    controller = adaptive(MIB, 4)
    controller.set_rails(2)
    assert (controller.chunk_bytes, controller.window_bytes) == (64 * KIB, 4 * MIB)  # a scout of 1 MiB chunks
    controller.set_rails(16)
    assert (controller.chunk_bytes, controller.window_bytes) == (64 * KIB, 2 * MIB)
    controller.set_rails(1)
    assert controller.window_bytes == 4 * MIB


@pytest.mark.parametrize("loss", [0, 1e-3, 1e-2])
@pytest.mark.parametrize(("gbit", "rtt"), [(0.01, 40e-3), (0.1, 40e-3), (1, 200e-3)])
def test_many_rails_fill_a_long_link_without_much_granted_ahead(gbit, rtt, loss):
    link = Link(gbit * GBIT, rtt, loss, TCP, rails=16)
    controller = adaptive(MIB, 4, 64 * MIB)
    controller.set_rails(16)
    run = simulate(controller, link, seconds=100 * rtt + 4, trace=True)
    seconds = run.seconds
    assert run.between(seconds / 2, seconds) > 0.8 * link.capacity
    windows = [window for at, _, window, _ in run.trace if at > seconds / 2]
    assert max(windows) < max(4 * link.bdp, 2.5 * MIB)


# -- what changes and what disturbs ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.1, 10])
@pytest.mark.parametrize("model", [TCP, RESUME])
def test_it_follows_a_change_of_bandwidth(factor, model):
    link = Link(GBIT, 20e-3, model=model)
    run = simulate(adaptive(), link, seconds=30, trace=True, changes=[(10.0, {"bandwidth": factor * GBIT})])
    # CUBIC itself takes its time to find ten times the bandwidth.
    wanted = 0.5 if (model, factor) == (TCP, 10) else 0.85
    assert run.between(20, 30) > wanted * factor * GBIT
    assert run.trace[-1][2] < 8 * factor * link.bdp + 16 * MIB


@pytest.mark.parametrize("factor", [0.1, 10])
def test_it_follows_a_change_of_rtt(factor):
    run = simulate(adaptive(), Link(GBIT, 20e-3), seconds=30, trace=True, changes=[(10.0, {"rtt": factor * 20e-3})])
    assert run.between(20, 30) > 0.85 * GBIT
    assert run.trace[-1][2] < 4 * factor * 20e-3 * GBIT + 8 * MIB


@pytest.mark.parametrize("model", [RESUME, RESTART])
def test_a_burst_of_loss_is_forgotten(model):
    burst = [(5.0, {"loss": 0.05}), (6.0, {"loss": 0.0})]
    run = simulate(adaptive(), Link(GBIT, 20e-3, model=model), seconds=20, trace=True, changes=burst)
    assert run.between(12, 20) > 0.85 * GBIT


@pytest.mark.parametrize("rtt", [0.05e-3, 20e-3])
def test_completions_reported_late_and_in_batches_do_not_mislead(rtt):
    """The receiver looks at completions every 5 ms only."""
    link = Link(GBIT, rtt)
    run = simulate(adaptive(), link, seconds=10, trace=True, late=lambda at, rail: math.ceil(at / 5e-3) * 5e-3)
    assert run.between(5, 10) > 0.85 * link.bandwidth
    assert run.trace[-1][2] < 4 * link.bandwidth * (rtt + 10e-3) + 16 * MIB


@pytest.mark.parametrize("rtt", [0.05e-3, 20e-3])
def test_rails_that_overtake_one_another_do_not_shrink_the_chunk(rtt):
    """Each delivers in order, but one is heard of later than the other."""
    chance = random.Random(1)
    heard = [0.0, 0.0]

    def late(at: float, rail: int) -> float:
        heard[rail] = max(heard[rail], at + chance.random() * (1e-3, 20e-3)[rail])
        return heard[rail]

    link = Link(10 * GBIT, rtt, model=TCP)
    run = simulate(adaptive(), link, seconds=4, trace=True, late=late)
    assert min(chunk for at, chunk, _, _ in run.trace if at > 4 * rtt + 40e-3) >= MIB
    assert run.between(2, 4) > 0.8 * link.bandwidth


def test_a_window_that_the_sender_does_not_use_does_not_grow():
    """1 MiB each 0.5 ms is a sixth of the link. The gain of the start, and no bound, would have more than eight times
    what that uses; the first messages wait for the window, and what comes then is some more."""
    controller, link = adaptive(), Link(100 * GBIT, 10e-3)
    used = MIB / 0.5e-3 * (link.rtt + 0.2e-3)
    run = simulate(controller, link, messages=[(i * 0.5e-3, MIB) for i in range(400)], trace=True)
    assert run.seconds < 400 * 0.5e-3 + 2 * link.rtt
    assert max(window for _, _, window, _ in run.trace) < 4 * used
    assert controller.window_bytes < 3 * used
    assert share(link, 2, controller) > 0.85  # and grows when it is


def test_messages_with_gaps_do_not_shrink_the_window():
    controller = adaptive()
    link = Link(GBIT, 20e-3)
    simulate(controller, link, seconds=5)
    before = controller.window_bytes
    frames = [(i * 0.05, 64 * KIB << i % 5) for i in range(400)]
    run = simulate(controller, link, messages=frames)
    assert run.landed == sum(length for _, length in frames)
    assert controller.window_bytes > before / 2
    # As fast as if each were alone on the link, but for the last.
    assert run.seconds < frames[-1][0] + 0.1


def test_small_messages_only_leave_the_start_window():
    controller = adaptive()
    simulate(controller, Link(GBIT, 20e-3), messages=[(i * 0.03, 64 * KIB) for i in range(300)])
    assert controller.window_bytes >= 8 * MIB
    assert share(Link(GBIT, 20e-3), 4, controller) > 0.85


# -- bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_window", [32 * KIB, 64 * KIB, 100_000, MIB, 10 * MIB, 64 * MIB])
def test_the_window_never_exceeds_the_memory_bound_and_uses_it(max_window):
    link = Link(10 * GBIT, 50e-3)
    run = simulate(adaptive(max_window_bytes=max_window), link, seconds=10, trace=True)
    assert all(chunk <= window <= max_window for _, chunk, window, _ in run.trace)
    usable = max_window - max_window % run.trace[-1][1]  # whole chunks
    assert run.between(5, 10) > 0.7 * min(usable / (link.rtt + 1e-3), link.bandwidth)


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["grant", "land", "lose", "idle"]), st.floats(0, 3), st.integers(0, 10)), max_size=300
    ),
    start=st.tuples(st.integers(1, 64 * MIB), st.integers(1, 256), st.integers(64 * KIB, 8 * GIB)),
    name=st.sampled_from(sorted(CONTROLLERS)),
)
def test_whatever_happens_the_bounds_hold(events, start, name):
    controller = make_controller(name, *start)
    flying: list[tuple[int, float]] = []
    now = 0.0
    for what, step, which in events:
        now += step if step > 1 else 0.0
        if what == "idle":
            controller.idle(now)
        elif what == "grant":
            length = max(controller.chunk_bytes >> (which % 4), 1)
            controller.granted(length, now)
            flying.append((length, now))
        elif flying:
            length, granted_at = flying.pop(which % len(flying))
            if what == "land":
                controller.landed(length, granted_at, now)
            else:
                controller.lost(length, now)
        assert 0 < controller.chunk_bytes <= controller.window_bytes <= start[2]
        if name == "adaptive":
            assert 64 * KIB <= controller.chunk_bytes <= 16 * MIB
            assert controller.window_bytes <= max(MAX_GRANTS * controller.chunk_bytes, start[0] * start[1])


def test_fixed_stays_as_it_is():
    controller = make_controller("fixed", MIB, 8, GIB)
    simulate(controller, Link(GBIT, 20e-3, 1e-2, RESTART), seconds=1)
    assert (controller.chunk_bytes, controller.window_bytes) == (MIB, 8 * MIB)
    small = make_controller("fixed", MIB, 8, 300_000)
    assert (small.chunk_bytes, small.window_bytes) == (300_000, 300_000)


def test_chunks_that_all_get_lost_make_it_small_but_not_still():
    controller = adaptive()
    for i in range(200):
        controller.granted(controller.chunk_bytes, i * 1.0)
        controller.lost(controller.chunk_bytes, i + 0.5)
    assert controller.window_bytes >= controller.chunk_bytes == 64 * KIB
    assert share(Link(GBIT, 20e-3), 6, controller) > 0.85


def test_a_run_can_be_repeated():
    link = Link(GBIT, 20e-3, 1e-3, RESTART)
    assert simulate(adaptive(), link, seconds=2, trace=True) == simulate(adaptive(), link, seconds=2, trace=True)
