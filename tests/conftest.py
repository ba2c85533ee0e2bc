from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

ROOT = str(Path(__file__).resolve().parents[1])

# `tests.support` is a package that tests, and the processes that they start, import by that name.
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

# Before torch is loaded, and for all processes that tests start: tests run side by side, and threads of torch that
# spin while they wait for each other would take the processors from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What an example takes tells of the machine, and of what else runs there, and not of the code.
settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
