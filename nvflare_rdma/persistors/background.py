"""Checkpoints that become durable while the next round goes on."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from nvflare_rdma.durable import sync_folder
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)


class BackgroundSave(FLComponent):
    """Has the next round begin while the last round's checkpoint goes to disk. Add it to the server of a job with
    FLARE's `PTFileModelPersistor` (`nvflare_rdma.recipe.save_in_background` does).

    FLARE's persistor writes a file beside the checkpoint, waits until the disk has it, and renames it; the workflow
    waits for all of that. With this component the file is written as before, so it has the model as it is then; the
    rest is done by a thread. Files, names and contents are the same, and a checkpoint is replaced by a whole one or not
    at all. The next save, whatever reads a checkpoint through the persistor, and the end of the run wait for the save
    before. When the server's host fails in that time, the checkpoint is that of the save before.

    Args:
        persistor_id: the id of the persistor in the job.

    Raises:
        ConfigError: when the run starts, if there is no such persistor, or if it has a `save_model_file` of its own.
        OSError: at the workflow's next save, when that has been written, if one before could not be ended. At the end
            of a run an error is logged.
    """

    __module__ = "nvflare_rdma.persistors"  # the public name, which FLARE writes into exported jobs

    def __init__(self, persistor_id: str = "persistor") -> None:
        super().__init__()
        self.persistor_id = persistor_id
        self._saver = _Saver()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's hook: the persistor is changed for the run."""
        if event_type == EventType.START_RUN:
            self._attach(fl_ctx.get_engine().get_component(self.persistor_id))
        elif event_type == EventType.END_RUN:
            try:
                self._saver.wait()
            except Exception as error:  # noqa: BLE001 - FLARE would only log it
                log.error("a checkpoint was not saved: %s", error)

    def _attach(self, persistor: Any) -> None:
        from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor

        if not isinstance(persistor, PTFileModelPersistor):
            raise ConfigError(
                f"BackgroundSave: {self.persistor_id!r} is {type(persistor).__name__}, but FLARE's "
                "PTFileModelPersistor is needed; give its id as persistor_id, or leave BackgroundSave out"
            )
        self.require_flares_save(persistor, self.persistor_id)
        if "save_model_file" in vars(persistor):
            return

        def save(save_path: str) -> None:
            self._saver.save(persistor.persistence_manager.to_persistence_dict(), Path(save_path))

        persistor.save_model_file = save
        persistor.save_model = self._telling(persistor.save_model)
        for name in ("load_model", "get_model", "get_model_inventory"):
            setattr(persistor, name, self._after_save(getattr(persistor, name)))

    @staticmethod
    def require_flares_save(persistor: Any, persistor_id: str) -> None:
        """Raise ConfigError unless FLARE's own method writes the checkpoints of a `PTFileModelPersistor`: that one is
        replaced, and what a subclass does in its place, such as to encrypt them, would be left out."""
        from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor

        if type(persistor).save_model_file is not PTFileModelPersistor.save_model_file:
            raise ConfigError(
                f"checkpoints can't be saved in the background: {persistor_id!r} is {type(persistor).__name__}, which "
                "has a save_model_file of its own that would not be called; leave BackgroundSave "
                "(save_in_background) out, or use FLARE's PTFileModelPersistor"
            )

    def _telling(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The workflow's save, which ends with what went wrong before. The best model is saved in an event, whose
        errors FLARE only logs: that save tells nothing, and leaves it for the workflow's."""

        @functools.wraps(method)
        def telling(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._saver.tell()
            return result

        return telling

    def _after_save(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def waiting(*args: Any, **kwargs: Any) -> Any:
            self._saver.wait()
            return method(*args, **kwargs)

        return waiting


class _Saver:
    """Saves one checkpoint at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None  # the thread's
        self._untold: Exception | None = None

    def wait(self) -> None:
        """Wait until the last checkpoint is in its place. Raises what went wrong since `tell`, once."""
        self._join()
        self.tell()

    def tell(self) -> None:
        """Raise what went wrong with the first save that has ended since, and that nobody was told of."""
        with self._lock:
            untold, self._untold = self._untold, None
        if untold is not None:
            raise untold

    def save(self, contents: dict[str, Any], path: Path) -> None:
        """Write `contents`, and leave it to a thread to put them in place. What went wrong before does not keep them
        from that."""
        import torch

        with self._lock:
            self._join()
            file = _new_file_beside(path)
            try:
                torch.save(contents, file)
                file.flush()
            except BaseException:
                _drop(file)
                raise
            self._thread = threading.Thread(target=self._finish, args=(file, path), name="rdma-save")
            self._thread.start()

    def _join(self) -> None:
        with self._lock:
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            self._untold, self._failure = self._untold or self._failure, None

    def _finish(self, file: IO[bytes], path: Path) -> None:
        try:
            os.fsync(file.fileno())
            os.replace(file.name, path)
            file.close()
            sync_folder(path.absolute().parent)
        except Exception as error:  # noqa: BLE001 - who saves next, or waits, gets it
            self._failure = error
            _drop(file)  # before the line: who reads it may look for what is left
            log.error("the checkpoint %s was not saved: %s; the workflow's next save fails with that", path, error)


def _new_file_beside(path: Path) -> IO[bytes]:
    """A file in the same folder, with the permissions that the checkpoint has, or would get."""
    file = open(path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"), "xb")  # noqa: SIM115 - it is closed later
    with contextlib.suppress(FileNotFoundError):
        os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
    return file


def _drop(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):
        file.close()
    with contextlib.suppress(OSError):
        os.remove(file.name)
