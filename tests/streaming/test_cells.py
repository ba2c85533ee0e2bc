"""FLARE cells, messages and download transactions, with tensors on data channels."""

from __future__ import annotations

import json

import pytest

from tests.support.certificates import Authority
from tests.support.processes import SMALL, run

RAW_TORCH = 5 * 500 * 1000 * 4 + 300 * 300 * 2 + 4
RAW_NUMPY = 500_000 * 8 + 30
GOOD = {"code": "ok", "same": True, "finished": ["finished", 2]}


@pytest.fixture(scope="module", params=["clear", "secure"])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    credentials = {}
    if request.param == "secure":
        authority = Authority(folder / "pki")
        credentials = {"server": authority.issue("server", "server"), "site-1": authority.issue("client", "site-1")}
    arguments = [str(folder), json.dumps(credentials)]
    done = run(SMALL / "two_cells.py", *arguments, timeout=100, NVFLARE_RDMA_FABRICS="tcp")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    print(done.stdout[-4000:])
    return {**json.loads((folder / "results.json").read_text()), "log": done.stdout}


def logged(result, text):
    return [line for line in result["log"] if text in line]


def test_a_message_lands_directly_and_flare_sees_it_finished(results):
    down = results["down"]
    assert GOOD.items() <= down.items()
    assert len(logged(down, "server listens for data on port")) == 1
    assert logged(down, "data goes over tcp")
    assert not logged(down, "FLARE's own path")
    assert not logged(down, "duplicates ignored")


def test_the_receiver_says_how_each_message_came(results, request):
    tls = "TLS" if "secure" in request.node.name else "no TLS"
    said = logged(results["down"], "from server directly: ")
    (tensors,) = [line for line in said if f"received 8 tensors from server directly: {RAW_TORCH} bytes" in line]
    (arrays,) = [line for line in said if f"received 2 tensors from server directly: {RAW_NUMPY} bytes" in line]
    for line in (tensors, arrays):
        assert f" s over tcp, {tls}, port " in line
        assert int(line.split("port ")[1]) > 0


def test_flares_lines_about_what_came_directly_have_its_size(results):
    lines = [line for line in results["log"].splitlines() if "[client] download ref=" in line and " done: " in line]
    assert lines
    assert not [line for line in lines if "(0 bytes)" in line]
    assert [line for line in lines if f"({RAW_TORCH:,} bytes)" in line]
    assert [line for line in lines if f"({RAW_NUMPY:,} bytes)" in line]


@pytest.mark.parametrize("which", ["again", "up"])
def test_the_channel_serves_what_comes_later_either_way(results, which):
    assert results[which]["same"] is True
    assert not any(
        logged(results[which], text) for text in ("listens", "data goes over", "FLARE's own path", "duplicates ignored")
    )


@pytest.mark.parametrize("results", ["secure"], indirect=True)  # it takes certificates
def test_what_flare_encrypts_from_end_to_end_comes_directly_too(results):
    assert GOOD.items() <= results["encrypted"].items()
    assert len(logged(results["encrypted"], "from server directly: ")) == 2
    assert not logged(results["encrypted"], "FLARE's own path")


@pytest.mark.parametrize("topic", ["few", "adapter"])
def test_over_an_open_link_a_message_takes_one_plain_request_and_flares_last_one(results, topic):
    assert results["asked"][topic] == ["plain", "stream"]


def test_what_comes_again_because_its_sender_has_not_heard_that_it_arrived_does_no_harm(results):
    result = results["a sender that has not heard what arrived"]
    assert GOOD.items() <= result.items()
    assert logged(result, "duplicates ignored")


def test_progress_counts_what_came_directly(results):
    by_transfer = {}
    for event in results["progress"]:
        by_transfer.setdefault(event.pop("transfer_id"), []).append(event)
    assert len(by_transfer) == 2
    ends = set()
    for events in by_transfer.values():
        assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
        assert [event["bytes_done"] for event in events] == sorted(event["bytes_done"] for event in events)
        assert [events[0]["state"], events[-1]["state"]] == ["start", "completed"]
        ends.add((events[-1]["bytes_done"], events[-1]["items_done"]))
    assert ends == {(RAW_TORCH, 7), (RAW_NUMPY, 2)}


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("a receiver without this package", ["this process has no data links", "tensors go to site-1 on"]),
        ("a sender that has ended its channels", ["the sender has no links any more"]),
        ("no door on either side", ["neither side has a door"]),
    ],
)
def test_without_a_direct_way_flares_own_path_has_the_same_result(results, which, said):
    result = results[which]
    assert GOOD.items() <= result.items()
    lines = logged(result, "FLARE's own path")
    assert len(lines) == len(said), "one line for each peer and reason, though the message is two transfers"
    assert all(any(text in line for line in lines) for text in said)


def recorded(result):
    """(direction, cell) -> records of what was not aborted."""
    found = {}
    for record in result["records"]:
        if record["outcome"] == "done":
            found.setdefault((record["direction"], record["cell"]), []).append(record)
    return found


@pytest.mark.parametrize("which", ["down", "again", "up"])
def test_a_direct_transfer_is_recorded_on_both_sides(results, which):
    sender, receiver = ("site-1", "server") if which == "up" else ("server", "site-1")
    found = recorded(results[which])
    assert found.keys() == {("sent", sender), ("received", receiver)}
    for (direction, _), records in found.items():
        assert {record["peer"] for record in records} == {receiver if direction == "sent" else sender}
        assert sorted((r["items"], r["raw_bytes"], r["wire_bytes"]) for r in records) == [
            (2, RAW_NUMPY, RAW_NUMPY),
            (8, RAW_TORCH, RAW_TORCH),
        ]
        for record in records:
            assert (record["kind"], record["path"], record["reason"]) == ("tensors", "direct", "")
            assert (record["fabric"], record["resent_chunks"]) == ("tcp", 0)
            assert record["seconds"] > 0
            assert record["goodput"] == pytest.approx(record["raw_bytes"] / record["seconds"], rel=0.01)
            assert 0 <= record["budget_peak_bytes"] <= 64 << 20


def test_sealed_chunks_take_a_share_of_the_budget_and_others_none(results, request):
    secure = "secure" in request.node.name
    received = recorded(results["again"])["received", "site-1"]
    assert [record["budget_peak_bytes"] > 0 for record in received] == [secure, secure]


@pytest.mark.parametrize(
    ("which", "why_received", "why_sent"),
    [
        ("a receiver without this package", "no data links", "asked on FLARE's own path"),
        ("a sender that has ended its channels", "no links any more", "no links any more"),
        ("no door on either side", "neither side has a door", "asked on FLARE's own path"),
    ],
)
def test_flares_own_path_is_recorded_with_the_reason(results, which, why_received, why_sent):
    found = recorded(results[which])
    assert found.keys() == {("sent", "server"), ("received", "site-1")}
    on_the_way = []
    for (direction, _), records in found.items():
        assert sorted((r["items"], r["raw_bytes"]) for r in records) == [(2, RAW_NUMPY), (8, RAW_TORCH)]
        for record in records:
            assert record["path"] == "flare"
            assert (why_sent if direction == "sent" else why_received) in record["reason"]
            assert record["fabric"] == ""
            assert record["raw_bytes"] < record["wire_bytes"] < record["raw_bytes"] + 50_000
        on_the_way.append(sorted(record["wire_bytes"] for record in records))
    assert on_the_way[0] == on_the_way[1]


@pytest.mark.parametrize(
    ("which", "path"),
    [
        ("few bits", "direct"),
        ("few bits relayed", "flare"),
        ("few bits on disk", "direct"),
        ("few bits relayed to disk", "flare"),
    ],
)
def test_few_bits_are_recorded_as_they_travel(results, which, path):
    result = results[which]
    on_disk = "disk" in which
    assert (result["kind"], result["finished"]) == ("_LazyRef" if on_disk else "Tensor", True)
    assert (result.get("files"), result.get("left")) == ((2, []) if on_disk else (None, None))
    assert 0 < result["error"] < 1
    assert result["decoded"] == {"w": not on_disk, "b": False}  # told of tensors in memory
    found = recorded(result)
    assert found.keys() == {("sent", "server"), ("received", "site-1")}
    encoded = 800 * 1000 // 2
    for (record,) in found.values():
        assert (record["items"], record["raw_bytes"], record["path"]) == (2, 800 * 1000 * 4 + 12, path)
        assert encoded < record["wire_bytes"] < 1.2 * encoded
        assert ("neither side has a door" in record["reason"]) == (
            path == "flare" and record["direction"] == "received"
        )


def test_an_aborted_transfer_is_recorded_as_failed(results):
    failed = [record for record in results["aborted"]["records"] if record["direction"] == "received"]
    assert failed
    for record in failed:
        assert record["outcome"].startswith("failed: ")
        assert (record["items"], record["raw_bytes"], record["goodput"]) == (0, 0, 0)


def test_an_aborted_download_fails_as_flares_does(results):
    assert "failed to download from server" in results["aborted"]["error"]


@pytest.mark.parametrize(("which", "path"), [("many", "direct"), ("many relayed", "flare")])
def test_small_tensors_that_travel_together_are_counted_one_by_one(results, which, path):
    raw = sum(4 * 100 * (100 + i) for i in range(60))
    assert results[which]["count"] == 60
    assert 0 < results[which]["error"] < 0.7  # they came in few bits
    assert len(results[which]["records"]) == 2
    for record in results[which]["records"]:
        assert (record["items"], record["raw_bytes"], record["path"]) == (60, raw, path)
        assert raw // 8 < record["wire_bytes"] < raw // 6


@pytest.mark.parametrize("which", ["few bits up, to be added", "few bits relayed, to be added"])
def test_few_bits_stay_encoded_at_a_server_until_they_are_added(results, which):
    result = results[which]
    # What the codec can't carry comes exact, and what is small comes in the manifest.
    assert result["encoded"] == {"w": True, "b": False, "diverged": False}
    assert result["sum"] is result["exact"] is result["noted"] is True
    raw = 800 * 1000 * 4
    assert raw / 8 < result["held"] < raw / 7
    assert result["figures"]["results_added_bytes"] == raw
    assert result["figures"]["results_decoded_bytes"] == 0


def test_what_a_server_has_no_memory_for_waits_on_disk_until_it_is_added(results):
    result = results["full precision up, to be added"]
    assert result["encoded"] == {"w": True, "b": False, "diverged": True}
    assert result["sum"] is result["exact"] is True
    assert result["on disk"] == 800 * 1000 * 4 + 400 * 1000 * 4
    assert (result["held"], result["figures"]["results_added_bytes"]) == (0, 800 * 1000 * 4)


def test_nothing_stays_encoded_where_nobody_wants_it(results):
    result = results["few bits up"]
    assert not any(result["encoded"].values())
    assert result["sum"] is result["exact"] is True
    assert result["held"] == 0
    assert results["few bits to a site"]["kind"] == "Tensor"
    assert results["held afterwards"] == 0


@pytest.mark.parametrize("which", ["narrow", "narrow on disk", "narrow relayed", "narrow relayed to disk"])
def test_tensors_of_8_and_4_bits_travel_as_they_are(results, which):
    result = results[which]
    assert "same" in result, result
    assert all(result["same"].values()), result["same"]
    assert result["kind"] == ("_LazyRef" if "disk" in which else "Tensor")


def test_where_flares_own_path_can_not_bring_them_the_sender_says_so(results):
    result = results["narrow without a direct way"]
    assert "same" not in result
    (line,) = logged(result, "will not reach site-1")
    assert "tensors of dtype float4_e2m1fn_x2, float8_e8m0fnu" in line
    assert "give its part of the job RdmaTransfer, or send them as uint8" in line
