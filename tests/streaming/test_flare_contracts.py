"""What FLARE promises of a download, on its own path and on ours: both come to the same.

Server, sites and trainer are processes with FLARE cells; ours are secure.
"""

import json

import pytest
from certificates import Authority
from processes import SMALL, run

BYTES = 4 * 300_000 * 4 + 700_000 * 8


@pytest.fixture(scope="module", params=["flare", "ours"])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contracts")
    credentials = {}
    if request.param == "ours":
        authority = Authority(folder / "pki")
        credentials = {"server": authority.issue("server", "server")}
        credentials |= {name: authority.issue("client", name) for name in ("site-1", "site-2")}
    arguments = [str(folder), request.param, json.dumps(credentials)]
    done = run(SMALL / "contract_server.py", *arguments, timeout=150, NVFLARE_RDMA_FABRICS="tcp")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    print(done.stdout[-4000:])
    found = json.loads((folder / "results.json").read_text())
    found["path"] = request.param
    found["log"] = done.stdout + done.stderr
    return found


def ended(results, name, kind, **receivers):
    """How it ended for each receiver, told once to each who asked."""
    result, whole = results[name], BYTES + 8 * kind
    assert result["callback"] == "finished"
    assert result["outcome"] == ("completed" if set(receivers.values()) == {"success"} else "failed")
    assert result["receivers"] == receivers
    assert result["rises"]
    for receiver, status in receivers.items():
        # Who the receivers will be is not known where others pass the message on.
        state, nbytes = result["progress"].get(receiver) or result["progress"]["null"]
        assert state == ("completed" if status == "success" else "failed")
        assert nbytes < whole if status == "failed" else nbytes >= whole
    return result["answers"]


def test_all_receivers_have_it_before_the_transaction_ends(results):
    answers = ended(results, "everyone", 0, **{"site-1": "success", "site-2": "success"})
    assert [answers[name]["same"] for name in ("site-1", "site-2")] == [True, True]


def test_a_receiver_that_aborts_is_out_at_once_and_the_other_goes_on(results):
    answers = ended(results, "aborted", 1, **{"site-1": "success", "site-2": "failed"})
    assert answers["site-1"]["same"] is True
    assert answers["site-2"]["error"] == "failed to download from server"


def test_receivers_that_begin_late_or_stop_use_up_their_budgets(results):
    answers = ended(results, "budgets", 2, **{"site-1": "success", "site-2": "failed", "site-3": "failed"})
    assert answers["site-1"]["same"] is True
    assert answers["site-2"]["error"] == "failed to download from server"


def test_a_reference_that_is_passed_on_is_the_trainers(results):
    answers = ended(results, "passed on", 3, **{"site-1.trainer": "success"})
    assert answers["site-1"]["same"] is True


def test_what_a_trainer_sends_arrives(results):
    assert results["given"]["same"] is True


def test_a_sender_that_has_died_is_not_waited_for(results):
    assert results["died"]["error"] == "failed to download from site-1.trainer"
    assert results["died"]["seconds"] < 20  # a single request may take longer


def test_it_went_the_way_that_is_tested(results):
    assert bool(results["made on FLARE's own path"]) == (results["path"] == "flare")
    assert results["budget left in use"] == 0
    for name in ("site-1", "site-2", "site-1.trainer"):
        assert (f"data server - {name}: data goes over tcp" in results["log"]) == (results["path"] == "ours")
