"""While another thread imports torch, which takes seconds, `sys.modules` has it without most of its names."""

from __future__ import annotations

from tests.support.processes import run

PAUSED = """
import sys, threading
import numpy as np

halfway, go = threading.Event(), threading.Event()

class Pause:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.torch_version":  # one of the first things that torch imports
            halfway.set()
            assert go.wait(60)

sys.meta_path.insert(0, Pause())
thread = threading.Thread(target=lambda: __import__("torch"), daemon=True)
"""
START = """
thread.start()
assert halfway.wait(60)
assert not hasattr(sys.modules["torch"], "Tensor")
"""
FINISH = """
go.set()
thread.join()
import torch
"""


def run_code(code: str) -> None:
    done = run(["-c", code], timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_arrays_are_quantized_meanwhile():
    run_code(
        PAUSED
        + """
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer

def both_ways(value):
    sent = DXO(DataKind.WEIGHTS, {"w": value, "step": np.arange(3)})
    sent = from_shareable(ModelQuantizer("int8", one_way=True).process(sent.to_shareable(), FLContext()))
    assert sent.data["w"].dtype not in (value.dtype,)
    return from_shareable(ModelDequantizer().process(sent.to_shareable(), FLContext())).data["w"]
"""
        + START
        + """
values = np.linspace(-1, 1, 4096, dtype=np.float32)
assert np.abs(both_ways(values) - values).max() < 0.01
"""
        + FINISH
        + """
assert (both_ways(torch.from_numpy(values)) - torch.from_numpy(values)).abs().max() < 0.01
"""
    )


def test_a_trainer_that_is_still_importing_it_moves_its_tensors_directly():
    """`sys.modules` says that it will, and not that it has been imported."""
    run_code(
        PAUSED
        + """
import os
from nvflare.client.cell.bootstrap import BOOTSTRAP_FILE_ENV_VAR
os.environ[BOOTSTRAP_FILE_ENV_VAR] = "bootstrap.json"
from nvflare_rdma.streaming.component import install
"""
        + START
        + """
installing = threading.Thread(target=install, daemon=True)
installing.start()
"""
        + FINISH
        + """
installing.join()
from nvflare.fuel.utils.fobs.fobs import _decomposers
from nvflare_rdma.streaming.decomposers import DirectDecomposer
assert isinstance(_decomposers["torch.Tensor"], DirectDecomposer), _decomposers["torch.Tensor"]
"""
    )


def test_what_is_a_tensor_is_known_meanwhile_and_afterwards():
    run_code(
        PAUSED
        + "from nvflare_rdma.codecs.tensors import *\nfrom nvflare_rdma.codecs.tensors import identity, is_torch\n"
        + START
        + """
array = np.zeros(3, np.float32)
assert is_tensor(array) and is_encodable(array) and is_plain(array) and dtype_name(array) == "float32"
assert identity(array)[0] == "numpy" and to_flat(array).size == 3
for other in (array, None, "torch", {}, np.ndarray, np.float32(1)):
    assert not is_torch(other) and not is_on_gpu(other)
"""
        + FINISH
        + """
class Own(torch.Tensor): pass
for tensor in (torch.zeros(3), torch.nn.Parameter(torch.zeros(3)), torch.zeros(3).as_subclass(Own)):
    assert is_torch(tensor) and is_tensor(tensor)
for other in (array, torch, torch.Tensor, torch.float32, torch.nn.Linear(1, 1), torch.Size([1])):
    assert not is_torch(other)
"""
    )
