"""What a worker needs, loaded: workers are forked from a process that has imported this, and start in no time."""

from __future__ import annotations

import threading

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.flare_compat import max_frame_bytes
from tests.chaos import content, worker

max_frame_bytes()  # imports FLARE
for name in content.CODECS:  # and what numba has compiled
    for dtype in ("float32", "float16"):
        content.as_encoded(content.values(1000, dtype), name)
        get_codec(name)
assert threading.active_count() == 1, "a process with threads is no good to be forked"

__all__ = ["worker"]
