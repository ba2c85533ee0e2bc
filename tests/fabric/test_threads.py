"""How the end of threads is waited for."""

from __future__ import annotations

import threading
import time

from nvflare_rdma.fabric.threads import join_threads


def test_there_is_one_deadline_for_all_threads(monkeypatch):
    waited: list[float] = []
    clock = [100.0]

    class Stuck(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            waited.append(timeout)
            clock[0] += timeout

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    join_threads([Stuck(), threading.current_thread(), Stuck(), Stuck()], 5.0)
    assert waited == [5.0, 0.0, 0.0]
