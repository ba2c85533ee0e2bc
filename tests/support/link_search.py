"""What a link could bring: the best fixed setting, found by search, and the formulas that bound the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvflare_rdma.channel.controllers import Controller, make_controller
from tests.support.links import KIB, RESTART, Link, simulate

CHUNKS = tuple(64 * KIB << i for i in range(9))
DEPTHS = tuple(1 << i for i in range(9))


def restart_goodput(link: Link, chunk_bytes: int) -> float:
    """Mean goodput of `RESTART` with enough chunks in flight: the link over the bytes it takes to land a chunk.

    A try fails with 1 - (1-p)^n; it costs what was sent until one RTT after the loss, but not more than the chunk.
    """
    p, n = link.loss, chunk_bytes / link.mtu
    if not p:
        return link.bandwidth
    good = (1 - p) ** n
    # E[min(n, k + bdp)] over the position k of the loss, given that there is one.
    after = min(link.bdp / link.mtu, n)
    reach = n - after
    tail = (1 - p) ** reach
    wasted = (1 - tail) / p - reach * tail + after * (1 - tail) + n * (tail - good)
    return link.bandwidth * n * good / (n * good + wasted)


def ceiling(link: Link, chunk_bytes: int, depth: int) -> float:
    """No fixed setting can do better than this."""
    most = min(link.capacity, chunk_bytes * depth / link.rtt)
    if link.model == RESTART:
        most = min(most, 1.1 * restart_goodput(link, chunk_bytes))
    busy = link.overhead if depth > 1 else link.overhead + link.rtt + chunk_bytes / link.bandwidth
    return min(most, chunk_bytes / busy)


def mean_goodput(make: Callable[[], Controller], link: Link, seeds: int = 1, **length: float) -> float:
    """Of transfers of ``length`` (`simulate`'s seconds or nbytes), each with other losses."""
    return sum(simulate(make(), link, seed=seed, **length).goodput for seed in range(1, seeds + 1)) / seeds


def best_fixed(
    link: Link, chunks: Sequence[int] = CHUNKS, depths: Sequence[int] = DEPTHS, seeds: int = 1, **length: float
) -> tuple[float, int, int]:
    """(goodput, chunk, depth) of the best fixed setting. Those that can't beat what was found are not simulated."""
    best = (0.0, 0, 0)
    settings = sorted(((ceiling(link, c, d), -d, c) for c in chunks for d in depths), reverse=True)
    for most, negative_depth, chunk in settings:
        depth = -negative_depth
        if most <= best[0] or best[0] > 0.99 * settings[0][0]:
            break
        found = mean_goodput(lambda c=chunk, d=depth: make_controller("fixed", c, d, 1 << 62), link, seeds, **length)
        best = max(best, (found, chunk, depth))
    return best
