"""A peer whose link is gone, and that does not answer for a while: what has landed is not sent again."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.marks import marked
from nvflare_rdma.errors import FabricUnavailable, ProtocolError, TransferError
from nvflare_rdma.transfer import patience, service
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.patience import AbortedError, LostError
from nvflare_rdma.transfer.places import EncodedInMemory
from nvflare_rdma.transfer.receiver import pull
from nvflare_rdma.transfer.sinks import Beginning
from tests.support.certificates import Authority
from tests.support.direct_transfers import assert_equal, large, new, new_memory
from tests.support.link_process import tls_context
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

HOUR = 3600.0
VALUES = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(patience, "_LINK_PAUSE", 0.01)


class Gate:
    """Stops a sender in the middle of a tensor, once, and counts what it reads."""

    def __init__(self, monkeypatch, portion: float) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        #: Bytes before that place that were read after it had gone on.
        self.again = 0
        #: Everything before this lands.
        self.place = 0
        lock, make = threading.Lock(), TensorContent.source

        def source(content, item):
            made = make(content, item)
            read = made.read

            def gated(offset, length, take):
                with lock:
                    self.again += length if self.go_on.is_set() and offset < self.place else 0
                if offset + length > portion * item.sent_nbytes and not self.go_on.is_set():
                    self.place = min(self.place or offset, offset)
                    self.reached.set()
                    assert self.go_on.wait(DEADLINE)
                return read(offset, length, take)

            made.read = gated
            return made

        monkeypatch.setattr(TensorContent, "source", source)


class Away:
    """A pull of the cell "site-1" from "server", which can be cut off in the middle of it."""

    def __init__(self, it, site, land=new) -> None:
        self.it, self.site, self.land = it, site, land
        it.channels.patience = site.patience = HOUR
        self.is_away = threading.Event()
        self.lost = 0
        self.result: list = []
        self.thread = threading.Thread(target=self.pull)

    def ask(self, request):
        if self.is_away.is_set():
            self.lost += 1
            raise LostError(f"server did not answer {request['do']!r}")
        return self.it.ask("site-1")(request)

    def pull(self, **kinds):
        try:
            self.result.append(pull(self.site, "server", self.ask, self.land, **kinds))
        except Exception as error:  # noqa: BLE001 - for the test to look at
            self.result.append(error)

    def cut(self) -> None:
        """Both ends lose their link, and the site can't reach the server."""
        self.is_away.set()
        for one, other in ((self.site, "server"), (self.it.channels, "site-1")):
            if (link := one.find(other)) is not None:
                link.close(0.0)

    def come_back(self):
        lost = self.lost
        eventually(lambda: self.lost > lost + 1)
        self.is_away.clear()
        return self.end()

    def end(self):
        self.thread.join(DEADLINE)
        (got,) = self.result
        if isinstance(got, Exception):
            raise got
        return got


def stopped(gate, gone) -> None:
    """Wait until what comes before the gate has landed."""
    assert gate.reached.wait(DEADLINE)
    eventually(lambda: gone.site.arriving("server") >= gate.place)


@pytest.fixture
def away(direct, cell, monkeypatch):
    """away(tensors, portion, ...) -> Away and its Gate, when the sender has come to the gate."""
    gates = []

    def make(tensors, portion=0.75, land=new, **kinds):
        gates.append(Gate(monkeypatch, portion))
        it = direct(tensors, **kinds)
        made = Away(it, cell("site-1", **({"ports": None} | {k: v for k, v in kinds.items() if k == "tls"})), land)
        made.thread.start()
        stopped(gates[-1], made)
        return made, gates[-1]

    yield make
    for gate in gates:
        gate.go_on.set()


def tensor(coded):
    values = torch.arange(VALUES * (8 if coded else 1)).float()
    return {"w": marked(values, get_codec("normfloat4")) if coded else values}


@pytest.mark.parametrize("how", ["clear", "secure", "encoded"])
def test_a_tensor_goes_on_where_it_was_cut(away, how, tmp_path):
    kinds = {}
    if how == "secure":
        authority = Authority(tmp_path)
        files = {**authority.issue("server", "server"), **authority.issue("client", "client")}
        kinds["tls"] = functools.partial(tls_context, files)
    sent = tensor(how == "encoded")
    gone, gate = away(sent, **kinds)
    gone.cut()
    gate.go_on.set()
    got = gone.come_back()
    if how == "encoded":
        assert float((got["w"] - sent["w"]).abs().max()) < 100  # of blocks of 64 consecutive numbers
    else:
        assert_equal(got, sent)
    assert not gate.again


def test_a_tensor_that_stays_encoded_goes_on_where_it_was_cut(away):
    gone, gate = away(tensor(True), land=lambda item: EncodedInMemory(item, new_memory(item.sent_nbytes), as_it_came))
    gone.cut()
    gate.go_on.set()
    got = gone.come_back()
    assert not gate.again
    assert got == gone.it.pull(gone.site, land=gone.land)


def as_it_came(item, memory):
    return bytes(memory)


def test_over_a_link_that_is_there_again_one_request_has_a_tensor_go_on(away):
    gone, gate = away(tensor(False))
    gone.cut()
    gate.go_on.set()
    eventually(lambda: gone.lost)
    gone.site.dial("server", gone.it.channels.invite("site-1"))
    eventually(lambda: gone.it.channels.find("site-1"), DEADLINE)
    gone.it.requests.clear()
    assert_equal(gone.come_back(), tensor(False))
    assert not gate.again
    assert set(gone.it.requests) == {"report", "describe", "done"}


def test_a_receiver_that_is_dialled_goes_on_as_well(direct, cell, monkeypatch):
    gate = Gate(monkeypatch, 0.75)
    sent = tensor(False)
    it = direct(sent, ports=None)
    gone = Away(it, cell("site-1"))
    gone.thread.start()
    stopped(gate, gone)
    gone.cut()
    gate.go_on.set()
    assert_equal(gone.come_back(), sent)
    assert not gate.again


def test_what_is_sent_otherwise_than_before_begins_anew(away):
    gone, gate = away(tensor(True))
    gone.cut()
    gone.it.service._open_content()._note_exact("w", "its codec can't carry it")
    gate.go_on.set()
    assert_equal(gone.come_back(), {"w": torch.arange(VALUES * 8).float()})


def test_a_sender_that_does_not_know_how_begins_anew(away, monkeypatch):
    gone, gate = away(tensor(False))
    gone.cut()
    describe = gone.it.service._describe

    def older(request, receiver):
        answer = describe({name: it for name, it in request.items() if name != "starts"}, receiver)
        return {name: it for name, it in answer.items() if name not in ("starts", "resumes")}

    monkeypatch.setattr(gone.it.service, "_describe", older)
    gate.go_on.set()
    assert_equal(gone.come_back(), tensor(False))
    assert gate.again


def test_whoever_has_ended_is_not_waited_for(away, monkeypatch):
    monkeypatch.setattr(patience, "_ENDED_EVERY", 0.0)
    gone, gate = away(tensor(False))
    gone.site.has_ended = lambda peer: peer == "server"
    gone.cut()
    gate.go_on.set()
    with pytest.raises(TransferError, match="its process has ended, as its parent shows"):
        gone.end()


def test_patience_has_an_end(away):
    gone, gate = away(tensor(False))
    gone.site.patience = 0.2
    gone.cut()
    gate.go_on.set()
    with pytest.raises(TransferError, match=r"did not answer 'describe'; it has been waited for, for 0.2 s"):
        gone.end()


def test_a_run_that_ends_waits_no_longer(away):
    gone, gate = away(tensor(False))
    gone.cut()
    gate.go_on.set()
    eventually(lambda: gone.lost > 1)
    gone.site.close()
    with pytest.raises(TransferError, match="this side is ending"):
        gone.end()


def test_an_abort_is_heard_while_it_waits(direct, cell):
    gone = Away(direct(tensor(False)), cell("site-1"))
    gone.is_away.set()
    aborted = threading.Event()
    thread = threading.Thread(target=lambda: gone.pull(aborted=aborted.is_set))
    thread.start()
    eventually(lambda: gone.lost > 1)
    aborted.set()
    thread.join(DEADLINE)
    assert isinstance(gone.result[0], AbortedError)


def test_a_peer_that_does_not_answer_at_first_is_waited_for(direct, cell):
    gone = Away(direct(large(2)), cell("site-1"))
    gone.is_away.set()
    gone.thread.start()
    assert_equal(gone.come_back(), large(2))


def test_a_peer_whose_link_is_there_is_asked_again_after_a_pause_only(direct, cell, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE", HOUR)
    gone, stop = Away(direct(large(3)), cell("site-1")), threading.Event()
    pull(gone.site, "server", gone.it.ask("site-1"), new)  # which opens a link
    assert gone.site.find("server") is not None
    looks, look = [], gone.site.await_other

    def noted(*args):
        looks.append(args)
        return look(*args)

    monkeypatch.setattr(gone.site, "await_other", noted)
    gone.is_away.set()
    gone.thread = threading.Thread(target=gone.pull, kwargs={"aborted": stop.is_set})
    gone.thread.start()
    eventually(lambda: len(looks) > 3, DEADLINE)  # each without an answer
    stop.set()
    with pytest.raises(AbortedError):
        gone.end()
    assert gone.lost == 2  # the first question, and that it is not wanted any more


def test_a_way_that_never_was_is_not_waited_for(direct, cell):
    gone = Away(direct(large(2), ports=None), cell("site-1", ports=None))
    gone.pull()
    assert isinstance(gone.result[0], FabricUnavailable)


def test_a_peer_that_answers_and_opens_no_link_is_given_up(away):
    gone, gate = away(tensor(False))
    invitation = gone.it.channels.invite

    def elsewhere(peer):
        return invitation(peer) | {"port": 1}

    gone.it.channels.invite = elsewhere
    gone.cut()
    gate.go_on.set()
    gone.is_away.clear()
    with pytest.raises(TransferError, match="no direct way from site-1 to server"):
        gone.end()


def test_a_sender_keeps_telling_flare_that_it_waits(away, monkeypatch):
    monkeypatch.setattr(service, "_WAITING_EVERY", 0.0)
    gone, gate = away(tensor(False))
    assert gone.it.service.is_busy
    gone.cut()
    gate.go_on.set()
    eventually(lambda: ("site-1", 0, 0) in gone.it.moved)
    assert gone.it.service.is_busy
    assert_equal(gone.come_back(), tensor(False))
    eventually(lambda: not gone.it.service.is_busy)


def test_a_sender_lets_go_of_a_receiver_that_has_ended(away, monkeypatch):
    monkeypatch.setattr(service, "_ENDED_EVERY", 0.0)
    gone, gate = away(tensor(False))
    gone.it.channels.has_ended = lambda peer: True
    gone.cut()
    gate.go_on.set()
    eventually(lambda: not gone.it.service.is_busy)
    gone.site.close()
    gone.thread.join(DEADLINE)


@pytest.mark.parametrize("starts", [[1, 2], "12", [-1], [VALUES * 4], [None], [1.0]])
def test_a_request_to_go_on_where_nothing_can_is_refused(direct, starts):
    it = direct(tensor(False))
    ask = it.ask("site-1")
    ask({"do": "describe"})
    answer = ask({"do": "send", "first": 1, "items": [0], "invitation": None, "starts": starts})
    assert answer["refused"]


def test_a_request_to_go_on_within_a_unit_is_refused(direct):
    it = direct(tensor(True))
    it.ask("site-1")({"do": "describe"})
    with pytest.raises(ProtocolError, match="where no unit of an item begins"):
        it.service._send({"first": 1, "items": [0], "starts": [5]}, "site-1")


def test_the_beginning_grows_where_gaps_are_filled():
    here = Beginning(10)
    here.add(30, 10)
    assert here.nbytes == 10
    here.add(10, 10)
    assert here.nbytes == 20
    here.add(10, 10)
    here.add(20, 10)
    assert here.nbytes == 40
    assert not here._beyond


def test_chunks_beyond_a_gap_are_not_all_looked_at_for_each_that_lands():
    looks = 0

    class Offset(int):
        def __lt__(self, other):
            nonlocal looks
            looks += 1
            return int(self) < int(other)

        def __le__(self, other):
            nonlocal looks
            looks += 1
            return int(self) <= int(other)

    here, count = Beginning(0), 2000
    for number in [*range(1, count), 0]:
        here.add(Offset(10 * number), 10)
    assert here.nbytes == 10 * count
    assert looks < 50 * count
