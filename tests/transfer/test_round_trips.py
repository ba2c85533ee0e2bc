"""How often a receiver waits for an answer: over an open link, one request brings the description and the items."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from nvflare_rdma.channel.protocol import wire
from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.marks import marked, was_decoded
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.transfer import bundles, content, manifest
from nvflare_rdma.transfer.expected import MAX_AHEAD
from nvflare_rdma.transfer.manifest import BUNDLED_BYTES
from nvflare_rdma.transfer.receiver import pull
from nvflare_rdma.transfer.service import Service
from tests.support.direct_transfers import assert_equal, large, new
from tests.support.encoded import as_encoded
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually


@pytest.fixture
def joined(direct, cell):
    """joined(tensors, ...) -> what is sent, and the cell of a site that has a link to its sender"""

    def make(tensors, **kinds):
        it, site = direct(tensors, **kinds), cell("site-1")
        site.dial("server", it.channels.invite("site-1"))
        eventually(lambda: it.channels.find("site-1"), DEADLINE)
        return it, site

    return make


def said(link, into: list[str]) -> None:
    """Note what a link says about messages on its control stream."""
    emit = link._core._incoming._emit

    def noted(message: wire.Message) -> None:
        into.append(f"{type(message).__name__} {getattr(message, 'transfer', '')}".strip())
        emit(message)

    link._core._incoming._emit = link._core._outgoing._emit = noted


# -- what is asked and said --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 200])
def test_over_an_open_link_one_request_brings_everything(count, joined):
    it, site = joined(large(count))
    assert_equal(it.confirmed(site), large(count))
    assert it.asked == ["describe"]
    assert it.service.has_served("site-1")
    eventually(lambda: len(it.moved) == count, DEADLINE)
    assert not it.senders


def test_what_is_said_of_one_tensor_is_its_offer_its_grant_and_that_it_is_here(joined):
    it, site = joined(large(1))
    words: list[str] = []
    said(it.channels.find("site-1"), words)
    said(site.find("server"), words)
    assert_equal(it.confirmed(site), large(1))
    assert words == ["Offer 1", "Grant 1", "Done 1"]


def test_offers_that_come_before_the_description_wait_and_nothing_is_granted(joined):
    it, site = joined(large(100))
    words: list[str] = []
    said(site.find("server"), words)
    ask = it.ask("site-1")

    def late(request: dict) -> dict:
        answer = ask(request)
        eventually(lambda: len(site.find("server").incoming()) == MAX_AHEAD, DEADLINE)
        assert not words
        assert site.budget.in_use == 0
        return answer

    assert_equal(it.confirmed(site, late), large(100))
    assert it.asked == ["describe"]
    assert words[0].startswith("Grant")


def test_a_first_transfer_opens_the_link_between_two_requests(direct, cell):
    it, site = direct(large(2)), cell("site-1")
    assert_equal(it.confirmed(site), large(2))
    assert it.asked == ["describe", "send"]
    it.requests.clear()
    assert_equal(it.confirmed(site), large(2))
    assert it.asked == ["describe"]


def test_nothing_is_sent_into_a_link_that_only_the_sender_has_still(direct, cell):
    it, before, site = direct(large(2), ports=None), cell("site-1"), cell("site-1")
    it.channels.dial("site-1", before.invite("server"))  # the site's last process
    stale = it.channels.find("site-1")
    told = []

    def ask(request: dict) -> dict:
        if request["do"] == "describe":
            request |= {"channel": False, "first": request.get("first") or site.expected.reserve("server")}
        told.append(it.ask("site-1")(request))
        return told[-1]

    assert_equal(it.confirmed(site, ask), large(2))
    assert it.asked == ["describe", "send"]
    assert told[0]["channel"] is True  # as far as the sender knows
    assert "sending" not in told[0]
    assert it.channels.find("site-1") is not stale


@pytest.mark.parametrize("old", ["sender", "receiver"])
def test_a_peer_of_the_last_release_asks_and_answers_as_it_did(old, joined):
    it, site = joined(large(3) | {"small": marked(torch.ones(3000), get_codec("int8"))})
    ask = it.ask("site-1")

    def answer(request: dict) -> dict:
        if request["do"] == "describe":
            request = {"do": "describe", "channel": request["channel"]}  # an old one knows no more
        return ask(request)

    got = it.confirmed(site, answer)
    assert_equal({name: got[name] for name in large(3)}, large(3))
    assert bytes(to_flat(got["small"])) == bytes(to_flat(torch.ones(3000)))
    assert it.asked == ["describe", "send"]
    described = ask({"do": "describe", "channel": True})
    assert {"sending", "sees"}.isdisjoint(described)
    assert [item.cut for item in manifest.unpack(described["manifest"])] == [None] * 4


def test_an_answer_that_was_lost_is_given_again_and_what_it_began_goes_on(joined):
    it, site = joined(large(100))
    ask, answers = it.ask("site-1"), []

    def twice(request: dict) -> dict:
        answers.append(ask(request))
        if request["do"] == "describe":
            eventually(lambda: len(site.find("server").incoming()) == MAX_AHEAD, DEADLINE)
            assert it.senders == 1
            answers.append(ask(request))
            assert it.senders == 1
        return answers[-1]

    assert_equal(it.confirmed(site, twice), large(100))
    assert answers[0] == answers[1]
    assert answers[0]["sending"] == 100
    assert it.asked == ["describe"] * 2
    assert it.service.has_served("site-1")


def test_what_a_codec_can_not_carry_is_asked_for_again_in_one_request(joined):
    bad = torch.full((300_000,), float("nan"))
    it, site = joined({"bad": marked(bad, get_codec("int8")), **large(2)})
    got = it.confirmed(site)
    assert_equal(got, {"bad": bad, **large(2)})
    assert set(it.requests) <= {"describe", "report"}
    assert it.requests.count("describe") == 2


@pytest.mark.parametrize("how", ["no memory", "wrong", "lost"])
def test_a_receiver_that_does_not_want_what_is_described_refuses_what_was_offered(how, joined):
    it, site = joined(large(100))
    ask = it.ask("site-1")

    def answer(request: dict) -> dict:
        found = ask(request)
        if request["do"] == "describe":
            eventually(lambda: site.find("server").incoming(), DEADLINE)
            if how == "lost":
                raise TransferError("no answer")
            if how == "wrong":
                found = {**found, "manifest": b"\xc1"}
        return found

    def no_memory(item) -> None:
        raise MemoryError("too large")

    with pytest.raises({"no memory": MemoryError, "wrong": ProtocolError, "lost": TransferError}[how]):
        it.confirmed(site, answer, land=no_memory if how == "no memory" else new)
    assert it.asked == ["describe", "give up"]
    assert not it.service.has_served("site-1")
    eventually(lambda: not it.senders and site.find("server").idle, DEADLINE)
    assert not site.expected
    assert_equal(it.confirmed(site), large(100))  # over the same link


def test_a_refusal_needs_no_giving_up(joined):
    it, site = joined({"x": np.array([None])})
    with pytest.raises(TransferError, match="the peer refused"):
        it.confirmed(site)
    assert it.asked == ["describe"]


# -- what is small -----------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, direct):
    """As `direct`, with the limits as they are."""
    monkeypatch.setattr(content, "SMALL_TOTAL", manifest.SMALL_TOTAL)
    monkeypatch.setattr(manifest, "BUNDLED_BYTES", BUNDLED_BYTES)
    return direct


def test_what_is_small_together_is_in_the_description_and_takes_one_request(small, cell):
    sent = {f"a{i}": torch.randn(8, 1000) for i in range(8)}  # 250 KiB
    it = small(sent, ports=None)
    assert not it.service.has_served("site-1")
    assert_equal(it.confirmed(cell("site-1", ports=None)), sent)
    assert it.asked == ["describe"]
    assert it.service.has_served("site-1")
    it.ask("site-1")({"do": "give up"})
    assert not it.service.has_served("site-1")


def test_what_is_a_little_more_is_not(small, cell):
    sent = {f"a{i}": torch.randn(8, 1000) for i in range(9)}
    it = small(sent)
    assert_equal(it.confirmed(cell("site-1")), sent)
    assert it.asked == ["describe", "send"]


def test_a_receiver_that_falls_back_is_not_taken_for_served(small, cell):
    it = small({"a": torch.ones(3)})

    def no_memory(item) -> None:
        raise MemoryError("too large")

    with pytest.raises(MemoryError):
        it.confirmed(cell("site-1"), land=no_memory)
    assert it.asked == ["describe", "give up"]
    assert not it.service.has_served("site-1")


def in_few_bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: marked(tensor, get_codec("normfloat4")) for name, tensor in tensors.items()}


def test_the_content_of_a_description_is_encoded_as_it_would_travel(small, cell):
    plain = {"much": torch.randn(500, 800), "few": torch.randn(40, 50), "tiny": torch.randn(1)}
    it = small(in_few_bits(plain), ports=None)
    got = it.confirmed(cell("site-1", ports=None))
    assert it.asked == ["describe"]
    for name in ("much", "few"):
        assert np.array_equal(to_flat(got[name]), as_encoded(plain[name], "normfloat4"))
        assert was_decoded(got[name])
    assert torch.equal(got["tiny"], plain["tiny"])  # it would not get smaller


def test_beside_what_is_large_the_small_tensors_are_bundled_and_for_an_old_peer_in_the_description(small):
    plain = {"much": torch.randn(600, 800), "few": torch.randn(40, 50), "more": torch.randn(600, 800)}
    plain["less"] = torch.randn(1)
    it = small(in_few_bits(plain))
    told = manifest.unpack(it.service.answer({"do": "describe", "compact": True}, "x")["manifest"], bundles=True)
    assert [[tensor.name for tensor in item.tensors] for item in told] == [["much"], ["more"], ["few", "less"]]
    assert all(item.content is None for item in told)
    assert told[2].nbytes == told[2].members[0].sent_nbytes + 4 < 2000
    told = manifest.unpack(it.service.answer({"do": "describe"}, "x")["manifest"])
    assert [item.content is None for item in told] == [True, False, True, False]
    assert len(told[1].content) == 8000


def test_content_that_its_codec_can_not_carry_is_exact(small, cell, caplog):
    bad = torch.tensor([float("nan")] * 3000)
    it = small({"bad": marked(bad, get_codec("int8")), "good": marked(torch.ones(3000), get_codec("int8"))}, ports=None)
    got = it.confirmed(cell("site-1", ports=None))
    assert it.asked == ["describe"]
    assert bytes(to_flat(got["bad"])) == bytes(to_flat(bad))
    assert was_decoded(got["good"])
    assert not was_decoded(got["bad"])
    assert "tensor bad is sent exact" in caplog.text


# -- peers that lie ----------------------------------------------------------------------------------------


class Offering:
    """A sender that offers what it likes, under labels of its choice, before it answers."""

    def __init__(self, it, site, offers) -> None:
        self.ask = it.ask("site-1")
        self.link, self.here, self.offers = it.channels.find("site-1"), site, offers
        self.sendings: list = []

    def __call__(self, request: dict) -> dict:
        if request["do"] == "describe":
            first = request.pop("first")
            request.pop("items", None)
            for offset, nbytes in self.offers:
                self.sendings.append(self.link.offer(TestSource(nbytes), first + offset))
            return {**self.ask(request), "sending": len(large(3)), "sees": True}
        return self.ask(request)


class TestSource(bundles.TensorSource):
    __test__ = False

    def __init__(self, nbytes: int) -> None:
        super().__init__(np.zeros(nbytes, np.uint8), nbytes)


@pytest.mark.parametrize(
    ("offers", "reason"),
    [
        ([(n, 100_000) for n in range(MAX_AHEAD + 1)], f"more than {MAX_AHEAD} messages are offered"),
        ([(0, 100_000), (0, 100_000)], "offered twice"),
        ([(0, 100_000), (0, 7)], "offered twice"),
    ],
    ids=["flood", "twice", "twice, shorter"],
)
def test_who_offers_more_than_it_may_before_its_answer_breaks_the_protocol(offers, reason, joined):
    it, site = joined(large(3))
    link = site.find("server")
    hostile = Offering(it, site, offers)

    def answer(request: dict) -> dict:
        found = hostile(request)
        if request["do"] == "describe":
            eventually(lambda: link.failure, DEADLINE)
        return found

    # It is dialled again, and refused nothing for what it did before.
    hostile_once = iter([answer])
    assert_equal(it.confirmed(site, lambda request: next(hostile_once, it.ask("site-1"))(request)), large(3))
    assert reason in link.failure
    assert not site.expected


def test_offers_that_are_not_described_are_refused_and_harm_nobody(joined):
    it, site = joined(large(3))
    offers = [(0, 100_000), (1, 99_999), (3, 100_000), (-1, 100_000), (manifest.MAX_ITEMS, 100_000)]
    hostile = Offering(it, site, offers)
    got = it.confirmed(site, hostile)  # what did not come is asked for again, of a sender that goes on
    assert list(got) == list(large(3))
    for sending, label in zip(
        hostile.sendings[2:5], ("out of those that are described", "before", "after"), strict=True
    ):
        with pytest.raises(TransferError, match="nothing expected as"):
            sending.wait(DEADLINE), label
    assert site.find("server").usable
    assert not site.expected


def test_offers_before_anything_is_asked_are_refused(joined):
    it, site = joined(large(1))
    sending = it.channels.find("site-1").offer(TestSource(100), 5)
    with pytest.raises(TransferError, match="nothing expected as 5"):
        sending.wait(DEADLINE)
    assert site.find("server").usable


@pytest.mark.parametrize("sending", [None, True, -1, 2, 4, "3", 1 << 70])
def test_a_wrong_number_of_what_is_being_sent_is_no_number(sending, joined):
    it, site = joined(large(3))
    ask = it.ask("site-1")

    def answer(request: dict) -> dict:
        return ask(request) | ({"sending": sending} if request["do"] == "describe" else {})

    assert_equal(it.confirmed(site, answer), large(3))
    assert it.asked == ["describe", "send"]


@pytest.mark.parametrize("first", [0, -1, True, "1", 1 << 63, [1], {"a": 1}], ids=str)
def test_malformed_labels_are_refused(first, joined):
    it, _ = joined(large(1))
    answer = it.service.answer({"do": "describe", "channel": True, "first": first}, "site-1")
    assert "malformed request" in answer["refused"]
    assert not it.senders


@pytest.mark.parametrize("items", [0, [1], [-1], [0, 0], ["0"], [[0]]], ids=str)
def test_malformed_items_are_refused(items, joined):
    it, _ = joined(large(1))
    request = {"do": "describe", "channel": True, "first": 1, "items": items}
    assert it.service.answer(request, "site-1")["refused"]
    assert not it.senders


def test_two_pulls_at_once_have_labels_of_their_own(joined, cell):
    it, site = joined(large(80))
    other = Service(content.TensorContent(large(70, 50_000)), lambda: it.channels)
    got: list = []
    pulling = threading.Thread(
        target=lambda: got.append(pull(site, "server", lambda request: other.answer(request, "site-1"), new))
    )
    pulling.start()
    assert_equal(it.confirmed(site), large(80))
    pulling.join(DEADLINE)
    assert_equal(got[0], large(70, 50_000))
    other.close()
