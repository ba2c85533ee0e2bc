"""In PYTHONPATH there is no torch: FLARE loads it into each process of a job where it finds it, which takes seconds."""

from __future__ import annotations

raise ModuleNotFoundError("No module named 'torch'", name="torch")
