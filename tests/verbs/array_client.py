"""A training script that keeps what it received and what it sends."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import nvflare.client as flare

folder = Path(sys.argv[1])
flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    [(name, array)] = model.params.items()
    np.save(folder / "received.npy", array)
    array = array[::-1].copy()
    np.save(folder / "sent.npy", array)
    flare.send(flare.FLModel(params={name: array}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
