"""Files between the server and the sites of a simulated job: FLARE's simulator has two cells in the server's process,
and answers from another one than it asks from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run

JOB = Path(__file__).with_name("streams_job.py")


@pytest.mark.flare
def test_files_between_server_and_sites(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    done = run(JOB, str(tmp_path / "ws"), str(folder), timeout=150)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    told = sorted(line[9:] for line in log.splitlines() if line.startswith("STREAMED "))
    assert told == [
        "simulator_server site-1 site-2 OK",
        *(f"site-{n} {target} OK" for n, other in ((1, 2), (2, 1)) for target in ("server", f"site-{other}")),
    ]
    assert "on FLARE's own path" not in log  # nor from site to site
    assert "is refused" not in log
    sources = [path.read_bytes() for path in sorted(folder.glob("from-*"))]
    came = sorted(path.read_bytes() for path in folder.iterdir() if not path.name.startswith("from-"))
    assert came == sorted(source for source in sources for _ in range(2))
