"""In PYTHONPATH there is no torch: FLARE loads it into each process of a job where it finds it, which takes seconds."""

raise ModuleNotFoundError("No module named 'torch'", name="torch")
