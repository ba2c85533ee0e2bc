"""`auto`: each link gets the best type that is there in time, or small enough, and the log says why."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, make_copy

from nvflare_rdma.codecs import EXACT, Policy, codec_of, get_codec
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
    made = LinkRates(ledger, "server")
    made.ledger, made.now = ledger, 0.0
    return made


def moved(rates, peer, mbit, **fields):
    """One transfer after the other."""
    nbytes = fields.pop("wire_bytes", 1 << 20)
    seconds = nbytes / (mbit * MBIT)
    rates.now += seconds
    rates.ledger.record(record(**{"peer": peer, "wire_bytes": nbytes, "seconds": seconds, "time": rates.now} | fields))


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


def type_of(made):
    """What the weights travel as."""
    dxo = from_shareable(made)
    exact = dxo.data["w"].shape == MODEL["w"].shape and dxo.data["w"].dtype == torch.float32
    return EXACT if exact and codec_of(dxo.data["w"]) is None else dxo.meta[MetaKey.PROCESSED_ALGORITHM]


SITES = {"slow": (10, "normfloat4_e4m3"), "middle": (30, "int8"), "good": (60, "bfloat16"), "fast": (1000, EXACT)}


@pytest.mark.parametrize("direct", [False, True])
def test_three_sites_get_what_their_links_allow(at, rates, caplog, direct):
    caplog.set_level(logging.INFO)
    for site, (mbit, _) in SITES.items():
        moved(rates, f"{site}.job", mbit)
    quantizer = auto()
    for _ in range(2):
        for site, (_, expected) in SITES.items():
            made = send(quantizer, at, rates, site, direct=direct)
            if direct:
                codec = codec_of(from_shareable(made).data["w"])
                assert (codec.name if codec else EXACT) == expected
            else:
                assert type_of(made) == expected
                into = ModelDequantizer()
                got = from_shareable(into.process(made, at("client in", into))).data["w"]
                assert (got - MODEL["w"]).square().sum() <= 0.1**2 * MODEL["w"].square().sum()
    lines = [text for text in caplog.messages if "Messages of task 'train' to" in text]
    assert len(lines) == 4, "once for each site, as long as nothing changes"
    assert (
        "Messages of task 'train' to middle go in int8 (2.01 MB in 0.537 s, relative error about 0.0084), not exact "
        "(8.01 MB in 2.14 s, nothing lost); bfloat16 (4.01 MB in 1.07 s, relative error about 0.0017): each "
        "way has 1 s at 3.75 MB/s, and it is the best one within that"
    ) in lines[1]
    assert "to fast go in exact (8.01 MB in 0.0641 s" in lines[3]


def test_sites_of_one_class_share_what_was_made(at, rates):
    for site in ("a", "b"):
        moved(rates, f"{site}.job", 1000)
    moved(rates, "c.job", 10)
    moved(rates, "d.job", 10)
    quantizer = auto()
    a, b, c, d = (from_shareable(send(quantizer, at, rates, site, direct=True)).data["w"] for site in "abcd")
    assert a is b
    assert codec_of(a) is None
    assert c is d
    assert codec_of(c).name == "normfloat4_e4m3"


def test_a_link_that_changes_gets_another_type(at, rates, caplog):
    caplog.set_level(logging.INFO)
    quantizer = auto()
    for number, (mbit, expected) in enumerate([(1000, EXACT), (10, "normfloat4_e4m3"), (1000, EXACT)]):
        for _ in range(4):
            moved(rates, "site-1.job", mbit)
        assert type_of(send(quantizer, at, rates, root=f"task-{number}")) == expected
    assert len([text for text in caplog.messages if "Messages of task 'train' to site-1" in text]) == 3


def test_a_small_model_gets_better_types_though_all_its_transfers_are_small(at, rates):
    """300,000 values take 160 kB in 4 bits, and 1.2 MB exact: 0.3 s at 32 Mbit/s."""
    params, quantizer, types = {"w": torch.randn(300, 1000)}, auto(4.0), []
    for number in range(4):
        made = send(quantizer, at, rates, params=params, root=f"task-{number}")
        dxo = from_shareable(made)
        types.append(dxo.meta[MetaKey.PROCESSED_ALGORITHM] if dxo.data["w"].dtype != torch.float32 else EXACT)
        moved(rates, "site-1.job", 32, wire_bytes=1_200_000 if types[-1] == EXACT else 160_000)
    assert types == ["normfloat4_e4m3", EXACT, EXACT, EXACT]


def test_a_rate_that_differs_a_little_does_not_change_the_type(at, rates, caplog):
    """int8 takes a whole second at 16.06 Mbit/s."""
    caplog.set_level(logging.INFO)
    quantizer = auto()
    steps = [(15, "normfloat4_e4m3"), (17, "normfloat4_e4m3"), (21, "int8"), (17, "int8"), (15, "normfloat4_e4m3")]
    for number, (mbit, expected) in enumerate(steps):
        for _ in range(4):
            moved(rates, "site-1.job", mbit)
        assert type_of(send(quantizer, at, rates, root=f"task-{number}")) == expected, (number, mbit)
    moved(rates, "site-2.job", 17)
    assert type_of(send(quantizer, at, rates, "site-2")) == "int8", "a first choice needs nothing to spare"


def test_a_message_of_two_models_has_its_time_for_both(at, rates):
    moved(rates, "site-1.job", 30)
    values = {"w": MODEL["w"]}
    to, known = ("train", "", "site-1"), rates
    pilot = auto()._autopilot
    assert pilot.choose(values, to, known)[0].quantization_type == "int8"
    assert pilot.choose(values, ("train", "a", "site-1"), known, messages=2)[0].quantization_type == "normfloat4_e4m3"


def test_bytes_are_a_limit_without_any_rate(at, caplog):
    """8 MB exact, 4 in bfloat16, 2 in int8."""
    caplog.set_level(logging.INFO)
    for nbytes, expected in ((17e6, EXACT), (9e6, "bfloat16"), (5e6, "int8"), (3e6, "normfloat4_e4m3")):
        made = send(auto(None, round_bytes=nbytes), at, None)
        assert type_of(made) == expected
    assert "go in exact (8.01 MB, nothing lost): each way has 8.5 MB, and it is" in caplog.text
    assert type_of(send(auto(None, round_bytes=1000), at, None)) == "normfloat4_e4m3"
    assert "each way has 0.0005 MB, and it is the smallest, and still too much" in caplog.text


def test_both_limits_hold(at, rates):
    moved(rates, "fast.job", 1000)
    moved(rates, "slow.job", 10)
    quantizer = auto(2.0, round_bytes=9e6)
    assert type_of(send(quantizer, at, rates, "fast")) == "bfloat16", "more bytes than there may be, if it had time"
    assert type_of(send(quantizer, at, rates, "slow")) == "normfloat4_e4m3"
    assert type_of(send(quantizer, at, rates, "unknown")) == "normfloat4_e4m3"


def test_what_is_never_there_in_time_is_as_small_as_it_can_be(at, rates, caplog):
    caplog.set_level(logging.INFO)
    moved(rates, "site-1.job", 0.1)
    assert type_of(send(auto(), at, rates)) == "normfloat4_e4m3"
    assert "it is the smallest, and still too much" in caplog.text


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
    assert type_of(made) == EXACT


def test_types_that_lose_too_much_are_not_chosen_from(at, rates):
    moved(rates, "site-1.job", 1)
    dxo = from_shareable(send(auto(max_relative_error=0.05), at, rates))
    assert dxo.meta[MetaKey.PROCESSED_ALGORITHM] == "int8"
    assert auto(max_relative_error=1e-4)._autopilot.types == [EXACT]
    assert type_of(send(auto(max_relative_error=1e-4), at, rates)) == EXACT


def test_rates_are_medians_of_what_was_large_enough_and_went_well(rates):
    assert rates.to("site-1") is None
    moved(rates, "site-1.job", 8, direction="received")
    assert rates.to("site-1") == pytest.approx(1e6)
    moved(rates, "site-1.job", 80, wire_bytes=1000)
    moved(rates, "site-1.job", 80, outcome="failed: it broke")
    assert rates.to("site-1") == pytest.approx(1e6), "of the transfer that has opened the link, as there is no other"
    moved(rates, "site-1.job", 16, direction="received")
    assert rates.to("site-1") == pytest.approx(2e6)
    for mbit in (800, 16, 24, 80):
        moved(rates, "site-1.job", mbit)
    assert rates.to("site-1") == pytest.approx(3e6), "of the last three"
    assert rates.to("site-2") is None
    rates.stop()
    moved(rates, "site-2.job", 8)
    assert rates.to("site-2") is None


@pytest.mark.parametrize(
    ("cell", "counts"),
    [
        ("site-1.job-1", True),
        ("site-1", True),  # the parent of the run: in the simulator it moves a job's messages, too
        ("site-1.job-1.trainer", True),
        ("site-2.job-1", False),  # in one process with this site, in the simulator
        ("site-1.job-10", False),
        ("site-1.job-2", False),
    ],
)
def test_what_other_cells_of_the_process_have_moved_tells_nothing(cell, counts):
    ledger = Ledger()
    rates = LinkRates(ledger, "site-1.job-1")
    ledger.record(record(cell=cell, peer="server.job-1", wire_bytes=1 << 20, seconds=1.0))
    assert (rates.to("server") is not None) is counts


def test_small_transfers_say_how_fast_a_link_is_at_least(rates):
    moved(rates, "site-1.job", 8, wire_bytes=1000, direction="received")
    assert rates.to("site-1") == pytest.approx(1e6)
    for mbit in (80, 16, 24, 8):
        moved(rates, "site-1.job", mbit, wire_bytes=1000)
    moved(rates, "site-1.job", 800, wire_bytes=0)
    assert rates.to("site-1") == pytest.approx(3e6), (
        "the fastest of the last three, and what takes nothing says nothing"
    )
    moved(rates, "site-1.job", 0.8)
    assert rates.to("site-1") == pytest.approx(1e5), "a large one tells more"


def test_transfers_that_share_the_link_count_as_one(rates):
    """Two at a time, each at half the rate of the link."""
    for begin in (0.0, 10.0, 20.0, 30.0):
        for end in (begin + 2.0, begin + 2.1):
            fields = {"peer": "site-1.job", "wire_bytes": 1_000_000, "seconds": end - begin, "time": end}
            rates.ledger.record(record(**fields))
        assert rates.to("site-1") == pytest.approx(2e6 / 2.1)
    later = {"peer": "site-1.job", "wire_bytes": 1_000_000}
    for end in (40.0, 39.5, 39.6):  # the clock was set back: nothing is known of what overlaps
        rates.ledger.record(record(**later, seconds=1.0, time=end))
    assert rates.to("site-1") == pytest.approx(1e6, rel=0.9)


def ended(rates, begin, end, nbytes=1_000_000):
    rates.ledger.record(record(peer="site-1.job", wire_bytes=nbytes, seconds=end - begin, time=end))


def test_transfers_that_overlap_count_as_one_in_whatever_order_they_are_told_of(rates):
    ended(rates, -9.0, -8.0)
    for begin in (0.0, 10.0, 20.0):
        ended(rates, begin, begin + 2.1)
        ended(rates, begin, begin + 2.0)
    assert rates.to("site-1") == pytest.approx(2e6 / 2.1)


def test_a_long_transfer_shares_the_link_with_all_that_ended_meanwhile(rates):
    ended(rates, -9.0, -8.0)
    for begin, end in ((0.0, 1.0), (1.0, 2.0), (2.0, 3.0)):
        ended(rates, begin, end)
    ended(rates, 0.0, 4.0, 3_000_000)
    assert rates.to("site-1") == pytest.approx(6e6 / 4.0)


def test_a_chain_of_transfers_is_not_one_for_ever(rates):
    """Each begins before the last one has ended. The link becomes ten times as fast."""
    ended(rates, -9.0, -8.0)
    for number in range(200):
        ended(rates, number * 10.0, number * 10.0 + 10.1, 10_000_000 if number < 100 else 100_000_000)
    assert rates.to("site-1") == pytest.approx(1e7, rel=0.1)


def test_the_size_is_that_of_what_travels(at):
    values = {**MODEL, "tied": MODEL["w"], "steps": torch.tensor(3), "text": "x"}
    for name in TYPES:
        policy = Policy("int8", []).with_type(name)
        exact = MODEL["norm.weight"].nbytes + values["steps"].nbytes
        encoded = MODEL["w"].nbytes if name == EXACT else get_codec(name).encoded_nbytes(2_000_000)
        assert sent_nbytes(values, policy) == encoded + exact


@pytest.mark.parametrize("limit", ["round_seconds", "round_bytes"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "60", True])
def test_a_limit_that_is_none_is_refused(limit, value):
    with pytest.raises(ConfigError, match=f"{limit}={value!r} is no limit for 'auto'"):
        ModelQuantizer("auto", **{limit: value})


@pytest.mark.parametrize("value", [0.5, 1.5])
def test_a_part_of_a_byte_is_no_limit(value):
    with pytest.raises(ConfigError, match=f"round_bytes={value} is no limit for 'auto': give a whole number of bytes"):
        ModelQuantizer("auto", round_bytes=value)
    assert ModelQuantizer("auto", round_bytes=2e8)._autopilot.limits.nbytes == 200_000_000


def test_without_a_limit_it_is_refused():
    with pytest.raises(ConfigError, match=r"'auto' needs round_seconds, .*, or round_bytes"):
        ModelQuantizer("auto")


@pytest.mark.parametrize("option", ["error_feedback", "delta", "stochastic_rounding"])
def test_what_belongs_to_one_type_is_refused(option):
    with pytest.raises(ConfigError, match=f"{option} can't be used with quantization_type 'auto'"):
        ModelQuantizer("auto", round_seconds=60, **{option: True})


def test_a_time_for_a_given_type_is_refused():
    with pytest.raises(ConfigError, match="round_seconds=60 has no effect with quantization_type 'int8'"):
        ModelQuantizer("int8", round_seconds=60)
    with pytest.raises(ConfigError, match="round_bytes=60 has no effect with quantization_type 'int8'"):
        ModelQuantizer("int8", round_bytes=60)


def test_between_sites_it_is_refused():
    with pytest.raises(ConfigError, match="'auto' can't be used between sites"):
        PeerQuantizer("auto")
