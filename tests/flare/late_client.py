"""Two sites that answer when the third's result is on its way, where `late_parts.py` holds it back for a round."""

from __future__ import annotations

import sys
from pathlib import Path

import nvflare.client as flare
import torch
from late_parts import wait_for

folder = Path(sys.argv[1])
flare.init()
site = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    this = model.current_round
    (folder / f"{site}-has-{this}").touch()
    sent = {
        name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(int(site[-1]) + this))
        for name, value in model.params.items()
    }
    if site == "site-3":
        sent = {name: value + 1000 for name, value in sent.items()}  # it would show in any sum
    else:
        wait_for(folder / f"held-{this}")
        torch.save({"received": model.params, "sent": sent}, folder / f"{site}-{this}.pt")
    flare.send(flare.FLModel(params=sent, meta={"NUM_STEPS_CURRENT_ROUND": int(site[-1])}))
