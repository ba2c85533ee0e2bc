"""The whole job in FLARE's simulator, as small as it can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvflare_rdma.cli.report_figures import Moved, report_on
from nvflare_rdma.cli.report_records import find_jobs
from nvflare_rdma.cli.report_words import headline, notes

ROOT = Path(__file__).parents[2]
TINY = [
    "--rounds",
    "1",
    "--steps",
    "2",
    "--width",
    "256",
    "--layers",
    "1",
    "--quantize",
    "none",
]


# Not FLARE's own "tcp": the simulator uses that whatever it is told, so it would prove nothing.
@pytest.mark.flare
@pytest.mark.parametrize(("driver", "direct", "sites"), [("grpc", True, 2), ("rdma", False, 1)])
def test_job_runs_over_the_chosen_driver_and_counts_its_bytes(tmp_path, driver, direct, sites):
    command = [sys.executable, str(Path(__file__).parent / "tracked_job.py"), *TINY, "--sites", str(sites)]
    command += ["--driver", driver, "--workspace", str(tmp_path), *(["--direct"] if direct else [])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "fork() handlers" not in (tmp_path / "console.log").read_text()  # where a site's process may hang
    assert f"none{', direct' * direct} over {driver}" in done.stdout

    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rounds_table"]
    for moved in (row["bytes_down"], row["bytes_up"]):
        assert moved > sites * results["model_bytes"]
        assert moved < sites * results["model_bytes"] + 200_000
    assert row["held_out_loss"] < results["initial_loss"]
    assert row["seconds_down"] > 0
    assert row["seconds_up"] > 0
    assert (tmp_path / "results.png").stat().st_size > 0

    for process, side in (("server", "PASSIVE"), *((f"site-{n + 1}", "ACTIVE") for n in range(sites))):
        log = (tmp_path / "stdlib_lm" / process / "log.txt").read_text()
        assert f"{side} {driver}://" in log
        assert "FLARE's own path" not in log
        assert "duplicates ignored" not in log
        assert ("server.simulate_job listens for data on port" in log) == (direct and process == "server")
        assert (": data goes over tcp" in log and "data site-" in log) == (direct and process != "server")
    assert "ACTIVE tcp://" not in (tmp_path / "stdlib_lm" / "site-1" / "log.txt").read_text()
    if direct:
        transfers_are_recorded(tmp_path / "stdlib_lm", results["model_bytes"])
        receivers_of_analytics_get_them(tmp_path / "stdlib_lm", results["model_bytes"])
        the_report_tells_of_them(tmp_path / "stdlib_lm", results["model_bytes"])


def transfers_are_recorded(folder, model_bytes):
    for process, peers in (("server", ["site-1", "site-2"]), ("site-1", ["server"]), ("site-2", ["server"])):
        text = (folder / process / "simulate_job" / "nvflare_rdma" / "transfers.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        names = [(line["direction"], line["cell"], line["peer"]) for line in lines]
        ways = [(direction, peer) for direction in ("received", "sent") for peer in peers]
        assert sorted(names) == [(way, f"{process}.simulate_job", f"{peer}.simulate_job") for way, peer in ways]
        for line in lines:
            assert (line["round"], line["kind"], line["outcome"]) == (0, "tensors", "done")
            assert (line["path"], line["reason"], line["fabric"]) == ("direct", "", "tcp")
            assert line["raw_bytes"] == line["wire_bytes"] == model_bytes
            assert line["items"] > 1
            assert line["seconds"] > 0
            assert line["goodput"] == pytest.approx(model_bytes / line["seconds"], rel=0.01)


def receivers_of_analytics_get_them(folder, model_bytes):
    """With no more in the job than FLARE's own metrics need."""
    lines = (folder / "server" / "simulate_job" / "scalars.jsonl").read_text().splitlines()
    scalars = {(origin, tag): (value, step) for origin, tag, value, step in map(json.loads, lines)}
    for origin, transfers in (("site-1", 1), ("site-2", 1), ("simulator_server", 2)):
        for direction in ("sent", "received"):
            for kind in ("raw", "wire"):
                assert scalars[origin, f"rdma/{direction}_{kind}_bytes"] == (transfers * model_bytes, 0)
            assert scalars[origin, f"rdma/{direction}_goodput"][0] > 0
        assert scalars[origin, "rdma/direct_transfers"] == (2 * transfers, 0)


def the_report_tells_of_them(folder, model_bytes):
    (job,) = find_jobs(folder)
    report = report_on([job], job, folder)
    assert (report.job, report.name, report.moved) == ("simulate_job", "stdlib_lm", Moved(4, *[4 * model_bytes] * 2))
    assert headline(report).startswith("1 round, 2 sites: ")
    assert "without encoding; all direct, over tcp; the slowest site was site-" in headline(report)
    assert notes(report) == []
    (only,) = report.rounds
    assert only.down == only.up == Moved(2, *[2 * model_bytes] * 2)
    assert (report.loss_name, 0 < only.loss < 10) == ("train_loss", True)
