"""What FLARE promises of a download holds for direct transfers: `contract_server`, whose processes are secure cells.

``contract_server.py FOLDER flare`` does the same on FLARE's own path, with the same results.
"""

from __future__ import annotations

import json

import pytest

from tests.support.certificates import Authority
from tests.support.processes import SMALL, run

BYTES = 4 * 300_000 * 4 + 700_000 * 8
SITES = ("site-1", "site-2")


def ended(result, kind, **receivers):
    """The transaction's end, for each receiver: told once, after progress that rises. What the receivers say."""
    assert result["callback"] == "finished"
    assert result["outcome"] == ("completed" if set(receivers.values()) == {"success"} else "failed")
    assert result["receivers"] == receivers
    assert result["rises"]
    for receiver, status in receivers.items():
        # Where others pass a message on, FLARE does not know who its receivers will be.
        state, nbytes = result["progress"].get(receiver) or result["progress"]["null"]
        assert state == ("completed" if status == "success" else "failed")
        assert (nbytes == BYTES + 8 * kind) == (status == "success")
    return result["answers"]


@pytest.mark.flare
def test_direct_transfers_end_as_flares_downloads_do(tmp_path):
    authority = Authority(tmp_path / "pki")
    credentials = {"server": authority.issue("server", "server")}
    credentials |= {name: authority.issue("client", name) for name in SITES}
    arguments = [str(tmp_path), "ours", json.dumps(credentials)]
    done = run(SMALL / "contract_server.py", *arguments, timeout=150, NVFLARE_RDMA_FABRICS="tcp")
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    found = json.loads((tmp_path / "results.json").read_text())

    answers = ended(found["everyone"], 0, **dict.fromkeys(SITES, "success"))
    assert [answers[name]["same"] for name in SITES] == [True, True]

    # One aborts: it is out at once, and the other goes on.
    answers = ended(found["aborted"], 1, **{"site-1": "success", "site-2": "failed"})
    assert answers["site-1"]["same"] is True
    assert answers["site-2"]["error"] == "failed to download from server"

    # One freezes in the middle, another never begins: their budgets end it, and theirs only.
    answers = ended(found["budgets"], 2, **{"site-1": "success", "site-2": "failed", "site-3": "failed"})
    assert answers["site-1"]["same"] is True
    assert answers["site-2"]["error"] == "failed to download from server"
    assert [log.count(f"receiver {name} failed for ref") for name in (*SITES, "site-3")] == [0, 1, 1]

    # Between the server and the trainer, whichever sends; a site passes on the references.
    answers = ended(found["passed on"], 3, **{"site-1.trainer": "success"})
    assert answers["site-1"]["same"] is True
    assert found["given"]["same"] is True

    # The trainer dies while it sends, and the site says so: nobody waits for an answer of the trainer's, for which
    # FLARE has more time than there was for this.
    assert found["died"]["error"] == "failed to download from site-1.trainer"

    for name in (*SITES, "site-1.trainer"):
        assert f"data server - {name}: data goes over tcp" in log
    assert found["made on FLARE's own path"] == 0
    assert found["budget left in use"] == 0
