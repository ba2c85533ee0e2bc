"""`auto`: each link gets the best type that is there in time, and the log says why."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, make_copy

from nvflare_rdma.codecs import Policy, codec_of
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer, PeerQuantizer
from nvflare_rdma.filters.autopilot import TYPES, sent_nbytes
from nvflare_rdma.flare_compat import RATES_PROP, TRANSFER_PROP
from nvflare_rdma.streaming.rates import LinkRates
from nvflare_rdma.transfer import Ledger
from tests.support.transfer_records import record

MBIT = 1e6 / 8
#: 8 MB of float32.
MODEL = {"w": torch.randn(1000, 2000), "norm.weight": torch.ones(2000)}


@pytest.fixture
def rates():
    ledger = Ledger()
    made = LinkRates(ledger)
    made.ledger = ledger
    return made


def moved(rates, peer, mbit, **fields):
    nbytes = fields.pop("wire_bytes", 1 << 20)
    rates.ledger.record(record(peer=peer, wire_bytes=nbytes, seconds=nbytes / (mbit * MBIT), **fields))


def send(quantizer, at, rates, site="site-1", point="server out", params=MODEL, direct=False, root="task-1"):
    ctx, peer = at(point, quantizer), FLContext()
    peer.put(key="__identity_name__", value=site, private=False, sticky=True)
    if rates is not None:
        ctx.set_prop(RATES_PROP, rates, private=True, sticky=True)
    if direct:
        for side in (ctx, peer):
            side.set_prop(TRANSFER_PROP, True, private=False, sticky=True)
    ctx.set_peer_context(peer)
    shareable = DXO(DataKind.WEIGHTS, data=params).to_shareable()
    shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, root)
    return quantizer.process(make_copy(shareable), ctx)


def auto(seconds=2.0, **options):
    return ModelQuantizer("auto", one_way=True, policy=[], round_seconds=seconds, **options)


SITES = {"slow": (10, "normfloat4_e4m3"), "middle": (30, "int8"), "fast": (1000, "bfloat16")}


@pytest.mark.parametrize("direct", [False, True])
def test_three_sites_get_what_their_links_allow(at, rates, caplog, direct):
    caplog.set_level(logging.INFO)
    for site, (mbit, _) in SITES.items():
        moved(rates, f"{site}.job", mbit)
    quantizer = auto()
    for _ in range(2):
        for site, (_, expected) in SITES.items():
            made = send(quantizer, at, rates, site, direct=direct)
            dxo = from_shareable(made)
            assert dxo.meta[MetaKey.PROCESSED_ALGORITHM] == expected
            if direct:
                assert codec_of(dxo.data["w"]).name == expected
            else:
                into = ModelDequantizer()
                got = from_shareable(into.process(made, at("client in", into))).data["w"]
                assert (got - MODEL["w"]).square().sum() <= 0.1**2 * MODEL["w"].square().sum()
    lines = [text for text in caplog.messages if "Messages of task 'train' to" in text]
    assert len(lines) == 3, "once for each site, as long as nothing changes"
    assert "to slow go in normfloat4_e4m3: bfloat16 3.21 s, int8 1.61 s, normfloat4_e4m3 0.8" in lines[0]
    assert "of 1 s, at 1.25 MB/s; it is the best one that is there in time" in lines[0]
    assert "to fast go in bfloat16: bfloat16 0.0321 s of 1 s, at 125 MB/s" in lines[2]


def test_sites_of_one_class_share_what_was_made(at, rates):
    for site in ("a", "b"):
        moved(rates, f"{site}.job", 1000)
    moved(rates, "c.job", 10)
    quantizer = auto()
    a, b, c = (from_shareable(send(quantizer, at, rates, site, direct=True)).data["w"] for site in "abc")
    assert a is b
    assert codec_of(c).name == "normfloat4_e4m3"


def test_a_link_that_changes_gets_another_type(at, rates, caplog):
    caplog.set_level(logging.INFO)
    quantizer = auto()
    for mbit, expected in ((1000, "bfloat16"), (10, "normfloat4_e4m3"), (1000, "bfloat16")):
        for _ in range(3):
            moved(rates, "site-1.job", mbit)
        made = send(quantizer, at, rates, root=f"task-{mbit}-{expected}")
        assert from_shareable(made).meta[MetaKey.PROCESSED_ALGORITHM] == expected
    assert len([text for text in caplog.messages if "Messages of task 'train' to site-1" in text]) == 3


def test_what_is_never_there_in_time_is_as_small_as_it_can_be(at, rates, caplog):
    caplog.set_level(logging.INFO)
    moved(rates, "site-1.job", 0.1)
    assert from_shareable(send(auto(), at, rates)).meta[MetaKey.PROCESSED_ALGORITHM] == "normfloat4_e4m3"
    assert "it is the smallest, and not there in time" in caplog.text


@pytest.mark.parametrize("known", [False, True])
def test_a_link_that_nobody_has_measured(at, rates, caplog, known):
    caplog.set_level(logging.INFO)
    made = send(auto(), at, rates if known else None)
    assert from_shareable(made).meta[MetaKey.PROCESSED_ALGORITHM] == "normfloat4_e4m3"
    why = "no transfer has told yet how fast this link is" if known else "there is no RdmaTransfer"
    assert f"{why}, and it is the smallest" in caplog.text


def test_a_site_looks_at_its_way_to_the_server(at, rates):
    moved(rates, "server.job", 1000)
    made = send(auto(), at, rates, "simulator_server", point="client out")
    assert from_shareable(made).meta[MetaKey.PROCESSED_ALGORITHM] == "bfloat16"


def test_types_that_lose_too_much_are_not_chosen_from(at, rates):
    moved(rates, "site-1.job", 1)
    dxo = from_shareable(send(auto(max_relative_error=0.05), at, rates))
    assert dxo.meta[MetaKey.PROCESSED_ALGORITHM] == "int8"
    assert auto(max_relative_error=1e-4)._autopilot.types == ["bfloat16"]


def test_rates_are_medians_of_what_was_large_enough_and_went_well(rates):
    assert rates.to("site-1") is None
    moved(rates, "site-1.job", 8, direction="received")
    assert rates.to("site-1") == pytest.approx(1e6)
    moved(rates, "site-1.job", 80, wire_bytes=1000)
    moved(rates, "site-1.job", 80, outcome="failed: it broke")
    assert rates.to("site-1") == pytest.approx(1e6)
    for mbit in (800, 16, 24, 80):
        moved(rates, "site-1.job", mbit)
    assert rates.to("site-1") == pytest.approx(3e6), "of the last three"
    assert rates.to("site-2") is None
    rates.stop()
    moved(rates, "site-2.job", 8)
    assert rates.to("site-2") is None


def test_the_size_is_that_of_what_travels(at):
    values = {**MODEL, "tied": MODEL["w"], "steps": torch.tensor(3), "text": "x"}
    for name in TYPES:
        policy = Policy(name, [])
        exact = MODEL["norm.weight"].nbytes + values["steps"].nbytes
        assert sent_nbytes(values, policy) == policy.codec.encoded_nbytes(2_000_000) + exact


@pytest.mark.parametrize("seconds", [None, 0, -1, math.nan, math.inf, "60", True])
def test_without_a_time_it_is_refused(seconds):
    with pytest.raises(ConfigError, match="'auto' needs round_seconds"):
        ModelQuantizer("auto", round_seconds=seconds)


@pytest.mark.parametrize("option", ["error_feedback", "delta", "stochastic_rounding"])
def test_what_belongs_to_one_type_is_refused(option):
    with pytest.raises(ConfigError, match=f"{option} can't be used with quantization_type 'auto'"):
        ModelQuantizer("auto", round_seconds=60, **{option: True})


def test_a_time_for_a_given_type_is_refused():
    with pytest.raises(ConfigError, match="round_seconds=60 has no effect with quantization_type 'int8'"):
        ModelQuantizer("int8", round_seconds=60)


def test_between_sites_it_is_refused():
    with pytest.raises(ConfigError, match="'auto' can't be used between sites"):
        PeerQuantizer("auto")
