"""`Distribute`: the server's workflow. It has every site fetch the file, and says what each has then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model import folder_of, header_digest, make_model, stamp
from nvflare.apis.controller_spec import Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from nvflare_rdma.streaming import FileRetriever

TASK = "fetch_model"


class OneFile(FileRetriever):
    """Sends one file, and no other of its folder."""

    def __init__(self, path: Path, quantization_type: str | None) -> None:
        super().__init__(str(path.parent), FileRetriever.__name__, quantization_type=quantization_type)
        self.stream_channel = FileRetriever.__name__  # as the sites' has it; FLARE takes the name of the class
        self._name = path.name

    def validate_request(self, request: Shareable, fl_ctx: FLContext) -> tuple[str, Any]:
        """FLARE's hook: whether who asks may have it."""
        if request.get("file_name") != self._name:
            self.log_error(fl_ctx, f"bad request: only {self._name} is to be had here")
            return ReturnCode.BAD_REQUEST_DATA, None
        return super().validate_request(request, fl_ctx)


class Distribute(Controller):
    """Has every site fetch a file from this server.

    Args:
        file: the safetensors file, below `folder`, or with its whole path. If "", one with random weights is made.
        folder: where the server keeps models; see `folder_of`.
        quantization_type: the codec of what travels; "" for the file as it is.
        width, layers, vocab: sizes of the model that is made.
        sites: how many have to get it. All that there are get it, and the job fails if one of them does not.
        timeout: seconds that all of it may take.
    """

    def __init__(  # noqa: PLR0913
        self,
        file: str = "",
        folder: str = "models",
        quantization_type: str = "",
        width: int = 768,
        layers: int = 12,
        vocab: int = 50257,
        sites: int = 1,
        timeout: int = 24 * 3600,
    ) -> None:
        super().__init__()
        self.file, self.folder, self.quantization_type = file, folder, quantization_type
        self.width, self.layers, self.vocab = width, layers, vocab
        self.sites, self.timeout = sites, timeout
        self._path = Path()
        self._said: dict[str, bool] = {}

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Find the file, or make it, and be ready to send it to the sites that ask for it."""
        folder = folder_of(fl_ctx, self.folder)
        self._path = folder / (self.file or "random.safetensors")
        if not self.file and not self._path.exists():
            make_model(self._path, self.width, self.layers, self.vocab)
        if not self._path.is_file():
            self.system_panic(f"there is no file {self._path}: put the model there, or name another one", fl_ctx)
            return
        OneFile(self._path, self.quantization_type or None).handle_event(EventType.START_RUN, fl_ctx)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """One task for all sites."""
        wanted = Shareable(
            {
                "file": self._path.name,
                "size": self._path.stat().st_size,
                "header": header_digest(self._path),
                "stamp": stamp(self._path, self.quantization_type),
            }
        )
        self.log_info(fl_ctx, f"sites are to have {self._path.name}, of {wanted['size']} bytes")
        task = Task(TASK, wanted, timeout=self.timeout, result_received_cb=self._came)
        there = {client.name for client in fl_ctx.get_engine().get_clients()}
        self.broadcast_and_wait(task, fl_ctx, min_responses=0, abort_signal=abort_signal)  # 0: of all of them
        have = {site for site, well in self._said.items() if well}
        if lacking := sorted((there | self._said.keys()) - have):
            self.system_panic(f"{', '.join(lacking)}: no model. Run the job again, and it goes on", fl_ctx)
        elif len(have) < self.sites:
            self.system_panic(f"{len(have)} sites have the model, and {self.sites} were to get it", fl_ctx)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left to stop."""

    def _came(self, client_task: object, fl_ctx: FLContext) -> None:
        site, result = client_task.client.name, client_task.result  # type: ignore[attr-defined]
        self._said[site] = result.get_return_code() == ReturnCode.OK
        if self._said[site]:
            self.log_info(fl_ctx, f"{site} {result['said']}")
        else:
            self.log_error(fl_ctx, f"{site} has no model: {result.get('said', result.get_return_code())}")
