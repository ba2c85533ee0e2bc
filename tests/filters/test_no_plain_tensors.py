"""What is no plain dense tensor is left alone: it is neither tied nor encoded, and a warning names it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext

from nvflare_rdma.errors import CodecError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer


class Wrapper(torch.Tensor):
    """A tensor made of another one, as DTensor and torchao's are: it has no memory, and its address is 0."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of what is inside")


class Own(torch.Tensor):
    """Memory of its own, and a meaning of its own."""


def quantized(params, name="int8", **kwargs):
    sent = DXO(DataKind.WEIGHTS, data=params).to_shareable()
    return from_shareable(ModelQuantizer(name, **kwargs).process(sent, FLContext()))


def dequantized(dxo):
    return from_shareable(ModelDequantizer().process(dxo.to_shareable(), FLContext())).data


@pytest.mark.parametrize("kwargs", [{}, {"delta": True}, {"error_feedback": True}])
def test_wrappers_are_neither_tied_nor_encoded(kwargs, warnings_logged):
    w = torch.randn(64, 64)
    params = {"w": w, "w.tied": w, "first": Wrapper(torch.ones(64, 64)), "second": Wrapper(torch.zeros(64, 64))}
    dxo = quantized(params, **kwargs)
    assert dxo.meta["nvflare_rdma"]["tied"] == {"w.tied": "w"}
    got = dequantized(dxo)
    assert got["first"] is params["first"]
    assert got["second"] is params["second"]
    (warning,) = [line for line in warnings_logged if "exact" in line]
    assert "first: a Wrapper of dtype float32 is no plain dense tensor" in warning
    assert "second: a Wrapper" in warning
    assert "w.tied" not in warning


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.randn(64, 64).as_subclass(Own),
        lambda: torch.eye(64).to_sparse(),
        lambda: torch.eye(64).to_sparse_csr(),
        lambda: torch.empty(64, 64, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(5)]),
        lambda: torch.nn.UninitializedParameter(),
        lambda: torch.quantize_per_tensor(torch.ones(64, 64), 0.1, 0, torch.qint8),
        lambda: np.ma.masked_array(np.ones((64, 64), np.float32)),
    ],
)
def test_all_else_that_is_no_plain_tensor(odd, warnings_logged):
    value = odd()
    dxo = quantized({"odd": value, "same": value, "w": torch.randn(64, 64)})
    assert dxo.data["odd"] is dxo.data["same"] is value
    assert "nvflare_rdma" not in dxo.meta
    assert dequantized(dxo)["odd"] is value
    assert "odd: a " in warnings_logged[-1]
    assert "no plain dense tensor" in warnings_logged[-1]


UNREADABLE = {
    "sparse": lambda codes: codes.to_sparse(),
    "meta": lambda codes: codes.to("meta"),
    "wrapper": Wrapper,
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["normfloat4", "int8", "float16", "adaquant", "blockwise8"])
def test_codes_that_can_not_be_read_are_refused(name, kind):
    dxo = quantized({"layer.w": torch.randn(60, 65)}, name)
    dxo.data["layer.w"] = UNREADABLE[kind](dxo.data["layer.w"])
    with pytest.raises(CodecError, match=r"'layer\.w': the codes are a \w+, but no plain dense tensor"):
        dequantized(dxo)


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize(("name", "key"), [("normfloat4", "absmax"), ("blockwise8", "code")])
def test_a_state_that_can_not_be_read_is_refused(name, key, kind):
    dxo = quantized({"layer.w": torch.randn(60, 65)}, name)
    state = dxo.meta["quant_state"]["layer.w"]
    state[key] = UNREADABLE[kind](state[key])
    with pytest.raises(CodecError, match=rf"'layer\.w': '{key}' is a \w+, but no plain dense tensor"):
        dequantized(dxo)
