"""A cell that meddles with the streams of others, in real cells: `stream_strangers.py`."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import SMALL, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    done = run(SMALL / "stream_strangers.py", str(folder), timeout=100, NVFLARE_RDMA_FABRICS="tcp")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return json.loads((folder / "results.json").read_text())


def test_only_who_a_stream_was_announced_to_is_answered(results):
    found = results["asks_for_what_others_were_offered"]
    assert found["site-2"] == "the stream was not announced to the cell that asks"
    assert "manifest" in found["site-1"]
    told = [line for line in results["asks_for_what_others_were_offered_log"] if "is refused" in line]
    assert told == ["'site-2' asks for a stream that was announced to others, and is refused"]


def test_a_receiver_asks_who_has_announced_the_stream_and_not_whom_that_names(results):
    found = results["names_another_cell"]
    assert found["asked"] == [["site-2", "site-1"]]
    assert found["states"][0] in ("running", "own")  # it may have been refused already


def test_only_the_sender_speaks_in_its_stream(results):
    found = results["speaks_in_a_stream_of_the_servers"]
    assert found["stranger"] == ["failed"] * 6
    assert set(found["states"]) <= {"running", "own"}
    assert len(found["states"]) == 3
    told = [line for line in results["speaks_in_a_stream_of_the_servers_log"] if "is refused" in line]
    assert told == [
        "'site-2' has sent a message in a stream of server, and is refused",
        "'nobody' has sent a message in a stream of server, and is refused",
    ]


def test_what_came_of_one_sites_file_is_not_anothers_to_remove(results):
    found = results["offers_a_file_of_which_the_server_has_sent_some"]
    assert len(found["before"]) == 2
    assert found["after"] == found["before"]


def test_a_stream_whose_sender_is_not_known_does_not_begin(results):
    assert results["says_nothing_of_who_it_is"] == ["EXECUTION_EXCEPTION"]
