"""A checkpoint goes to disk while the next round goes on, and is as good as FLARE's own."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.job_config.api import FedJob

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.persistors import BackgroundSave
from nvflare_rdma.recipe import save_in_background
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

FILE, BEST = "FL_global_model.pt", "best_FL_global_model.pt"


class Encrypting(PTFileModelPersistor):
    def save_model_file(self, save_path):
        super().save_model_file(f"{save_path}.encrypted")


class Disk:
    """`os.fsync` waits while it is held, and fails as it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.go_on, self.reached, self.error = threading.Event(), threading.Event(), None
        self.go_on.set()
        self._sync = os.fsync
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        self.reached.set()
        assert self.go_on.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        self._sync(descriptor)


@pytest.fixture
def disk(monkeypatch):
    found = Disk(monkeypatch)
    yield found
    found.go_on.set()


class Run:
    """A server's run with FLARE's persistor; ours is attached if there is a `BackgroundSave`."""

    def __init__(self, folder, component=None, persistor=None) -> None:
        self.file, self.component = folder / FILE, component
        self.persistor = persistor or PTFileModelPersistor(model=torch.nn.Linear(3, 2), allow_numpy_conversion=False)
        self.context = FLContext()
        self.context.set_prop(FLContextKey.APP_ROOT, str(folder))
        self.context.get_engine = lambda: SimpleNamespace(get_component=lambda name: self.persistor)
        for each in (self.persistor, component):
            if each is not None:
                each.handle_event(EventType.START_RUN, self.context)

    def save(self, value: float) -> dict[str, torch.Tensor]:
        weights = {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}
        self.persistor.save(make_model_learnable(weights, {}), self.context)
        return weights

    def end(self) -> None:
        self.component.handle_event(EventType.END_RUN, self.context)

    def saved(self) -> float:
        model = torch.load(self.file, weights_only=True)["model"]
        assert len({float(v) for tensor in model.values() for v in tensor.flatten()}) == 1
        return float(model["bias"][0])


@pytest.fixture
def run(tmp_path):
    (tmp_path / "ours").mkdir()
    made = Run(tmp_path / "ours", BackgroundSave())
    made.persistor.load(made.context)
    yield made
    made.end()


def test_the_workflow_goes_on_while_the_disk_is_busy_and_the_model_is_that_of_then(run, disk):
    disk.go_on.clear()
    weights = run.save(1.0)
    assert disk.reached.wait(DEADLINE)
    assert not run.file.exists()  # it is replaced by a whole one
    for tensor in weights.values():
        tensor.fill_(7.0)  # as an optimizer at the server does
    disk.go_on.set()
    eventually(run.file.exists, DEADLINE)
    assert run.saved() == 1.0


def test_the_file_is_as_flares(run, tmp_path):
    flares = Run(tmp_path)
    flares.persistor.load(flares.context)
    flares.save(2.0)
    run.save(2.0)
    run.end()
    assert run.file.read_bytes() == flares.file.read_bytes()
    assert stat.S_IMODE(run.file.stat().st_mode) == stat.S_IMODE(flares.file.stat().st_mode)
    run.file.chmod(0o640)
    run.save(3.0)
    run.end()
    assert stat.S_IMODE(run.file.stat().st_mode) == 0o640
    assert [path.name for path in run.file.parent.iterdir()] == [FILE]


@pytest.fixture
def waits(run, monkeypatch):
    """Set when somebody waits for the save before."""
    waiting, join = threading.Event(), run.component._saver._join

    def noted() -> None:
        waiting.set()
        join()

    monkeypatch.setattr(run.component._saver, "_join", noted)
    return waiting


def while_the_disk_is_busy(run, disk, waits, action):
    """What `action` gives, which has to wait for a save."""
    disk.reached.clear()
    disk.go_on.clear()
    run.save(2.0)
    assert disk.reached.wait(DEADLINE)
    waits.clear()
    with ThreadPoolExecutor(1) as pool:
        given = pool.submit(action)
        assert waits.wait(DEADLINE)
        assert not given.done()
        disk.go_on.set()
        return given.result(DEADLINE)


def test_the_next_save_waits(run, disk, waits):
    run.save(1.0)
    run.end()
    while_the_disk_is_busy(run, disk, waits, lambda: run.save(3.0))
    run.end()
    assert run.saved() == 3.0


@pytest.mark.parametrize("read", ["get_model", "get_model_inventory", "load_model"])
def test_whoever_reads_through_the_persistor_waits(read, run, disk, waits):
    run.save(1.0)
    run.end()
    given = {"get_model": (FILE,)}.get(read, ())
    got = while_the_disk_is_busy(run, disk, waits, lambda: getattr(run.persistor, read)(*given, run.context))
    assert got
    assert run.saved() == 2.0
    if read == "get_model":
        assert np.all(np.asarray(got["weights"]["bias"]) == 2.0)


def failed_save(run, disk, caplog, value, save=Run.save):
    """Save while the disk refuses it, and wait until that has gone wrong."""
    disk.error = OSError(28, "No space left on device")
    caplog.clear()
    save(run, value)
    eventually(lambda: "was not saved: [Errno 28] No space left on device" in caplog.text, DEADLINE)
    disk.error = None


def save_best(run, value):
    """As FLARE does in an event, whose errors it only logs."""
    run.persistor.persistence_manager.update(make_model_learnable({"bias": torch.full((2,), value)}, {}))
    run.persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, run.context)


def test_a_disk_that_is_full_fails_the_next_save_and_keeps_what_is_written(run, disk, caplog):
    run.save(1.0)
    run.end()
    failed_save(run, disk, caplog, 2.0)
    assert run.saved() == 1.0
    assert [path.name for path in run.file.parent.iterdir()] == [FILE]
    with pytest.raises(OSError, match="No space left"):
        run.save(3.0)
    run.end()
    assert run.saved() == 3.0
    run.save(4.0)  # it was told once
    run.end()
    assert run.saved() == 4.0


def test_the_best_model_is_saved_after_one_that_was_not_and_the_workflow_hears_of_that(run, disk, caplog):
    failed_save(run, disk, caplog, 1.0)
    save_best(run, 2.0)
    with pytest.raises(OSError, match="No space left"):
        run.save(3.0)
    run.end()
    assert run.saved() == 3.0
    assert float(torch.load(run.file.with_name(BEST), weights_only=True)["model"]["bias"][0]) == 2.0


def test_the_workflow_hears_of_a_best_model_that_was_not_saved(run, disk, caplog):
    run.save(1.0)
    failed_save(run, disk, caplog, 2.0, save_best)
    with pytest.raises(OSError, match="No space left"):
        run.save(3.0)
    run.end()
    assert run.saved() == 3.0


def test_the_end_of_a_run_waits_and_says_what_failed(run, disk, caplog):
    disk.go_on.clear()
    run.save(1.0)
    ending = threading.Thread(target=run.end)
    ending.start()
    assert disk.reached.wait(DEADLINE)
    disk.error = OSError(5, "Input/output error")
    disk.go_on.set()
    ending.join(DEADLINE)
    assert "a checkpoint was not saved: [Errno 5] Input/output error" in caplog.text
    disk.error = None


def test_what_can_not_be_written_leaves_nothing_behind(run, monkeypatch):
    def fails(*args) -> None:
        raise RuntimeError("can't pickle")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RuntimeError, match="can't pickle"):
        run.save(1.0)
    assert not list(run.file.parent.iterdir())


@pytest.mark.parametrize("persistor", [None, SimpleNamespace()], ids=["nothing", "another"])
def test_another_persistor_is_refused_when_the_run_starts(persistor, tmp_path):
    component = BackgroundSave("saver")
    context = FLContext()
    context.get_engine = lambda: SimpleNamespace(get_component=lambda name: persistor)
    with pytest.raises(ConfigError, match=r"'saver' is .*, but FLARE's PTFileModelPersistor is needed"):
        component.handle_event(EventType.START_RUN, context)


def test_a_persistor_that_saves_otherwise_is_refused(tmp_path):
    why = r"'persistor' is Encrypting, which has a save_model_file of its own"
    with pytest.raises(ConfigError, match=why):
        Run(tmp_path, BackgroundSave(), Encrypting(model=torch.nn.Linear(3, 2)))
    job = FedJob("job")
    job.to_server(Encrypting(model=torch.nn.Linear(3, 2)), id="persistor")
    with pytest.raises(ConfigError, match=why):
        save_in_background(job)
    assert list(job._deploy_map["server"].app_config.components) == ["persistor"]


def recipe(kind, tmp_path, **model):
    (tmp_path / "client.py").write_text("import nvflare.client\n")
    return kind(name="job", min_clients=1, num_rounds=1, train_script=str(tmp_path / "client.py"), **model)


def test_a_recipe_gets_it_once(tmp_path):
    made = recipe(
        FedAvgRecipe, tmp_path, model={"class_path": "torch.nn.Linear", "args": {"in_features": 3, "out_features": 2}}
    )
    save_in_background(made)
    with pytest.raises(ConfigError, match="already has BackgroundSave"):
        save_in_background(made)
    made.export(str(tmp_path / "exported"))
    (config,) = (tmp_path / "exported").rglob("config_fed_server.json")
    assert '"nvflare_rdma.persistors.BackgroundSave"' in config.read_text()


def test_a_job_without_flares_persistor_is_refused(tmp_path):
    made = recipe(NumpyFedAvgRecipe, tmp_path, model=[0.0])
    with pytest.raises(ConfigError, match="the job has NPModelPersistor as 'persistor', and not FLARE's"):
        save_in_background(made)
    made = recipe(
        FedAvgRecipe, tmp_path, model={"class_path": "torch.nn.Linear", "args": {"in_features": 3, "out_features": 2}}
    )
    with pytest.raises(ConfigError, match="the job has nothing as 'other'"):
        save_in_background(made, "other")
