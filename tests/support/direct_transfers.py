"""A message's tensors in one cell, pulled by others: what tests of `Service` and `pull` share."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch

from nvflare_rdma.transfer import receiver
from nvflare_rdma.transfer.arrays import to_bytes
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.manifest import INLINE_BYTES
from nvflare_rdma.transfer.places import in_memory
from nvflare_rdma.transfer.receiver import Pull, pull
from nvflare_rdma.transfer.records import Meter, Meters
from nvflare_rdma.transfer.service import Service
from nvflare_rdma.transfer.sinks import TensorDestination
from tests.support.data_channels import ANY_PORT, shared
from tests.support.tcp_pair import DEADLINE

LARGE = INLINE_BYTES + 1  # values, so that it is no small tensor whatever its dtype
SEND = {"do": "send", "first": 1, "items": [0], "invitation": None}


def new_memory(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


new = in_memory(new_memory)


class Direct:
    """What the cell "server" holds, and others pull."""

    def __init__(self, cell, tensors, ports=ANY_PORT, **kinds) -> None:
        self.channels = cell("server", ports=ports, **kinds)
        self.moved: list[tuple[str, int, int]] = []
        self.requests: list[str] = []
        #: While it is not set, the sender does not go on when its first tensors are there.
        self.go_on = threading.Event()
        self.go_on.set()
        meters = Meters("server", ledger=shared.ledger)
        self.service = Service(TensorContent(tensors), lambda: self.channels, self._moved, meters)

    @property
    def asked(self) -> list[str]:
        """The requests, but for those that look whether all is well, as receivers do where it takes a second."""
        return [request for request in self.requests if request != "report"]

    def _moved(self, *what) -> None:
        self.moved.append(what)
        assert self.go_on.wait(DEADLINE)

    def ask(self, receiver: str) -> Callable[[dict], dict]:
        def ask(request: dict) -> dict:
            self.requests.append(request["do"])
            return self.service.answer(request, receiver)

        return ask

    def pull(self, channels, **kinds) -> dict:
        land = kinds.pop("land", None) or in_memory(kinds.pop("allocate", new_memory))
        return pull(channels, "server", self.ask(channels.name), land, **kinds)

    def confirmed(self, channels, ask=None, progress=lambda done: None, land=new) -> dict:
        """As `DirectDecomposer.download` pulls, which asks afterwards whether the sender has seen everything arrive."""
        meter = Meter("received", channels.name, "server", ledger=shared.ledger)
        asks = ask or self.ask(channels.name)
        pulling = Pull(channels, "server", asks, TensorDestination(land), lambda: False, progress, meter)
        return pulling.run(confirmed=True)

    def once_some_are_here(self, action: Callable[[], None]) -> Callable[[receiver.Progress], None]:
        """For `progress`: acts once, when some have landed and not all."""
        self.go_on.clear()

        def progress(done: receiver.Progress) -> None:
            if done.items and not self.go_on.is_set():
                action()
                self.go_on.set()

        return progress

    @property
    def senders(self) -> int:
        return sum(thread.name == "rdma-offers" for thread in threading.enumerate())


def large(count: int, size: int = 100_000) -> dict[str, np.ndarray]:
    return {f"t{i}": np.full(size, i, np.uint8) for i in range(count)}


def assert_equal(got, sent) -> None:
    assert got.keys() == sent.keys()
    for name, tensor in sent.items():
        assert type(got[name]) is (torch.Tensor if isinstance(tensor, torch.Tensor) else np.ndarray), name
        assert got[name].dtype == tensor.dtype, name
        assert tuple(got[name].shape) == tuple(tensor.shape), name
        assert bytes(to_bytes(got[name])) == bytes(to_bytes(tensor)), name
