"""`HeldOutLoss`: the global model's loss on held-out text, on the server, before training and after every round."""

from __future__ import annotations

import hashlib
import json
import os
import time

import stdlib_text
import torch
from model import ByteGPT
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from progress import append_progress
from training import evaluate

FILE_NAME = "held_out_loss.jsonl"
ROWS = 48


def digest_of(model: torch.nn.Module) -> str:
    """SHA-256 of the weights' names and bytes."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class HeldOutLoss(FLComponent):
    """Server component; appends `{"round": n, "held_out_loss": x, "seconds": s, "digest": d}` to `held_out_loss.jsonl`
    in the job's run folder, with round null for the initial model. The digest is of every bit of the weights.

    What it evaluates is the server's own model in full precision, before any filter, on the same 48 windows in every
    run. The arguments are those of `ByteGPT`.
    """

    def __init__(self, width: int, layers: int, seed: int = 0, start: str = "", rank: int = 0) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.seed = seed
        self.start = start
        self.rank = rank
        self._model: ByteGPT | None = None
        self._rows: torch.Tensor | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's hook. The model is updated before AFTER_SHAREABLE_TO_LEARNABLE and not sent until later."""
        if event_type == EventType.START_RUN:
            sizes = {"width": self.width, "layers": self.layers, "heads": self.width // 64}
            self._model = ByteGPT(**sizes, seed=self.seed, start=self.start, rank=self.rank)
            self._rows = stdlib_text.held_out_sample(ROWS, self._model.context)
        elif event_type == AppEventType.INITIAL_MODEL_LOADED:
            self._record(None, fl_ctx)
        elif event_type == AppEventType.AFTER_SHAREABLE_TO_LEARNABLE:
            self._record(fl_ctx.get_prop(AppConstants.CURRENT_ROUND), fl_ctx)

    def _record(self, number: int | None, fl_ctx: FLContext) -> None:
        assert self._model is not None
        assert self._rows is not None
        weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        self._model.load_state_dict({k: torch.as_tensor(v) for k, v in weights.items()})
        start = time.perf_counter()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the sites may be at work: two threads that wait for each other would take longer
        try:
            loss = evaluate(self._model, self._rows)
        finally:
            torch.set_num_threads(threads)
        seconds = round(time.perf_counter() - start, 3)
        line = {"round": number, "held_out_loss": loss, "seconds": seconds, "digest": digest_of(self._model)}
        folder = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
        with open(os.path.join(folder, FILE_NAME), "a") as out:
            out.write(json.dumps(line) + "\n")
        append_progress(**line)
