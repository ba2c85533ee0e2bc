"""The job of docs/quickstart.md, as a reader copies it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quickstart.md"
#: What is put in the place of what: a test has a folder of its own, and less time.
CHANGES = [
    ('RdmaSimEnv(num_clients=2, scheme="rdma")', 'RdmaSimEnv(num_clients=2, scheme="rdma", workspace_root="ws")'),
    ("num_rounds=5", "num_rounds=1"),
]


def files() -> dict[str, str]:
    """The blocks of Python by the names of their files, with which the line above each begins."""
    page = PAGE.read_text().partition("## In your own job")[2].partition("## A server and its sites")[0]
    return dict(re.findall(r"^`(\w+\.py)`[^`]*?\n\n```python\n(.*?)```", page, re.DOTALL | re.MULTILINE))


@pytest.mark.flare
def test_the_job_of_the_quick_start_runs_and_is_reported_of(tmp_path):
    found = files()
    assert set(found) == {"my_model.py", "client.py", "job.py"}
    for old, new in CHANGES:
        assert old in found["job.py"]
        found["job.py"] = found["job.py"].replace(old, new)
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    kinds = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([sys.executable, "job.py"], **kinds)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    assert log.count("round 0: loss ") == 2
    assert "received 4 tensors from server.simulate_job directly: 67588 bytes, 11268 on the way" in log, (
        "as the page says"
    )
    report = [sys.executable, "-m", "nvflare_rdma.cli", "report", "ws/my_job", "--text"]
    done = subprocess.run(report, **kinds)
    assert done.returncode == 0, done.stderr
    assert "1 round, 2 sites: 270 kB of models travelled as 45.1 kB; all direct" in done.stdout, done.stdout
