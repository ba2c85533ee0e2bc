"""Adds the number of its site to the model."""

from __future__ import annotations

import numpy as np
import nvflare.client as flare

flare.init()
number = np.float32(flare.get_site_name().rpartition("-")[2])
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    params = {name: np.asarray(value, np.float32) + number for name, value in model.params.items()}
    flare.send(flare.FLModel(params=params, params_type="FULL", meta={"NUM_STEPS_CURRENT_ROUND": 1}))
