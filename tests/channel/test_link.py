"""Links on real sockets: clear and sealed, with rails and without, and what happens when things break."""

from __future__ import annotations

import gc
import hashlib
import logging
import socket
import ssl
import threading
import weakref

import pytest
from certificates import Authority
from tcp_pair import DEADLINE, context, in_parallel, link_pair

from nvflare_rdma.errors import RdmaError, SendTimeoutError, TransferError

SIZES = [0, 1, 65_536, 65_537, 256 * 1024 + 1, 5_000_003]


def pattern(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    authority = Authority(folder)
    contexts = []
    for role, purpose in (("client", ssl.Purpose.SERVER_AUTH), ("server", ssl.Purpose.CLIENT_AUTH)):
        files = authority.issue(role, role)
        made = ssl.create_default_context(purpose)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(files["ca_cert"])
        made.load_cert_chain(files[f"{role}_cert"], files[f"{role}_key"])
        contexts.append(made)
    return tuple(contexts)


def refuse_to_dial() -> socket.socket:
    raise ConnectionRefusedError("blocked by the firewall")


def exchange(pair) -> None:
    for sender, receiver in ((pair.active, pair.passive), (pair.passive, pair.active)):
        for size in SIZES:
            sender.send(pattern(size), timeout=DEADLINE)
        received = [pair.receive(receiver) for _ in SIZES]
        assert sorted(map(bytes, received), key=len) == [pattern(size) for size in SIZES]


def test_messages_of_all_sizes_both_ways_over_rails():
    with link_pair() as pair:
        assert pair.active.fabric == pair.passive.fabric == "tcp"
        exchange(pair)


def test_the_same_with_tls_and_sealed_chunks(tls):
    with link_pair(tls=tls) as pair:
        exchange(pair)


@pytest.mark.parametrize("secure", [False, True])
def test_without_rails_everything_goes_over_the_control_stream_and_says_why(secure, tls, caplog):
    with caplog.at_level(logging.WARNING), link_pair(tls=tls if secure else None, dial=refuse_to_dial) as pair:
        assert pair.active.fabric == pair.passive.fabric == "control"
        exchange(pair)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("no rail" in line and "blocked by the firewall" in line for line in lines) == 2


def test_both_directions_and_several_senders_at_once():
    with link_pair() as pair:
        sizes = [200_000 + i for i in range(16)]
        in_parallel(
            *(
                lambda n=n, link=link: link.send(pattern(n), DEADLINE)
                for n in sizes
                for link in (pair.active, pair.passive)
            )
        )
        for link in (pair.active, pair.passive):
            assert sorted(len(pair.receive(link)) for _ in sizes) == sizes


@pytest.mark.parametrize("secure", [False, True])
def test_what_messages_hold_stays_within_the_budget_and_is_given_back(secure, tls):
    receiving = context(budget=4 << 20)
    held, most, take = [0], [0], receiving.pool.take

    def counted(nbytes: int) -> memoryview:
        view = take(nbytes)
        held[0] += receiving.pool.cost(nbytes)
        most[0] = max(most[0], held[0])
        weakref.finalize(view.obj, lambda: held.__setitem__(0, held[0] - receiving.pool.cost(nbytes)))
        return view

    receiving.pool.take = counted
    with link_pair(passive_context=receiving, tls=tls if secure else None) as pair:
        pair.passive._deliver = lambda message: pair.inbox[pair.passive].put(bytes(message))
        sizes = [300_000] * 20 + [1_500_000]
        for size in sizes:
            pair.active.send(pattern(size), timeout=DEADLINE)
        assert sorted(len(pair.receive(pair.passive)) for _ in sizes) == sizes
    assert receiving.budget.in_use == 0
    # A delivered message is FLARE's; it may be gone a moment after the next one starts.
    assert 0 < most[0] <= (4 << 20) + 2 * receiving.pool.cost(1_500_000)


def test_a_received_message_stays_intact_while_it_is_held():
    """A slot is re-used only when its last view is gone."""
    with link_pair() as pair:
        held = []
        for i in range(10):
            pair.active.send(bytes([i]) * 100_000, timeout=DEADLINE)
            held.append(pair.receive(pair.passive)[10:20])
        assert [bytes(part) for part in held] == [bytes([i]) * 10 for i in range(10)]
        del held
        gc.collect()
        assert pair.passive_context.pool.idle_bytes > 0


def test_send_fails_with_the_reason_when_the_peer_takes_nothing():
    stuck = threading.Event()
    sending = context(window=1 << 20)
    with link_pair(active_context=sending) as pair:
        pair.passive._deliver = lambda message: stuck.wait(DEADLINE)  # the peer's application hangs

        def send_many() -> None:
            for _ in range(40):
                pair.active.send(bytes(1 << 20), timeout=0.2)

        with pytest.raises(SendTimeoutError, match=r"took none of \d+ bytes within 0.2 s \(streaming_send_timeout\)"):
            send_many()
        stuck.set()


def test_closing_lets_what_was_sent_arrive():
    with link_pair() as pair:
        pair.active.send(pattern(20_000_000), timeout=DEADLINE)
        pair.active.close()
        assert bytes(pair.receive(pair.passive)) == pattern(20_000_000)
        with pytest.raises(TransferError):
            pair.active.send(b"late", timeout=1)
        pair.join()
        with pytest.raises(TransferError, match="closed"):
            pair.passive.send(b"late", timeout=1)


def test_a_normal_end_logs_no_error(caplog):
    with caplog.at_level(logging.WARNING), link_pair() as pair:
        pair.active.send(pattern(300_000), timeout=DEADLINE)
        pair.receive(pair.passive)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_peer_that_vanishes_ends_the_link_and_frees_the_memory():
    budget = None
    with link_pair() as pair:
        budget, accepted = pair.passive_context.budget, threading.Event()
        start = pair.passive._start

        def start_and_vanish(*args) -> None:
            start(*args)
            accepted.set()

        pair.passive._start = start_and_vanish
        pair.active._writable().write = lambda *args: None  # granted, but never written
        pair.active.send(pattern(300_000), timeout=DEADLINE)
        assert accepted.wait(DEADLINE)
        assert budget.in_use > 0
        pair.active._stream.close()
        for sock in pair.active._endpoint._sockets:
            sock.shutdown(socket.SHUT_RDWR)
        pair.join()
        with pytest.raises(TransferError):
            pair.passive.send(pattern(300_000), timeout=1)
    assert budget.in_use == 0


def test_an_altered_sealed_chunk_is_detected_and_nothing_is_delivered(tls, caplog):
    with link_pair(tls=tls) as pair:
        endpoint, write = pair.active._endpoint, pair.active._endpoint.write

        def flip_one_bit(source, remote, notification):
            source[len(source) // 2] ^= 1
            write(source, remote, notification)

        endpoint.write = flip_one_bit
        pair.active.send(pattern(300_000), timeout=DEADLINE)
        pair.join()
        assert pair.inbox[pair.passive].empty()
    assert "does not match its seal: it was altered on the way" in caplog.text
    assert pair.passive_context.budget.in_use == 0


def test_a_peer_that_breaks_the_protocol_is_disconnected_and_told_why(caplog):
    with link_pair() as pair:
        pair.active._stream.send([b"\x00\x00\x00\x01\xee"])
        pair.join()
    assert "passive: disconnected, the peer broke the protocol: control message of unknown type 238" in caplog.text
    assert "active: the peer disconnected: control message of unknown type 238" in caplog.text


def test_no_common_fabric_is_an_error_on_both_sides_that_names_the_setting():
    only_verbs = context()
    only_verbs = type(only_verbs)(
        only_verbs.limits, only_verbs.budget, only_verbs.pool, ("verbs",), only_verbs.unavailable
    )
    with pytest.raises(RdmaError, match="rdma_fabrics=verbs"), link_pair(only_verbs, only_verbs):
        pass
