"""Two endpoints of the verbs fabric in one process, connected through two devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np

from nvflare_rdma.fabric.options import VerbsOptions
from nvflare_rdma.fabric.shm.process_memory import address_of
from nvflare_rdma.fabric.verbs.endpoint import VerbsEndpoint
from nvflare_rdma.fabric.verbs.fabric import VerbsFabric
from nvflare_rdma.fabric.verbs.registration_cache import RegistrationCache
from tests.support.recorder import Recorder
from tests.support.waiting import PATIENCE

DEADLINE = 30.0 * PATIENCE


def fabric(device: str, rails: int = 2, **options: Any) -> VerbsFabric:
    chosen = VerbsOptions(tuple(device.split(",")), **{"ack_timeout": 14, "retries": 3, **options})
    return VerbsFabric(rails, chosen, RegistrationCache(64 << 20))


class VerbsPair:
    """``passive`` and ``active``, and what they report: ``heard`` by the passive, ``said`` by the active side."""

    def __init__(self, devices: tuple[str, str], rails: int, **change: int) -> None:
        self.heard, self.said = Recorder(), Recorder()
        self.fabrics = fabric(devices[0], rails), fabric(devices[1], rails)
        self.passive: VerbsEndpoint
        self.passive, offer = self.fabrics[0].offer(self.heard)
        offer = msgpack.unpackb(msgpack.packb(offer))
        for port in offer["ports"]:
            port.update(change)
        try:
            self.active = self.fabrics[1].connect(offer, self.said)
            answer = msgpack.unpackb(msgpack.packb(self.active.answer))
            for port in answer["ports"]:
                port.update(change)
            self.passive.accept(answer)
        except BaseException:
            self.passive.close()
            raise

    def close(self) -> None:
        self.active.close()
        self.passive.close()


@contextmanager
def verbs_pair(devices: tuple[str, str], rails: int = 2, **change: int) -> Iterator[VerbsPair]:
    """``change``: what the two say of their ports, in place of the truth."""
    pair = VerbsPair(devices, rails, **change)
    try:
        yield pair
    finally:
        pair.close()


def buffer(size: int, fill: int = 0) -> memoryview:
    return np.full(size, fill, np.uint8).data


def numbered(size: int) -> memoryview:
    return (np.arange(size) % 251).astype(np.uint8).data


def held() -> dict[str, int]:
    """What the kernel holds for RDMA, and descriptors of this process."""
    lines = subprocess.run(["rdma", "resource"], capture_output=True, text=True, timeout=DEADLINE, check=True).stdout
    counts = {"descriptors": len(os.listdir("/proc/self/fd"))}
    for line in lines.splitlines():
        words = line.split()
        counts |= {f"{words[1]} {what}": int(count) for what, count in zip(words[2::2], words[3::2], strict=False)}
    return counts


__all__ = ["DEADLINE", "VerbsPair", "address_of", "buffer", "fabric", "held", "numbered", "verbs_pair"]
