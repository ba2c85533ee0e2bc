from __future__ import annotations

import os
import sys
from pathlib import Path

# Helpers that tests of several folders share are imported by name.
sys.path.insert(0, str(Path(__file__).parent / "support"))

# Before torch is loaded, and for all processes that tests start: tests run side by side, and threads of torch that
# spin while they wait for each other would take the processors from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
