"""Sends back the model it gets, as float32, and prints what it got."""

from __future__ import annotations

import numpy as np
import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    for name, value in model.params.items():
        print(f"TRAINED ON {name} {value.dtype}", flush=True)
    params = {name: np.asarray(value, np.float32) for name, value in model.params.items()}
    flare.send(flare.FLModel(params=params, params_type="FULL"))
