"""Trains, evaluates and submits a model as the script of FLARE's hello-pt does, with a model that is known."""

from __future__ import annotations

import nvflare.client as flare
import torch

flare.init()
number = int(flare.get_site_name()[-1])
local = {"weight": torch.linspace(0, number, 6400).reshape(100, 64), "bias": torch.zeros(100)}
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if flare.is_train():
        flare.send(flare.FLModel(params=local, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
    elif flare.is_evaluate():
        net = torch.nn.Linear(64, 100)
        net.load_state_dict({name: torch.as_tensor(value) for name, value in model.params.items()})
        flare.send(flare.FLModel(metrics={"mean": float(net.weight.mean())}))
    elif flare.is_submit_model():
        flare.send(flare.FLModel(params=local))
