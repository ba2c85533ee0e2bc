"""Containers and files between FLARE cells, with FLARE's stream runner: `stream_cells.py` does it."""

from __future__ import annotations

import json

import pytest
import torch

from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.streaming.streams.containers import ContainerReceiving
from tests.support.processes import SMALL, run

OWN = "on FLARE's own path"
THANKS = {"site-1": "thanks from site-1", "site-2": "thanks from site-2"}
CONTAINERS = ("dict", "ordered", "list", "deque", "set", "tensors", "many", "narrow", "large texts")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    done = run(SMALL / "stream_cells.py", str(folder), timeout=100, NVFLARE_RDMA_FABRICS="tcp")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    print(done.stdout[-4000:])
    return json.loads((folder / "results.json").read_text())


def own_path(result) -> list[str]:
    return [line for line in result["log"] if OWN in line]


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name, results):
    result = results[name]
    assert result["result"] == ["OK", True]
    assert result["same"] == [True, True]
    assert not own_path(result)


def test_files(results):
    for name in ("file", "empty"):
        result = results[name]
        assert result["result"] == ["OK", THANKS]
        assert result["same"] == result["folders"] == [True, True]
        assert result["left"] == [[], []]
        assert not own_path(result)


def test_contexts_are_flares(results):
    """What receivers and the sender see is what they see when both sides are FLARE's."""
    for ours, flares in (("ordered", 0), ("file", 1)):
        expected = results["own sender"][flares]
        assert results[ours]["contexts"] == expected["contexts"]
        assert results[ours]["sent"] == expected["sent"]
        assert results[ours]["result"] == expected["result"]


def test_consumed_callbacks_end_as_flares(results):
    told = results["file"]["consumed"]
    assert [going_on for site, going_on, _ in told if site == "site-1"][-2:] == [True, False]
    assert {size for _, _, size in told} == {3_000_001}


def test_transfers_are_recorded(results):
    records = results["records"]
    ends = sorted((r["kind"], r["direction"], r["items"], r["raw_bytes"], r["peer"]) for r in records)
    tensors = 2 * 300 * 400 * 4 + 50_000 * 8 + 4
    expected = []
    for kind, items, nbytes in (("container", 7, tensors), ("file", 1, 3_000_001)):
        expected += [(kind, "received", items, nbytes, "server")] * 2
        expected += [(kind, "sent", items, nbytes, f"site-{i}") for i in (1, 2)]
    assert ends == expected
    assert {(r["fabric"], r["path"], r["outcome"], r["wire_bytes"] > 0) for r in records} == {
        ("tcp", "direct", "done", True)
    }


def test_retrievers(results):
    found = results["retrieved"]
    assert found["same"] == [True, True]
    assert found["codes"] == ["OK", "OK", "BAD_REQUEST_DATA", "BAD_REQUEST_DATA"]
    assert not own_path(found)


def test_encoded_files(results):
    result = results["encoded"]
    assert result["result"] == ["OK", THANKS]
    assert result["same"] == result["folders"] == [True, True]
    assert result["left"] == [[], []]
    assert not own_path(result)
    (size,) = {context["FileStreamer.file_size"] for context in result["contexts"]}
    assert size > 600_000
    assert {record["raw_bytes"] for record in result["records"]} == {size}
    (wire,) = {record["wire_bytes"] for record in result["records"]}
    assert len(result["records"]) == 4
    assert 75_000 < wire < 90_000
    refused, told = result["refused"]
    assert "data.bin can't be encoded as normfloat4: it is no safetensors file, as " in refused
    assert not told
    assert result["retrieved"] == [["OK", True], ["EXECUTION_EXCEPTION", None]]


def test_flares_own_path_does_not_encode(results):
    result = results["exact"]
    assert result["result"][0] == "OK"
    assert result["same"] == [True]
    assert not own_path(result)  # it was said of other objects
    assert len([line for line in result["log"] if "goes exact, not as normfloat4" in line]) == 1


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("before", "goes on FLARE's own path: this side has no links"),
        ("mixed", "goes to site-2 on FLARE's own path: it has no links"),
        ("own sender", ""),
        ("own receiver", "goes to site-1 on FLARE's own path: it does not know this package's streams"),
    ],
)
def test_without_a_direct_way_flares_own_path_has_the_same_result(which, reason, results):
    container, file = results[which]
    sites = len(container["same"])
    assert container["result"] == ["OK", True]
    assert file["result"] == ["OK", dict(list(THANKS.items())[:sites])]
    assert container["same"] == file["same"] == [True] * sites
    # The tensors in the container are in FLARE's messages then, which is said as of any.
    lines = [line for line in own_path(container) if not line.startswith("tensors ")]
    assert len(lines) == bool(reason)
    assert all(reason in line for line in lines)
    assert not own_path(file), "one line for each peer and reason"


def test_a_target_that_fails_fails_alone(results):
    result = results["disk"]
    assert result["result"] == ["ERROR", {}]
    assert result["same"] == [False, True]
    assert [context["__RC__"] for context in result["contexts"]] == ["EXECUTION_EXCEPTION", "OK"]
    assert [line for line in result["log"] if "data.bin did not get to site-1: data.bin can't be kept in" in line]
    assert not own_path(result)


def test_a_target_that_has_aborted(results):
    for result in results["aborted"]:
        assert result["result"][0] == "ERROR"
        assert result["same"] == [False, True]


def test_what_a_sender_says_that_is_no_stream(results):
    failed = [["EXECUTION_EXCEPTION"], {"site-2": "EXECUTION_EXCEPTION"}]
    found = results["hostile"]
    assert found.pop("nothing") == [[], {}]
    started = ("running", "own")  # the refusal may be here by then
    codes, told = found.pop("unknown stream")
    assert codes[0] in started
    assert codes[1:] == ["own", "own"]
    assert not told
    codes, told = found.pop("ends early")
    assert codes[0] in started
    assert told.get("site-2") in (None, "EXECUTION_EXCEPTION")
    assert found == dict.fromkeys(found, failed)
    assert len(found) == 8


def test_nothing_is_left_of_streams(results):
    assert results["tables"] == [0, 0, 0]


# -- a container's parts -------------------------------------------------------------------------------------


def receiving(size: int = 3, portions: int = 1, kind: str = "dict") -> ContainerReceiving:
    context = {"ContainerStreamer.type": kind, "ContainerStreamer.size": size, "nvflare_rdma.portions": portions}
    made = ContainerReceiving(context, "site-1", "server")
    assert "nvflare_rdma.portions" not in context
    return made


@pytest.mark.parametrize(
    "what", [None, 5, [[99, 1, 2]], [[-1, 1, 2]], [["0", 1, 2]], [[0, 1, 2], [0, 1, 2]], [[True, 1, 2]]], ids=str
)
def test_entries_that_lie(what):
    with pytest.raises(ProtocolError):
        receiving().take(what)


@pytest.mark.parametrize(
    ("kind", "rows", "tensors"),
    [
        ("dict", [[0, "a", 1], [1, "b", 2]], {}),  # one is missing
        ("dict", [[0, "a", 1], [1, "b"], [2, "c", 3]], {}),
        ("dict", [[0, "a", 1], [1, "a", 2], [2, "c", 3]], {}),  # one key twice
        ("dict", [[0, "a", 1], [1, [], 2], [2, "c", 3]], {}),
        ("dict", [[0, "a", 1], [1, "b", 2], [2, "c", 3]], {2: torch.ones(1)}),
        ("dict", [[0, "a", 1], [1, "b", 2], [2, "c", 3]], {7: torch.ones(1)}),
        ("set", [[0, 1], [1, []], [2, 3]], {}),
        ("list", [[0, 1], [1, 2, 3], [2, 3]], {}),
    ],
)
def test_containers_that_do_not_add_up(kind, rows, tensors):
    made = receiving(kind=kind)
    made.take(rows)
    with pytest.raises(ProtocolError):
        made._fill(tensors)
