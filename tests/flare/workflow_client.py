"""Adds the site's own step to what it gets, and keeps both. With SCAFFOLD it answers with the difference of controls,
too."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import nvflare.client as flare
from nvflare.app_common.app_constant import AlgorithmConstants

folder = Path(sys.argv[1])
flare.init()
site = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    got = np.asarray(model.params["numpy_key"], np.float32)
    step = np.random.default_rng(int(site[-1])).standard_normal(got.shape).astype(np.float32) / 10
    sent = {"numpy_key": got + step}
    controls = (model.meta or {}).get(AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL)
    meta = {}
    if controls is not None:
        meta[AlgorithmConstants.SCAFFOLD_CTRL_DIFF] = {"numpy_key": step}
        got = np.stack([got, np.asarray(controls["numpy_key"], np.float32)])
    np.savez(folder / f"{site}-{model.current_round}.npz", got=got, sent=sent["numpy_key"])
    flare.send(flare.FLModel(params=sent, params_type="FULL", meta=meta))
