"""Keeps what it receives and answers with the same tensor in every round, or with a small step from what it got."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import nvflare.client as flare

folder, mode = Path(sys.argv[1]), sys.argv[2]
flare.init()
site = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    np.savez(folder / f"received-{site}-{model.current_round}.npz", **model.params)
    own = np.random.default_rng(int(site[-1])).standard_normal((64, 100)).astype(np.float32)
    got = np.asarray(model.params["numpy_key"], np.float32)
    flare.send(flare.FLModel(params={"numpy_key": own if mode == "feedback" else got + own / 1000}, params_type="FULL"))
