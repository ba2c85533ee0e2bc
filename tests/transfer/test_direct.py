"""Whole messages between cells: a `Service` and `pull`, joined by a function call where FLARE's messages would be."""

from __future__ import annotations

import itertools
import logging
import threading

import numpy as np
import pytest
import torch

from nvflare_rdma.channel.link import Link
from nvflare_rdma.errors import FabricUnavailable, TransferError
from nvflare_rdma.transfer import bundles, content, manifest, receiver, service
from nvflare_rdma.transfer.arrays import to_bytes
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.receiver import AbortedError, pull
from nvflare_rdma.transfer.service import Service
from tests.support.bodies import TestSink
from tests.support.data_channels import ANY_PORT
from tests.support.direct_transfers import LARGE, SEND, assert_equal, large, new, new_memory
from tests.support.tcp_pair import DEADLINE, in_parallel
from tests.support.waiting import eventually

# -- what arrives is what was sent -------------------------------------------------------------------------


def torch_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    dtypes = "float32 float16 bfloat16 float64 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 uint8 uint16 bool"
    tensors = {}
    for name in (*dtypes.split(), "complex64", "complex128"):
        dtype = getattr(torch, name)
        for size in (5, LARGE):
            bits = torch.randint(0, 2 if name == "bool" else 256, (size * dtype.itemsize,), dtype=torch.uint8)
            tensors[f"{name} {size}"] = bits.view(dtype)
        tensors[f"{name} scalar"] = torch.ones((), dtype=dtype)
        tensors[f"{name} empty"] = torch.empty(0, 3, dtype=dtype)
    base = torch.randn(130, 170)
    return tensors | {
        "transposed": base.T,
        "expanded": torch.arange(3.0).expand(LARGE, 3),
        "strided": base[::2, 1::3].repeat(4, 3)[:, ::2],
        "conjugated": torch.randn(LARGE, dtype=torch.complex64).conj(),
        "negated": torch._neg_view(torch.randn(LARGE)),
        "parameter": torch.nn.Parameter(base.clone()).detach().requires_grad_(),
        "small parameter": torch.ones(3, requires_grad=True),
        "within": base[3:100],
    }


def numpy_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    dtypes = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128"
    arrays = {}
    for name in dtypes.split():
        for size in (5, LARGE):
            bits = rng.integers(0, 2 if name == "bool" else 256, size * np.dtype(name).itemsize, dtype=np.uint8)
            arrays[f"{name} {size}"] = bits.view(name)
        arrays[f"{name} scalar"] = np.ones((), name)
        arrays[f"{name} empty"] = np.empty((2, 0), name)
    base = rng.random((130, 170))
    frozen = base.copy()
    frozen.flags.writeable = False
    return arrays | {
        "fortran": np.asfortranarray(base),
        "strided": base[::2, ::-1],
        "within": base[3:100],
        "read-only": frozen,
        "broadcast": np.broadcast_to(np.float32(3), (LARGE,)),
    }


@pytest.mark.parametrize("fabrics", [("tcp",), ("shm", "tcp")], ids=["tcp", "shm"])
@pytest.mark.parametrize("make", [torch_tensors, numpy_arrays])
def test_tensors_of_all_kinds(make, fabrics, direct, cell):
    sent = make()
    before = {name: (bytes(to_bytes(t)), getattr(t, "requires_grad", None)) for name, t in sent.items()}
    it, site = direct(sent, fabrics=fabrics), cell("site-1", fabrics=fabrics)
    got = it.pull(site)
    assert_equal(got, sent)
    assert {name: (bytes(to_bytes(t)), getattr(t, "requires_grad", None)) for name, t in sent.items()} == before
    for tensor in got.values():
        tensor[...] = 0  # the receiver's own
    assert {name: bytes(to_bytes(t)) for name, t in sent.items()} == {name: b for name, (b, _) in before.items()}
    assert site.find("server").fabric == fabrics[0]
    assert it.asked == ["describe", "send", "done"]
    assert it.service.has_served("site-1")
    apart = [t for t in sent.values() if len(to_bytes(t))]
    eventually(lambda: sorted(it.moved) == sorted(("site-1", len(to_bytes(t)), 1) for t in apart), DEADLINE)


def test_small_tensors_alone_need_no_channel(direct, cell, monkeypatch):
    monkeypatch.setattr(content, "SMALL_TOTAL", manifest.SMALL_TOTAL)
    sent = {"a": torch.ones(3), "b": np.zeros((2, 2))}
    it = direct(sent, ports=None)
    assert_equal(it.pull(cell("site-1", ports=None)), sent)
    assert it.asked == ["describe", "done"]


def test_many_small_tensors_do_not_swell_the_manifest(direct, cell, monkeypatch):
    monkeypatch.setattr(content, "INLINE_TOTAL", 25_000)
    sent = {f"t{i}": np.full(10_000, i, np.uint8) for i in range(100)}  # more, too, than are offered at once
    it = direct(sent)
    inside = [i for i in manifest.unpack(it.ask("x")({"do": "describe"})["manifest"]) if i.content is not None]
    assert len(inside) == 2
    assert_equal(it.pull(cell("site-1")), sent)


def test_progress_is_told(direct, cell):
    sent, told = large(3), []
    direct(sent).pull(cell("site-1"), progress=told.append)
    assert (told[-1].items, told[-1].nbytes) == (3, 300_000)
    assert told == sorted(told, key=lambda done: done.items)


# -- ways --------------------------------------------------------------------------------------------------


def test_the_sender_dials_where_only_the_receiver_has_a_door(direct, cell):
    sent = large(3)
    it = direct(sent, ports=None)
    site = cell("site-1")
    for _ in range(2):
        assert_equal(it.pull(site), sent)
    assert len(it.channels._links["site-1"]) == 1  # the first one's serves the second


def test_without_any_door_both_reasons_are_given(direct, cell):
    it = direct(large(1), ports=None)
    with pytest.raises(FabricUnavailable) as caught:
        it.pull(cell("site-1", ports=None))
    assert "site-1 does not listen for data" in str(caught.value)
    assert "server does not listen for data" in str(caught.value)
    assert it.asked == ["describe"]


def test_three_receivers_at_once(direct, cell):
    sent = large(20)
    it = direct(sent)
    sites = [cell(f"site-{i}", ports=None) for i in range(3)]
    in_parallel(*(lambda site=site: assert_equal(it.pull(site), sent) for site in sites))
    assert all(it.service.has_served(site.name) for site in sites)


def test_two_messages_at_once_over_one_channel_and_both_ways(cell, direct):
    first, second = large(20), {f"u{i}": torch.full((50_000,), float(i)) for i in range(20)}
    it, site = direct(first), cell("site-1", ports=None)
    other, back = Service(TensorContent(second), lambda: it.channels), Service(TensorContent(second), lambda: site)
    it.pull(site)  # so that there is a channel
    in_parallel(
        lambda: assert_equal(it.pull(site), first),
        lambda: assert_equal(pull(site, "server", lambda r: other.answer(r, "site-1"), new), second),
        lambda: assert_equal(pull(it.channels, "site-1", lambda r: back.answer(r, "server"), new), second),
    )
    assert len(it.channels._links["site-1"]) == 1


@pytest.mark.parametrize("dialler", ["receiver", "sender"])
def test_a_channel_that_its_dialler_saw_open_first_is_waited_for(dialler, direct, cell, monkeypatch):
    sent = large(3)
    it, site = direct(sent, ports=ANY_PORT if dialler == "receiver" else None), cell("site-1")
    passive = it.channels if dialler == "receiver" else site
    opened, open_link, await_open = threading.Event(), Link.open, passive.await_open

    def slow(link: Link) -> None:
        open_link(link)
        if f"data {passive.name} -" in link.name:
            assert opened.wait(DEADLINE)

    def asked(peer: str, *patience: float) -> Link | None:
        assert passive.find(peer) is None
        opened.set()
        return await_open(peer, *patience)

    monkeypatch.setattr(Link, "open", slow)
    monkeypatch.setattr(passive, "await_open", asked)
    assert_equal(it.pull(site), sent)
    assert it.asked == ["describe", "send", "done"]


@pytest.mark.parametrize("blind", ["receiver", "sender"])
def test_one_side_may_not_have_noticed_that_the_channel_is_gone(blind, direct, cell):
    it, site = direct(large(3)), cell("site-1", ports=None)
    it.pull(site)
    lost = it.channels.find("site-1") if blind == "receiver" else site.find("server")
    lost._failure = "the peer closed the connection"
    assert_equal(it.pull(site), large(3))
    assert lost not in (it.channels.find("site-1"), site.find("server"))


# -- when things break -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["receiver", "sender", "socket"])
@pytest.mark.parametrize("doors", [(ANY_PORT, None), (None, ANY_PORT)], ids=["receiver-dials", "sender-dials"])
def test_a_channel_that_breaks_is_opened_again_for_what_is_missing(side, doors, direct, cell):
    sent = large(200)
    it, site = direct(sent, ports=doors[0]), cell("site-1", ports=doors[1])
    asked: list[list[int]] = []
    ask = it.ask("site-1")

    def listen(request: dict) -> dict:
        if request["do"] == "send":
            asked.append(list(request["items"]))
        return ask(request)

    def cut() -> None:
        link = (it.channels if side == "sender" else site).find("site-1" if side == "sender" else "server")
        if side == "socket":
            link._stream.close()
        else:
            link.close(0.0)

    assert_equal(pull(site, "server", listen, new, progress=it.once_some_are_here(cut)), sent)
    assert len(asked) >= 2
    assert asked[0] == list(range(200))
    for earlier, later in itertools.pairwise(asked):
        assert set(later) < set(earlier)  # what was here was not sent again
    assert it.service.has_served("site-1")


def test_a_sender_that_ends_the_transfer_ends_it_for_all(direct, cell, monkeypatch):
    monkeypatch.setattr(receiver, "REPORT_SECONDS", 0.1)  # what is offered may be here: nothing else tells
    it, sites = direct(large(200)), [cell(f"site-{i}", ports=None) for i in range(2)]

    def fails(site, **progress) -> None:
        with pytest.raises(TransferError, match="the sender has ended the transfer"):
            it.pull(site, **progress)

    # The other one may be anywhere then, and not even have a link.
    end = it.once_some_are_here(it.service.close)
    in_parallel(lambda: fails(sites[0], progress=end), lambda: fails(sites[1]))
    eventually(lambda: not it.senders, DEADLINE)
    # The channels serve others.
    assert it.channels.find("site-0") is not None


def test_a_sender_whose_channels_are_closed_refuses(direct, cell):
    it, site = direct(large(200)), cell("site-1", ports=None)
    with pytest.raises(FabricUnavailable, match=r"neither side has a door: .*; server is ending"):
        it.pull(site, progress=it.once_some_are_here(it.channels.close))


def test_aborted(direct, cell):
    it, site = direct(large(200)), cell("site-1")
    stop = threading.Event()
    with pytest.raises(AbortedError, match="the transfer from server was aborted"):
        it.pull(site, aborted=stop.is_set, progress=it.once_some_are_here(stop.set))
    assert it.requests[-1] == "give up"
    eventually(lambda: not it.senders, DEADLINE)  # it does not go on
    eventually(lambda: not it.channels.find("site-1")._outbox._messages, DEADLINE)
    assert not it.service.has_served("site-1")
    assert_equal(it.pull(site), large(200))  # over the same channel


def test_a_sender_sees_for_itself_what_has_arrived(direct, cell):
    sent = large(200) | {"small": np.ones(3)}
    it, site = direct(sent), cell("site-1")
    assert not it.service.has_served("site-1")
    assert_equal(it.confirmed(site), sent)
    assert it.asked == ["describe", "send"]
    assert it.service.has_served("site-1")
    assert len(it.moved) == 201
    it.ask("site-1")({"do": "describe"})
    assert not it.service.has_served("site-1")  # it begins anew

    assert_equal(it.confirmed(site), sent)
    it.ask("site-1")({"do": "describe"})
    assert not it.service.has_served("site-1")  # although the last sender has sent it all


def test_a_sender_that_can_not_see_it_is_told(direct, cell):
    it, site = direct(large(200)), cell("site-2")

    def break_it(done: receiver.Progress) -> None:
        if done.items == 200:
            it.channels.close()
            eventually(lambda: site.find("server") is None, DEADLINE)

    assert_equal(it.confirmed(site, progress=break_it), large(200))
    assert it.asked == ["describe", "send", "done"]
    assert it.service.has_served("site-2")


def test_a_sender_does_not_take_for_served_who_may_miss_something(direct, cell, monkeypatch):
    monkeypatch.setattr(service, "_NOTICE_SECONDS", 0.05)
    it, site = direct(large(5)), cell("site-1")
    it.go_on.clear()
    assert_equal(it.confirmed(site), large(5))
    assert not it.service.has_served("site-1")  # it is still at the first
    it.go_on.set()
    monkeypatch.setattr(service, "_NOTICE_SECONDS", DEADLINE)
    assert it.service.has_served("site-1")

    it, site = direct(large(200)), cell("site-2", ports=None)
    with pytest.raises(FabricUnavailable, match="neither side has a door"):
        it.confirmed(site, progress=it.once_some_are_here(it.channels.close))
    assert not it.service.has_served("site-2")


@pytest.mark.parametrize("how", ["aborted", "ended", "asked again"])
def test_what_is_being_sent_then_is_not_sent_to_the_end(how, direct, cell, monkeypatch, caplog):
    monkeypatch.setattr(receiver, "REPORT_SECONDS", 0.1)
    over, stop, read = threading.Event(), threading.Event(), bundles.read_run

    def slow(*args) -> None:
        assert over.wait(DEADLINE)
        read(*args)

    monkeypatch.setattr(bundles, "read_run", slow)  # for what is not contiguous
    it, site = direct({"a": np.zeros(100_000, np.uint8), "b": np.zeros(200_000, np.uint8)[::2]}), cell("site-1")

    def act() -> None:
        eventually(lambda: it.moved, DEADLINE)  # the sender may hear later than the receiver that the first has arrived
        if how == "ended":
            it.service.close()
            return
        if how == "asked again":
            assert it.ask("site-1")({**SEND, "items": []}) == {"sending": 0, "sees": True}
        stop.set()

    with pytest.raises(TransferError):
        it.pull(site, aborted=stop.is_set, progress=lambda done: act() if done.items else None)
    over.set()
    eventually(lambda: not it.senders, DEADLINE)
    assert it.moved == [("site-1", 100_000, 1)]
    assert not [line for line in caplog.records if line.levelno >= logging.ERROR]  # not one for each tensor


@pytest.mark.parametrize("what", ["allocate", "progress", "done"])
def test_a_receiver_that_fails_gives_up(what, direct, cell):
    it, site = direct(large(200)), cell("site-1")
    ask = it.ask("site-1")

    def fail(*args) -> memoryview:
        raise MemoryError("it breaks here")

    def answer(request: dict) -> dict:
        found = ask(request)  # the answer is lost, what was asked for is done
        return fail() if request["do"] == what else found

    kinds = {what: fail} if what == "progress" else {}
    with pytest.raises(MemoryError, match="it breaks here"):
        pull(site, "server", answer, fail if what == "allocate" else new, **kinds)
    assert (
        it.asked
        == {
            "allocate": ["describe"],  # nothing to give up
            "progress": ["describe", "send", "give up"],
            "done": ["describe", "send", "done", "give up"],
        }[what]
    )
    assert not it.service.has_served("site-1")  # who comes in FLARE's way gets it all
    eventually(lambda: not it.senders, DEADLINE)


def test_a_failing_callback_of_the_sender_is_told_to_the_receiver(direct, cell, monkeypatch, caplog):
    monkeypatch.setattr(receiver, "REPORT_SECONDS", 0.01)
    it, site = direct(large(200)), cell("site-1")
    it.service._moved = lambda *what: 1 / 0
    # Each attempt brings some.
    assert_equal(it.pull(site), large(200))
    assert "division by zero" in caplog.text


def test_nothing_comes(direct, cell, monkeypatch):
    """The channel lives, and the sender sees nothing wrong."""
    monkeypatch.setattr(receiver, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(service.OfferThread, "run", lambda self: None)
    with pytest.raises(TransferError, match=r"1 of 1 items did not come from server: nothing has come for 0.05 s"):
        direct(large(1)).pull(cell("site-1", stall=0.05))


def test_a_new_request_ends_the_one_before(direct, cell):
    """And what was late of that one has no place in this one."""
    it, site = direct(large(5)), cell("site-1")
    it.channels.dial("site-1", site.invite("server"))
    it.ask("site-1")({"do": "describe"})
    answer = it.ask("site-1")({"do": "send", "first": 77, "items": list(range(5)), "invitation": None})
    assert answer["sending"] == 5
    eventually(lambda: "nothing expected as 77" in it.ask("site-1")({"do": "report"})["failed"], DEADLINE)
    assert_equal(it.pull(site), large(5))


def test_an_end_that_comes_while_a_request_is_answered(direct, cell):
    it, site = direct(large(1)), cell("site-1")
    it.ask("site-1")({"do": "describe"})
    it.channels.dial("site-1", site.invite("server"))
    link = it.channels.find("site-1")
    it.channels.await_open = lambda peer: it.service.close() or link
    assert it.ask("site-1")(SEND) == {"sending": 1, "sees": True}
    eventually(lambda: all(thread.name != "rdma-offers" for thread in threading.enumerate()), DEADLINE)
    assert link.idle
    assert it.ask("site-1")({"do": "report"}) == {"failed": "nothing is being sent"}


def test_an_end_that_comes_while_a_tensor_is_offered(direct, cell):
    """It is in nobody's hands in that moment."""
    it, site = direct(large(1)), cell("site-1")
    it.ask("site-1")({"do": "describe"})
    link = it.channels.dial("site-1", site.invite("server"))
    offer, withdraw, sendings, withdrawn = link.offer, link.withdraw, [], []

    def offered(*args):
        sendings.append(offer(*args))
        it.service.close()
        return sendings[0]

    def withdrew(sender, reason: str) -> None:
        withdrawn.append((sender, reason))
        withdraw(sender, reason)

    link.offer, link.withdraw = offered, withdrew
    label = site.expected.expect("server", [TestSink(100_000)])
    assert it.ask("site-1")({**SEND, "first": label}) == {"sending": 1, "sees": True}
    eventually(lambda: not it.senders, DEADLINE)
    site.expected.forget("server", label, 1)
    assert withdrawn[0] == (sendings[0], "the sender has ended the transfer")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(300, 301).t(),
        torch.randn(40, 50, 60).bfloat16().permute(2, 0, 1),
        torch.randint(0, 99, (300, 301), dtype=torch.uint8).t(),
        torch.randn(90, 1000, dtype=torch.complex64)[:, ::3].conj(),
        torch.randn(200, 301, dtype=torch.complex128).t(),
        np.random.default_rng(1).standard_normal((300, 301))[::-1].T,
    ],
    ids=["float32", "bfloat16", "uint8", "conjugated", "complex128", "numpy"],
)
def test_what_is_not_contiguous_is_copied_chunk_by_chunk(tensor):
    source, whole = content.TensorSource(tensor, tensor.nbytes), bytes(to_bytes(tensor))
    taken: list[int] = []

    def take(nbytes: int) -> memoryview:
        taken.append(nbytes)
        return new_memory(nbytes)

    for length in (tensor.nbytes, 4097):
        chunks = [source.read(at, min(length, len(whole) - at), take) for at in range(0, len(whole), length)]
        assert b"".join(chunks) == whole
    assert max(taken[1:]) <= 4097 + 2 * 16
