"""A training script that keeps what it received and what it sends."""

from __future__ import annotations

import sys
from pathlib import Path

import nvflare.client as flare
import torch

folder = Path(sys.argv[1])
flare.init()
site = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    torch.save(model.params, folder / f"received-{site}.pt")
    generator = torch.Generator().manual_seed(sum(site.encode()))
    result = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 1
        for name, value in model.params.items()
    }
    torch.save(result, folder / f"sent-{site}.pt")
    flare.send(flare.FLModel(params=result, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
