from __future__ import annotations

import json

import pytest
from demo import compare, print_comparison
from report import collect, print_table, write_json, write_plot

SETTINGS = {"quantize": "none", "driver": "tcp", "rounds": 2, "wall_seconds": 1.0}


@pytest.fixture
def workspace(tmp_path):
    """What a job of two rounds and one site leaves behind."""
    server = tmp_path / "server" / "simulate_job"
    site = tmp_path / "site-1" / "simulate_job"
    server.mkdir(parents=True)
    site.mkdir(parents=True)
    moved = [(None, 10, 20), (0, 3_000_000, 2_000_000), (1, 5_000_000, 4_000_000), (None, 1, 2)]
    lines = [{"kind": "bytes", "round": r, "sent": s, "received": v, "retransmitted": 7} for r, s, v in moved]
    (server / "traffic.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"kind": "by')
    task = {
        "kind": "task",
        "site": "site-1",
        "seconds": {"pull": 0.5, "send": 0.25, "encode": 0.1, "decode": 0.2},
    }
    (site / "traffic.jsonl").write_text("".join(json.dumps({**task, "round": r}) + "\n" for r in (0, 1)))
    losses = [(None, 5.5), (0, 3.0), (1, 2.0)]
    (server / "held_out_loss.jsonl").write_text(
        "".join(json.dumps({"round": r, "held_out_loss": x, "digest": f"of {r}"}) + "\n" for r, x in losses)
    )
    return tmp_path


def test_collect_brings_losses_bytes_and_seconds_together(workspace):
    results = collect(workspace, SETTINGS)
    assert results["initial_loss"] == 5.5
    assert results["final_loss"] == 2.0
    assert results["final_digest"] == "of 1"
    assert results["bytes_per_round"] == 7_000_000
    assert results["bytes_outside_rounds"] == 33
    assert results["rounds_table"][0] == {
        "round": 0,
        "bytes_down": 3_000_000,
        "bytes_up": 2_000_000,
        "bytes_retransmitted": 7,
        "seconds_down": 0.5,
        "seconds_up": 0.25,
        "seconds_codec": 0.3,
        "held_out_loss": 3.0,
    }


def test_collect_refuses_a_run_that_stopped_early(workspace):
    with pytest.raises(RuntimeError, match=r"nothing recorded for round\(s\) 3, 4"):
        collect(workspace, {**SETTINGS, "rounds": 4})


def test_table_json_and_plot(workspace, capsys):
    results = collect(workspace, SETTINGS)
    print_table(results)
    shown = capsys.readouterr().out
    for cell in ("none over tcp", "5.5000", "3.0000", "2.0000", "3.000", "4.000", "0.25"):
        assert cell in shown
    write_json(results, workspace / "results.json")
    assert json.loads((workspace / "results.json").read_text()) == results
    write_plot([results, results], workspace / "results.png")
    assert (workspace / "results.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_of_two_runs(workspace, capsys):
    full = collect(workspace, SETTINGS)
    few = json.loads(json.dumps({**full, "quantize": "normfloat4", "bytes_per_round": 1_000_000, "final_loss": 2.1}))
    summary = compare(full, few)
    assert summary == {
        "times_fewer_bytes": 7.0,
        "percent_of_full_bytes": 14.286,
        "final_loss_difference_percent": 5.0,
    }
    print_comparison(full, few, summary)
    shown = capsys.readouterr().out
    assert "7.00 times fewer bytes (14.29 %" in shown
    assert "2.1000 against 2.0000 (+5.00 %; one run of each" in shown
