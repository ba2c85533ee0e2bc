"""Peers that lie, and memory that is used again: see `test_direct`."""

from __future__ import annotations

import logging
import socket
import threading

import numpy as np
import pytest
import torch

from nvflare_rdma.errors import FabricUnavailable, ProtocolError, TransferError
from nvflare_rdma.transfer import manifest, receiver, service
from nvflare_rdma.transfer.addresses import TICKET_BYTES
from nvflare_rdma.transfer.arrays import TensorMemory
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.receiver import AbortedError, pull
from tests.support.direct_transfers import LARGE, SEND, assert_equal, large, new
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

# -- hostile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"describe": None}, ProtocolError),
        ({"describe": []}, ProtocolError),
        ({"describe": {}}, ProtocolError),
        ({"describe": {"manifest": b"\xc1"}}, ProtocolError),
        ({"describe": {"refused": "no"}}, TransferError),
        ({"describe": {"manifest": manifest.pack([Item("x", True, "int8", (1 << 20,))])}}, FabricUnavailable),
        ({"describe": {"manifest": manifest.pack([Item("x", True, "int8", (9,))]), "invitation": 5}}, ProtocolError),
        ({"send": None}, ProtocolError),
        ({"send": {"refused": "no"}}, TransferError),
        ({"report": {"failed": "it did"}}, TransferError),
        ({"done": "yes"}, ProtocolError),
    ],
    ids=str,
)
def test_hostile_answers(answers, error, direct, cell, monkeypatch):
    monkeypatch.setattr(receiver, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(receiver, "_LOOK_SECONDS", 0.001)
    if "report" in answers:
        monkeypatch.setattr(service.OfferThread, "run", lambda self: None)
    it, site = direct(large(1)), cell("site-1", ports=None)
    ask = it.ask("site-1")

    def answer(request: dict):
        return answers[request["do"]] if request["do"] in answers else ask(request)

    with pytest.raises(error):
        pull(site, "server", answer, new)
    assert not site.expected


def test_a_tensor_of_another_length_is_not_taken(direct, cell):
    it, site = direct({"x": np.zeros(50_000, np.uint8)}), cell("site-1")
    ask, other = it.ask("site-1"), manifest.pack([Item("x", False, "uint8", (50_001,))])

    def answer(request: dict) -> dict:
        return {**ask(request), **({"manifest": other} if request["do"] == "describe" else {})}

    with pytest.raises(TransferError, match=r"50001 bytes expected .* 50000 bytes are offered"):
        pull(site, "server", answer, new)


def test_a_tensor_that_this_side_has_not_is_told_before_all_is_forgotten(direct, cell):
    it, site = direct({"x": np.zeros(50_000, np.uint8)}), cell("site-1")
    ask, other = it.ask("site-1"), manifest.pack([Item("x", False, "uint8", (*[1] * 63, 50_000))])

    def answer(request: dict) -> dict:
        return {**ask(request), **({"manifest": other} if request["do"] == "describe" else {})}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "frombuffer", lambda *args: (_ for _ in ()).throw(ValueError("maximum dimension is 32")))
        with pytest.raises(ProtocolError, match=r"x can't be made of uint8 .* maximum dimension"):
            pull(site, "server", answer, new)
    assert not it.service.has_served("site-1")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (None, "unknown request None"),
        ([], "unknown request None"),
        ({"do": []}, "unknown request"),
        ({"do": "undo"}, "unknown request 'undo'"),
        ({"do": "send"}, "malformed request"),
        ({**SEND, "first": 0}, "malformed request"),
        ({**SEND, "first": 1 << 63}, "malformed request"),
        ({**SEND, "first": True}, "malformed request"),
        ({**SEND, "first": "1"}, "malformed request"),
        ({**SEND, "items": 0}, "malformed request"),
        ({**SEND, "items": [-1]}, "not in the manifest"),
        ({**SEND, "items": [2]}, "not in the manifest"),
        ({**SEND, "items": [False]}, "not in the manifest"),
        ({**SEND, "items": [[]]}, "not in the manifest"),
        ({**SEND, "items": [1]}, "not in the manifest"),
        ({**SEND, "items": [0, 0]}, "the same twice"),
        ({**SEND, "invitation": {"hosts": ["10.0.0.1"]}}, "an invitation to a side that has a door"),
        (SEND, "there is no link to site-1"),
    ],
    ids=str,
)
def test_hostile_requests(request_, reason, direct):
    it = direct({"large": np.zeros(LARGE), "small": np.zeros(1)})
    before = it.service.answer(SEND, "site-1")
    assert "not in the manifest" in before["refused"]  # which nobody has asked for
    it.ask("site-1")({"do": "describe"})
    assert reason in it.service.answer(request_, "site-1")["refused"]
    assert it.service.answer({"do": "report"}, "site-1") == {"failed": "nothing is being sent"}


def test_who_can_listen_dials_nobody_that_has_asked_for_something(direct):
    """Nothing has opened its door yet, and no request to describe goes before."""
    it = direct({"large": np.zeros(LARGE)})
    with socket.create_server(("127.0.0.1", 0)) as named:
        invitation = {"hosts": ["127.0.0.1"], "port": named.getsockname()[1], "ticket": bytes(TICKET_BYTES)}
        answer = it.service.answer({**SEND, "items": [], "invitation": invitation}, "site-1")
        assert "an invitation to a side that has a door" in answer["refused"]
        assert it.service.answer({"do": "report"}, "site-1") == {"failed": "nothing is being sent"}


def test_requests_to_dial_keep_none_of_the_threads_that_answer_others(direct, cell):
    """They come in threads that FLARE has for all sites. Who is dialled here takes its time, and many ask for it."""
    it = direct({"large": np.zeros(LARGE)}, ports=None)
    it.ask("site-1")({"do": "describe"})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        invitation = {"hosts": ["127.0.0.1"], "port": silent.getsockname()[1], "ticket": bytes(TICKET_BYTES)}
        request = {**SEND, "invitation": invitation}
        assert it.service.answer(request, "site-1") == {"sending": 1, "sees": True}
        guest, _ = silent.accept()
        with guest:
            for _ in range(200):
                assert "is being opened already" in it.service.answer(request, "site-1")["refused"]
            assert it.service.answer({"do": "report"}, "site-1")["failed"] == ""
            assert sum(thread.name == "rdma-offers" for thread in threading.enumerate()) == 1
        eventually(lambda: it.service.answer({"do": "report"}, "site-1")["failed"], DEADLINE)
        failed = "the sender can't reach the receiver's data port; its log says why"
        assert it.service.answer({"do": "report"}, "site-1") == {"failed": failed, "unreachable": True}


def test_few_threads_wait_for_what_a_site_has_not_taken_yet(direct, cell, monkeypatch):
    """FLARE's last request of a download waits here until the sender knows that everything has arrived."""
    monkeypatch.setattr(service, "_NOTICE_SECONDS", 600.0)
    it, site = direct(large(3)), cell("site-1", ports=None)
    it.go_on.clear()
    ask = it.ask("site-1")

    def slow(request: dict):
        assert request["do"] != "done" or it.go_on.wait(DEADLINE)
        return ask(request)

    pulling = threading.Thread(target=lambda: pull(site, "server", slow, new), daemon=True)
    pulling.start()
    eventually(lambda: it.moved, DEADLINE)
    with it.channels.waiting_places.place("site-1.a"), it.channels.waiting_places.place("site-1.b"):
        assert not it.service.has_served("site-1")
        # It was not waited for until the sender's thread has given up.
        assert any(thread.name == "rdma-offers" for thread in threading.enumerate())
    it.go_on.set()
    pulling.join(DEADLINE)
    assert not pulling.is_alive()


def test_a_sender_that_can_not_reach_the_receiver_says_so_and_the_receiver_gives_up(direct, cell):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    it, site = direct(large(1), ports=None), cell("site-1")
    site.invite = lambda peer: {"hosts": ["127.0.0.1"], "port": port, "ticket": bytes(TICKET_BYTES)}
    with pytest.raises(FabricUnavailable, match="no direct way from server to here: the sender can't reach"):
        it.pull(site)


def test_any_error_of_the_sender_is_a_refusal(direct, caplog):
    it = direct({"x": np.zeros(1)})

    def broken():
        raise RuntimeError("CUDA error")

    it.service._links = broken
    assert it.ask("site-1")({"do": "describe"}) == {"refused": "CUDA error"}
    assert caplog.records[-1].levelno == logging.ERROR


def test_what_is_no_plain_tensor_is_refused(direct, cell):
    with pytest.raises(TransferError, match="the peer refused: x is a ndarray of dtype object"):
        direct({"x": np.array([None])}).pull(cell("site-1"))


def test_after_the_end_everything_is_refused(direct, cell):
    it, site = direct(large(1)), cell("site-1")
    it.ask("site-1")({"do": "describe"})
    it.channels.dial("site-1", site.invite("server"))
    it.service.close()
    for request in ({"do": "describe"}, SEND):
        assert "has ended the transfer" in it.ask("site-1")(request)["refused"]


# -- memory ------------------------------------------------------------------------------------------------


def address(tensor) -> int:
    return tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data


@pytest.mark.parametrize("make", [torch.ones, np.ones])
def test_memory_is_used_again_when_nobody_holds_the_tensors(make, direct, cell):
    memory, site = TensorMemory(), cell("site-1")
    memory.keep_for([100_000 * 8])
    it = direct({"x": make(100_000)})
    first = it.pull(site, allocate=memory.take)["x"]
    second = it.pull(site, allocate=memory.take)["x"]
    assert address(first) != address(second)  # it is held
    part, where = first[10:20], address(first)
    del first
    third = it.pull(site, allocate=memory.take)["x"]
    assert address(third) != where  # a part of it is
    del part
    eventually(lambda: memory.idle_bytes, DEADLINE)
    fourth = it.pull(site, allocate=memory.take)["x"]
    assert address(fourth) == where
    assert_equal({"x": second, "y": third, "z": fourth}, dict.fromkeys("xyz", make(100_000)))
    del second, third, fourth
    eventually(lambda: memory.used_bytes == 0, DEADLINE)


def test_only_as_much_memory_is_kept_as_one_message_takes():
    memory = TensorMemory()
    held = [memory.take(1 << 20) for _ in range(3)]
    memory.keep_for([1 << 20, 10])
    del held
    assert memory.idle_bytes == 1 << 20
    memory.keep_for([5])  # a smaller one
    assert len(memory.take(1 << 20)) == 1 << 20


def test_what_a_transfer_that_failed_had_is_not_used_while_it_lands(direct, cell):
    """The link holds on to it until nothing can be written there any more."""
    memory, stop = TensorMemory(), threading.Event()
    it, site = direct(large(200)), cell("site-1")
    with pytest.raises(AbortedError):
        it.pull(site, allocate=memory.take, aborted=stop.is_set, progress=it.once_some_are_here(stop.set))
    for _ in range(3):
        assert_equal(it.pull(site, allocate=memory.take), large(200))
    eventually(lambda: memory.used_bytes == 0, DEADLINE)
