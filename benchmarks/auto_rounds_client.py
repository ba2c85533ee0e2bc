"""The training of `auto_rounds.py`: a little noise."""

from __future__ import annotations

import numpy as np
import nvflare.client as flare

flare.init()
noise = np.random.default_rng(int(flare.get_site_name().rpartition("-")[2]))
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    params = {
        name: np.asarray(value, np.float32) + noise.normal(0.0, 1e-3, np.shape(value)).astype(np.float32)
        for name, value in model.params.items()
    }
    flare.send(flare.FLModel(params=params, params_type="FULL", meta={"NUM_STEPS_CURRENT_ROUND": 1}))
