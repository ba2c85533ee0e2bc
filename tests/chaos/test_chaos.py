"""What a chaos run looks with sees what is wrong: else it would find nothing, whatever happens."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import pytest

from tests.chaos import content
from tests.chaos.proxy import Fate, Proxy
from tests.support.tcp_pair import DEADLINE

SEED = next(seed for seed in range(100) if len(content.make(seed)[1]) > 3)


def test_what_was_sent_is_right():
    want = content.expected(SEED)
    assert content.difference(content.expected(SEED), want) == ""
    assert set(content.to_send(SEED)) == set(want)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda a: a.__setitem__(a.size // 2, a[a.size // 2] + 1), "bytes differ"),
        (lambda a: a.reshape(1, -1), "of shape"),
        (lambda a: a.view(np.uint32), "uint32"),
        (lambda a: a[:-1], "of shape"),
    ],
)
def test_a_wrong_bit_or_shape_is_seen(change, seen):
    want = {"t0": np.arange(1000, dtype=np.float32)}
    got = {"t0": want["t0"].copy()}
    changed = change(got["t0"])
    got["t0"] = got["t0"] if changed is None else changed
    assert seen in content.difference(got, want)


def test_tensors_that_are_missing_or_in_another_order_are_seen():
    want = {"a": np.ones(3), "b": np.ones(3)}
    assert content.difference({"a": want["a"]}, want)
    assert content.difference({"b": want["b"], "a": want["a"]}, want)


def test_a_file_is_the_same_whoever_makes_it(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    one, two = (content.open_source(3, tmp_path / folder) for folder in "12")
    assert one.identity == two.identity


class Fated(Proxy):
    """A proxy whose connections have the fate that a test wants."""

    def __init__(self, there: Fate) -> None:
        super().__init__(random.Random(1), secure=True)
        self._there = there

    def _fates(self, is_rail: bool) -> tuple[Fate, Fate]:
        return self._there, Fate()


@pytest.fixture
def through():
    """Joins two sockets by a proxy, of which only what goes there is touched."""
    proxies: list[Proxy] = []

    def join(fate: Fate) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            proxies.append(Fated(fate))
            near = socket.create_connection(("127.0.0.1", proxies[-1].way_to(listener.getsockname()[1])), DEADLINE)
            near.sendall(b"01234567")  # the proxy looks at the first bytes
            far, _ = listener.accept()
        near.settimeout(DEADLINE)
        far.settimeout(DEADLINE)
        sockets.extend((near, far))
        return near, far

    sockets: list[socket.socket] = []
    yield join
    for sock in sockets:
        sock.close()
    for proxy in proxies:
        proxy.close()


def everything(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(1 << 16):
        data += part
    return data


def test_a_flip_is_one_bit(through):
    near, far = through(Fate("flip", 1000))
    data = os.urandom(5000)
    near.sendall(data)
    near.shutdown(socket.SHUT_WR)
    came, sent = everything(far), b"01234567" + data
    assert [n for n in range(len(sent)) if came[n] != sent[n]] == [1000]
    assert (came[1000] ^ sent[1000]).bit_count() == 1


def test_a_cut_is_at_its_place(through):
    near, far = through(Fate("cut", 108))
    near.sendall(bytes(100) + b"x")
    assert everything(far) == b"01234567" + bytes(100)


def test_a_hole_swallows_and_the_way_back_is_open(through):
    near, far = through(Fate("hole", 8))
    near.sendall(bytes(100))
    far.sendall(b"back")
    assert near.recv(4) == b"back"
    near.shutdown(socket.SHUT_WR)
    assert everything(far) == b"01234567"
