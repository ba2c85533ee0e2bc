"""What becomes of offers, in whatever order they come with what their receiver knows of them."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nvflare_rdma.channel import Later
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.transfer.expected import MAX_AHEAD, ExpectedMessages
from nvflare_rdma.transfer.manifest import MAX_ITEMS
from tests.support.bodies import TestSink

PEERS = ("site-1", "site-2")
REFUSED = "refused"


class Offers(RuleBasedStateMachine):
    """One receiver, which reserves labels, and then expects or releases them; and peers, which offer under labels of
    each other, too."""

    def __init__(self) -> None:
        super().__init__()
        self.expected = ExpectedMessages()
        #: What was reserved: (peer, first), and the labels of this that wait.
        self.reserved: dict[tuple[str, int], set[int]] = {}
        #: (Peer, label) -> the sink that it is to be given, once.
        self.sinks: dict[tuple[str, int], TestSink] = {}
        #: Offers that wait, and what came of all.
        self.waiting: dict[tuple[str, int], list] = {}
        self.placed = 0

    def _offer(self, peer: str, label: int, outcome: list) -> None:
        def again() -> None:
            found = self.expected.place(peer, label, lambda: pytest.fail("it has waited already"))
            outcome.append(REFUSED if found is None else found)

        found = self.expected.place(peer, label, again)
        if not isinstance(found, Later):
            outcome.append(REFUSED if found is None else found)

    @rule(peer=st.sampled_from(PEERS))
    def reserve(self, peer: str) -> None:
        first = self.expected.reserve(peer)
        assert 0 < first < 1 << 63
        self.reserved[peer, first] = set()

    @precondition(lambda self: self.reserved or self.sinks)
    @rule(data=st.data(), peer=st.sampled_from(PEERS))
    def offer(self, data: st.DataObject, peer: str) -> None:
        # Not sorted: labels are others each time that an example is run.
        bases = list(dict.fromkeys(label for _, label in [*self.reserved, *self.sinks]))
        offsets = st.integers(-1, 4) | st.sampled_from([MAX_ITEMS - 1, MAX_ITEMS])
        label = data.draw(st.sampled_from(bases)) + data.draw(offsets)
        within = [(w, first) for w, first in self.reserved if w == peer and first <= label < first + MAX_ITEMS]
        outcome: list = []
        if (sink := self.sinks.pop((peer, label), None)) is not None:
            self._offer(peer, label, outcome)
            assert outcome == [sink]
        elif within and label in self.reserved[within[0]]:
            with pytest.raises(ProtocolError, match="twice"):
                self._offer(peer, label, outcome)
        else:
            self._offer(peer, label, outcome)
            assert outcome == ([] if within else [REFUSED])
            if within:
                self.reserved[within[0]].add(label)
                self.waiting[peer, label] = outcome

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), count=st.integers(0, 4))
    def expect(self, data: st.DataObject, count: int) -> None:
        peer, first = data.draw(st.sampled_from(list(self.reserved)))
        sinks = [TestSink(1) for _ in range(count)]
        assert self.expected.expect(peer, sinks, first) == first
        self.sinks |= {(peer, first + n): sink for n, sink in enumerate(sinks)}
        for label in self.reserved.pop((peer, first)):
            sink = self.sinks.pop((peer, label), REFUSED)
            assert self.waiting.pop((peer, label)) == [sink]

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        peer, first = data.draw(st.sampled_from(list(self.reserved)))
        for _ in range(2):  # twice does nothing more
            self.expected.release(peer, first)
        for label in self.reserved.pop((peer, first)):
            assert self.waiting.pop((peer, label)) == [REFUSED]

    @rule(peer=st.sampled_from(PEERS), count=st.integers(0, 3), forget=st.booleans())
    def expect_without_labels(self, peer: str, count: int, forget: bool) -> None:
        sinks = [TestSink(1) for _ in range(count)]
        first = self.expected.expect(peer, sinks)
        if forget:
            self.expected.forget(peer, first, count)
        else:
            self.sinks |= {(peer, first + n): sink for n, sink in enumerate(sinks)}

    @invariant()
    def what_waits_has_no_outcome_and_all_else_has_one(self) -> None:
        assert not any(self.waiting.values())
        assert len(self.expected) == len(self.sinks) + len(self.reserved)


TestOffers = Offers.TestCase
TestOffers.settings = settings(deadline=None, max_examples=40, stateful_step_count=20)


def test_only_so_many_wait():
    expected = ExpectedMessages()
    first, other = expected.reserve("site-1"), expected.reserve("site-1")
    for label in range(first, first + MAX_AHEAD):
        assert isinstance(expected.place("site-1", label, lambda: None), Later)
    with pytest.raises(ProtocolError, match=f"more than {MAX_AHEAD} messages"):
        expected.place("site-1", first + MAX_AHEAD, lambda: None)
    assert isinstance(expected.place("site-1", other, lambda: None), Later)  # of another transfer
    assert expected.place("site-2", first, lambda: None) is None
