"""A process that forks in the middle of its transfers, as a data loader may have it do."""

from __future__ import annotations

import json

from tests.support.processes import SMALL, run


def test_a_forked_childs_exit_touches_nothing_of_its_parents(tmp_path):
    done = run(SMALL / "forked_transfer.py", str(tmp_path), timeout=90)
    assert done.returncode == 0, done.stderr[-8000:]
    results = json.loads(done.stdout)
    transfer = {"same": True, "link": True, "requests": ["describe", "send", "done"], "door": True}
    assert results == {"tcp": transfer, "shm": transfer, "own door": True, "child": 0, "file": True}
