"""nvflare-rdma plan MODEL --site NAME=RATE,RTT[,LOSS] ..."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_rdma.cli import main
from nvflare_rdma.cli.link_model import (
    FEW_RAILS,
    MOST_RAILS,
    RAILS_PER_SECOND,
    Line,
    Message,
    opening_seconds,
    ramp_seconds,
    seconds_of,
)
from nvflare_rdma.cli.models import Tensor
from nvflare_rdma.cli.plan import LOSES, USUAL, Site, choices_of, most_exact_within, plan
from nvflare_rdma.cli.policy import rows_of
from nvflare_rdma.cli.units import as_rate, parse_loss, parse_rate, parse_site, parse_time
from nvflare_rdma.codecs import CODEC_NAMES, Policy, get_codec
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.fabric.rail_count import FEW_RAILS as LINKS_FEW_RAILS
from nvflare_rdma.fabric.rail_count import rails_for_round_trip
from nvflare_rdma.settings import Settings

MIB = 1024 * 1024


@cache
def llama(mib):
    """255 float32 tensors of so many MiB, as `benchmarks/state_dict.py` has them."""

    def shapes(w):
        layer = [(w, w), (w // 4, w), (w // 4, w), (w, w), (4 * w, w), (4 * w, w), (w, 4 * w), (w,), (w,)]
        return [*(shape for _ in range(28) for shape in layer), (8 * w, w), (w,), (8 * w, w)]

    width, values = 8, mib * MIB // 4
    while sum(map(math.prod, shapes(width + 8))) <= values:
        width += 8
    *most, (rows, columns) = shapes(width)
    left = values - sum(map(math.prod, shapes(width)))
    most.append((rows + -(-left // columns), columns))
    return [Tensor(f"t{number}", "float32", shape) for number, shape in enumerate(most)]


def plan_of(model, *sites, codecs=USUAL, budget=0):
    return {one.name: one for one in plan(model, sites, choices_of(codecs), budget)}


# -- units -------------------------------------------------------------------------------------------------

numbers = st.integers(1, 10**6) | st.decimals("0.001", "100000", places=3)


@given(numbers, st.sampled_from([("k", 1e3), ("K", 1e3), ("M", 1e6), ("m", 1e6), ("G", 1e9)]),
       st.sampled_from(["", "bit", "Bit", "bit/s", "bps"]))  # fmt: skip
def test_a_rate_is_bits_a_second(number, prefix, unit):
    assert parse_rate(f"{number}{prefix[0]}{unit}") == pytest.approx(float(number) * prefix[1])


@given(st.sampled_from([1e3, 1e6, 1e9]), st.integers(1, 999))
def test_a_rate_is_told_as_it_is_written(unit, number):
    assert parse_rate(as_rate(number * unit).replace(" ", "")) == number * unit


@given(numbers, st.sampled_from([("us", 1e-6), ("ms", 1e-3), ("s", 1), ("m", 60), ("min", 60), ("h", 3600)]))
def test_a_time_has_a_unit(number, unit):
    assert parse_time(f"{number}{unit[0]}", "x") == pytest.approx(float(number) * unit[1])
    with pytest.raises(ConfigError, match="write it as"):
        parse_time(str(number), "x")


@given(st.decimals("0", "99.99", places=2))
def test_a_loss_is_percent_or_a_share(percent):
    assert parse_loss(f"{percent}%") == pytest.approx(float(percent) / 100)
    assert parse_loss(str(percent / 100)) == pytest.approx(float(percent) / 100)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_rate, lambda text: parse_time(text, "round trip"), parse_loss, parse_site):
        with contextlib.suppress(ConfigError):
            parse(text)


@pytest.mark.parametrize("rate", ["100MB", "100MBps", "100", "0Mbit", "-1M", "1e3M", "fast", "", "1.M", "inf"])
def test_what_could_mean_bytes_or_anything_is_no_rate(rate):
    with pytest.raises(ConfigError, match="100Mbit"):
        parse_rate(rate)


# -- the model of time -------------------------------------------------------------------------------------

lines = st.builds(Line, st.floats(1e5, 1e11), st.floats(0, 2), st.just(0.0) | st.floats(1e-6, 0.5))
messages = st.builds(Message, st.integers(1, 1000), st.just(10**9), st.integers(0, 10**10))
more = st.floats(1, 100)


def total(message, line, sites=2):
    return seconds_of(message, line, sites).total


def slightly_less(before, after):
    return after >= before * (1 - 1e-9)


@given(messages, lines, more)
def test_a_worse_line_is_never_faster(message, line, times):
    before = total(message, line)
    assert slightly_less(before, total(message, replace(line, rate=line.rate / times)))
    assert slightly_less(before, total(message, replace(line, round_trip=line.round_trip * times)))
    assert slightly_less(before, total(message, replace(line, loss=min(line.loss * times + 1e-6, 0.9))))


@given(messages, lines, st.integers(0, 10**9))
def test_more_bytes_tensors_or_sites_are_never_faster(message, line, extra):
    before = total(message, line)
    assert slightly_less(before, total(replace(message, sent_bytes=message.sent_bytes + extra), line))
    assert slightly_less(before, total(replace(message, tensors=message.tensors + 1), line))
    assert slightly_less(before, total(message, line, 3))


@given(messages, lines)
def test_no_message_is_faster_than_its_bytes_and_its_round_trips(message, line):
    found = seconds_of(message, line, 1)
    assert found.sending >= message.sent_bytes / (line.rate / 8)
    assert found.round_trips >= 3 * line.round_trip
    assert min(found.ramp, found.recovery, found.processing) >= 0
    assert opening_seconds(line) >= 2 * line.round_trip


def test_the_ramp_is_what_doubling_takes():
    """Round trip by round trip, as slow start does it: the model grows evenly, and so is at most a round trip ahead."""
    rate, trip = 12.5e6, 0.1
    for nbytes in (10_000, 300_000, 2_000_000, 100_000_000):
        window, left, passed = MOST_RAILS * 10 * 1448, float(nbytes), 0.0
        while left > window and window < rate * trip:
            left, passed, window = left - window, passed + trip, 2 * window
        stepped = passed + left / rate
        assert abs(nbytes / rate + ramp_seconds(nbytes, rate, trip) - stepped) <= trip


def test_rails_are_those_of_a_link():
    for milliseconds in range(40):
        seconds = milliseconds / 1e3
        assert math.ceil(max(seconds * RAILS_PER_SECOND, FEW_RAILS)) == rails_for_round_trip(seconds)
    assert FEW_RAILS == LINKS_FEW_RAILS
    assert Settings().rdma_rails == MOST_RAILS


def test_small_messages_wait_a_round_trip_less():
    line = Line(1e9, 0.1)
    small, large = (seconds_of(Message(1, 0, nbytes), line, 1) for nbytes in (256 * 1024, 256 * 1024 + 1))
    assert large.round_trips - small.round_trips == pytest.approx(0.1)


# Seconds of a round's traffic that benchmarks/wan_rounds.py has measured, medians: MiB, sites, Mbit/s, ms, % of loss,
# how many times slower the first site is, codec.
MEASURED = {
    (24, 2, 100, 40, 0, 1, "exact"): 4.82,
    (24, 2, 100, 40, 0, 1, "int8"): 1.99,
    (24, 2, 100, 40, 0, 1, "normfloat4"): 1.38,
    (24, 2, 100, 40, 0, 1, "normfloat4_e4m3"): 1.40,
    (24, 2, 100, 40, 0.1, 1, "exact"): 4.99,
    (24, 2, 100, 40, 0.1, 1, "normfloat4"): 1.57,
    (24, 2, 100, 40, 0.1, 1, "normfloat4_e4m3"): 1.51,
    (24, 2, 100, 40, 1, 1, "exact"): 11.65,
    (24, 2, 100, 40, 1, 1, "normfloat4"): 2.69,
    (24, 2, 100, 40, 1, 1, "normfloat4_e4m3"): 3.19,
    (4, 2, 100, 40, 0, 1, "exact"): 1.42,
    (4, 2, 100, 40, 0, 1, "int8"): 0.83,
    (4, 2, 100, 40, 0, 1, "normfloat4"): 0.72,
    (4, 2, 100, 40, 0.1, 1, "exact"): 1.66,
    (4, 2, 100, 40, 0.1, 1, "int8"): 0.93,
    (4, 2, 100, 40, 0.1, 1, "normfloat4"): 0.87,
    (96, 2, 1000, 20, 0, 1, "exact"): 2.78,
    (96, 2, 1000, 20, 0, 1, "normfloat4"): 1.49,
    (96, 2, 1000, 20, 0.1, 1, "exact"): 6.20,
    (96, 2, 1000, 20, 0.1, 1, "normfloat4"): 1.64,
    (24, 2, 30, 60, 0.1, 1, "exact"): 14.98,
    (24, 2, 30, 60, 0.1, 1, "normfloat4"): 3.21,
    (24, 4, 100, 40, 0.1, 1, "exact"): 5.32,
    (24, 4, 100, 40, 0.1, 1, "normfloat4"): 1.88,
    (24, 2, 100, 40, 0, 10, "exact"): 42.74,
    (24, 2, 100, 40, 0, 10, "normfloat4"): 6.57,
    (96, 2, 100, 40, 0, 1, "exact"): 17.35,
    (96, 2, 100, 40, 0, 1, "normfloat4"): 3.19,
    (96, 2, 100, 40, 0.1, 1, "exact"): 17.66,
    (96, 2, 100, 40, 0.1, 1, "normfloat4"): 3.07,
    (96, 2, 100, 40, 1, 1, "exact"): 36.56,
    (96, 2, 100, 40, 1, 1, "normfloat4"): 6.98,
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_what_was_measured_is_within_a_quarter(case):
    mib, count, rate, trip, loss, slow, codec = case
    sites = [
        Site(str(number), Line(rate * 1e6 / (1 if number else slow), trip / 1e3, loss / 100)) for number in range(count)
    ]
    found = plan_of(llama(mib), *sites, codecs=[codec])[codec].seconds
    assert found == pytest.approx(MEASURED[case], rel=0.25)


# -- bytes, seconds and memory of codecs -------------------------------------------------------------------

SLOW, FAST = Site("slow", Line(30e6, 0.06, 0.001)), Site("fast", Line(1e9, 0.02))
MODEL = [
    Tensor("embed.weight", "float32", (1000, 512)),
    Tensor("body.weight", "bfloat16", (512, 512)),
    Tensor("norm.weight", "float32", (4096,)),
    Tensor("steps", "int64", ()),
    Tensor("head.weight", "float32", (1000, 512), tied="embed.weight"),
]


def test_bytes_are_those_of_the_policy_command():
    for name, found in plan_of(MODEL, SLOW, FAST, codecs=["exact", *CODEC_NAMES]).items():
        rows = rows_of(Policy("int8" if name == "exact" else name, []), MODEL)
        expected = sum(row.tensor.nbytes for row in rows if row.codec != "tied") if name == "exact" else None
        expected = sum(row.nbytes for row in rows) if expected is None else expected
        assert found.down.message.sent_bytes == found.up.message.sent_bytes == expected
        assert found.down.message.raw_bytes == 4 * 512_000 + 2 * 512 * 512 + 4 * 4096 + 8
        assert found.down.message.tensors == 4


def test_fewer_bits_are_never_slower_on_a_slow_line():
    found = list(plan_of(llama(24), SLOW, Site("other", SLOW.line)).values())
    by_size = sorted(found, key=lambda one: one.down.message.sent_bytes)
    assert [one.seconds for one in by_size] == sorted(one.seconds for one in found)
    assert by_size[0].name == "int2"


def test_the_slowest_site_decides():
    found = plan_of(MODEL, FAST, SLOW)["exact"]
    assert found.slowest == "slow"
    assert found.seconds == found.sites["slow"].seconds > found.sites["fast"].seconds
    assert found.seconds_of_rounds(3) == pytest.approx(3 * found.seconds + opening_seconds(SLOW.line))
    one = found.down.message.wire_bytes
    assert found.wire_bytes == 4 * one  # two sites, two ways


def test_memory_is_the_sum_of_its_parts():
    found = plan_of(MODEL, SLOW, FAST, codecs=["exact", "normfloat4", "lossless"], budget=1 << 40)
    raw = found["exact"].down.message.raw_bytes
    for one in found.values():
        assert (one.server_memory.model, one.server_memory.result, one.server_memory.budget) == (raw, raw, 1 << 40)
        assert one.site_memory.total == 2 * raw + (1 << 40)
    assert found["exact"].server_memory.waiting == 2 * raw
    assert found["normfloat4"].server_memory.waiting == 2 * found["normfloat4"].up.message.sent_bytes < raw
    assert found["lossless"].server_memory.waiting == 2 * raw  # it is decoded as it comes
    for one in plan_of(MODEL, SLOW, FAST, codecs=["exact", "normfloat4"], budget=7).values():
        assert one.server_memory.waiting == 7  # the rest is on disk
    assert found["lossless"].down.is_most
    assert not found["normfloat4"].down.is_most


def test_what_codecs_lose_is_what_they_lose():
    """Of normally distributed values. The order is what `--deadline` chooses by."""
    values = np.random.default_rng(0).standard_normal(1 << 18, dtype=np.float32)
    for name in CODEC_NAMES:
        codec = get_codec(name)
        out, decoded = np.empty(codec.encoded_nbytes(values.size), np.uint8), np.empty_like(values)
        if name == "exact_delta":
            continue  # needs a base, and is exact
        used = codec.encode_into(values, out)
        codec.decode_into(out[:used], decoded)
        lost = float(np.square(decoded - values, dtype=np.float64).sum() / np.square(values, dtype=np.float64).sum())
        assert LOSES[name] == pytest.approx(lost, rel=0.1), name
    assert LOSES.keys() == {"exact", "tied", *CODEC_NAMES}
    assert list(USUAL) == sorted(USUAL, key=lambda name: LOSES[name])


def test_the_most_exact_in_time_is_named():
    found = list(plan_of(llama(24), SLOW).values())
    assert most_exact_within(found, 1e9).name == "exact"
    assert most_exact_within(found, found[2].seconds).name == "int8"
    assert most_exact_within(found, 0.001) is None


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(*arguments) -> (exit code, standard output, standard error), with a small model in model.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    model = {t.name: {"dtype": t.dtype, "shape": t.shape} for t in MODEL if not t.tied}
    (tmp_path / "model.json").write_text(json.dumps(model))

    def command(*arguments):
        code = main(["plan", "model.json", *arguments])
        return (code, *capsys.readouterr())

    return command


TWO = ("--site", "berlin=30Mbit,60ms,0.1%", "aachen=1Gbit,20ms")


def test_programs_get_all_parts(run):
    code, out, _ = run(*TWO, "--rounds", "10", "--cost-per-gb", "0.09", "--deadline", "60s", "--format", "json")
    data = json.loads(out)["data"]
    assert code == 0
    assert data["sites"]["berlin"] == {"rate_bits_per_second": 3e7, "round_trip_seconds": 0.06, "lost_share": 0.001}
    assert data["most_exact_in_time"] == "exact"
    assert [one["codec"] for one in data["codecs"]] == list(USUAL)
    for one in data["codecs"]:
        assert one["slowest_site"] == "berlin"
        assert one["round_seconds"] == one["sites"]["berlin"]["round_seconds"]
        for site in one["sites"].values():
            assert site["round_seconds"] == pytest.approx(site["down"]["seconds"] + site["up"]["seconds"])
            parts = {key: value for key, value in site["down"].items() if key != "seconds"}
            assert sum(parts.values()) == pytest.approx(site["down"]["seconds"])
        for memory in (one["server_memory"], one["site_memory"]):
            assert 2 * memory["total_bytes"] == sum(memory.values())
        assert one["server_memory"]["budget_bytes"] == Settings().rdma_memory_budget_bytes
        assert one["all_rounds_cost"] == pytest.approx(10 * one["round_wire_bytes"] / 1e9 * 0.09)
        assert one["all_rounds_seconds"] > 10 * one["round_seconds"]
        assert one["meets_deadline"] is True


def test_people_get_tables_in_80_columns(run):
    names = ("--site", *(f"hospital-{n}.example=100Mbit,40ms,0.1%" for n in range(3)), "[red]=1G,1ms")
    code, out, err = run(*names, "--codec", *USUAL, "lossless", "topk2", "--rounds", "100", "--cost-per-gb", "90000",
                         "--deadline", "1s")  # fmt: skip
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for word in (*USUAL, "lossless", "<2.7", "[red]", "in time", "cost", "is the most exact", "error feedback"):
        assert word in " ".join(out.split())
    assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_a_deadline_that_none_meets_is_told_and_is_an_exit_code(run):
    code, out, _ = run(*TWO, "--deadline", "1ms")
    assert code == 1
    assert "None takes no more than 0.001 s a round; int2 takes" in out


def test_the_rules_of_a_config_count_and_its_own_choice_is_compared(run, tmp_path):
    rule = {"role": "embedding", "quantization_type": "exact"}
    (tmp_path / "policy.json").write_text(json.dumps({"quantization_type": "float4", "policy": [rule]}))
    _, out, _ = run(*TWO, "--policy", "policy.json", "--codec", "int8", "--format", "json")
    int8, own = json.loads(out)["data"]["codecs"]
    model = [tensor for tensor in MODEL if not tensor.tied]
    for one, policy in ((int8, Policy("int8", [rule])), (own, Policy("float4", [rule]))):
        sent = one["each_site_down"]["sent_bytes"]
        assert sent == one["each_site_up"]["sent_bytes"] == sum(row.nbytes for row in rows_of(policy, model))
    assert (int8["codec"], own["codec"]) == ("int8", "as configured")


QUANTIZER = {"path": "nvflare_rdma.filters.ModelQuantizer", "args": {"quantization_type": "int8"}}


def test_a_type_that_each_link_chooses_is_nothing_to_compare(run, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"quantization_type": "auto", "round_seconds": 60}))
    code, _, err = run(*TWO, "--policy", "p.json")
    assert code == 1
    assert "has quantization_type 'auto' (both directions), which is another type for each link" in err


def test_a_config_of_one_way_leaves_the_other_exact(run, tmp_path):
    config = {"task_result_filters": [{"filters": [QUANTIZER]}]}
    (tmp_path / "config_fed_client.json").write_text(json.dumps(config))
    _, out, _ = run(*TWO, "--policy", "config_fed_client.json", "--codec", "int2", "--format", "json")
    for one in json.loads(out)["data"]["codecs"]:
        down, up = one["each_site_down"], one["each_site_up"]
        assert down["sent_bytes"] == down["raw_bytes"] > up["sent_bytes"]


def test_policies_of_sites_of_their_own_are_refused(run, tmp_path):
    config = {"components": [{"path": "x.PeerQuantizer", "args": QUANTIZER["args"]}]}
    (tmp_path / "p.json").write_text(json.dumps(config))
    code, _, err = run(*TWO, "--policy", "p.json")
    assert code == 1
    assert "site to site" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--site", "berlin"), ("berlin", "NAME=RATE,RTT[,LOSS]", "hospital=100Mbit,40ms,0.1%")),
        (("--site", "=1M,1ms"), ("NAME=RATE,RTT[,LOSS]",)),
        (("--site", "b=1M"), ("NAME=RATE,RTT[,LOSS]",)),
        (("--site", "b=1M,1ms,0,0"), ("NAME=RATE,RTT[,LOSS]",)),
        (("--site", "b=100MB,1ms"), ("site 'b=100MB,1ms'", "rate '100MB'", "100Mbit, 1Gbit or 30M")),
        (("--site", "b=1M,40"), ("round trip '40'", "40ms")),
        (("--site", "b=1M,40ms,100%"), ("loss '100%'", "0.1% or 0.001")),
        (("--site", "b=1M,40ms,much"), ("loss 'much'", "0.1% or 0.001")),
        (("--site", "b=1M,4ms", "b=2M,4ms"), ("another site 'b'",)),
        ((*TWO, "--codec", "int3"), ("'int3'", "exact, float16")),
        ((*TWO, "--deadline", "60"), ("deadline '60'", "60s")),
        ((*TWO, "--rounds", "0"), ("rounds 0",)),
        ((*TWO, "--cost-per-gb", "-1"), ("-1.0",)),
        ((*TWO, "--cost-per-gb", "nan"), ("nan",)),
        ((*TWO, "--policy", "none.json"), ("none.json",)),
    ],
)
def test_bad_input_is_an_error_that_names_it(run, arguments, told):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    for part in told:
        assert part in err
    assert err.splitlines()[1:] == ["Code: INVALID_INPUT (exit 1)"]


def test_a_model_without_tensors_and_one_that_is_missing(run, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    code, _, err = run(*TWO)
    assert code == 1
    assert "model.json has no tensors" in err
    (tmp_path / "model.json").unlink()
    code, _, err = run(*TWO)
    assert code == 1
    assert "there is no model file model.json" in err


def test_the_estimation_needs_no_flare():
    code = "import sys, nvflare_rdma.cli.plan; assert 'nvflare' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
