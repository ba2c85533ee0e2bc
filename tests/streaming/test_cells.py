"""FLARE cells, messages and download transactions, with tensors on data channels."""

import json

import pytest
from certificates import Authority
from processes import SMALL, run

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
    return json.loads((folder / "results.json").read_text())


def logged(result, text):
    return [line for line in result["log"] if text in line]


def test_a_message_lands_directly_and_flare_sees_it_finished(results):
    down = results["down"]
    assert GOOD.items() <= down.items()
    assert len(logged(down, "server listens for data on port")) == 1
    assert logged(down, "data goes over tcp")
    assert not logged(down, "FLARE's own path")


@pytest.mark.parametrize("which", ["again", "up"])
def test_the_channel_serves_what_comes_later_either_way(results, which):
    assert results[which]["same"] is True
    assert not any(logged(results[which], text) for text in ("listens", "data goes over", "FLARE's own path"))


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
    assert ends == {(RAW_TORCH - 4, 6), (RAW_NUMPY - 30, 1)}  # what was small came with the manifest


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("a receiver without this package", ""),
        ("a sender that has ended its channels", "the sender has no data channels any more"),
        ("no door on either side", "neither side has a door"),
    ],
)
def test_without_a_direct_way_flares_own_path_has_the_same_result(results, which, reason):
    result = results[which]
    assert GOOD.items() <= result.items()
    assert all(reason in line for line in logged(result, "FLARE's own path"))
    assert bool(logged(result, "FLARE's own path")) == bool(reason)


def test_an_aborted_download_fails_as_flares_does(results):
    assert "failed to download from server" in results["aborted"]["error"]
