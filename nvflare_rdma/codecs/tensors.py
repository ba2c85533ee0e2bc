"""The edge between frameworks' tensors and the codecs' flat numpy arrays. torch is imported only when it is used.

A tensor here is a plain `numpy.ndarray` or a `torch.Tensor`. Its *dtype name* is what FLARE's quantization
metadata has: `arr.dtype.name` or `str(tensor.dtype)` without `torch.`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvflare_rdma.codecs.runs import Array

_COMPARED = 1 << 20  # values
MAX_DIMENSIONS = 64  # what numpy and torch both take


@dataclass(frozen=True, slots=True)
class _DType:
    """One dtype of plain numbers: bytes of an element, whether numpy has it too, and what safetensors files call it.

    `packed` is how many values are in an element, which the files count in the last dimension. `loadable` says whether
    the library, which writes all of them, makes tensors of bytes in memory, as FLARE has it do.
    """

    nbytes: int
    in_numpy: bool
    safetensors: str = ""
    packed: int = 1
    loadable: bool = True


_DTYPES = {
    "bool": _DType(1, True, "BOOL"),
    "int8": _DType(1, True, "I8"),
    "int16": _DType(2, True, "I16"),
    "int32": _DType(4, True, "I32"),
    "int64": _DType(8, True, "I64"),
    "uint8": _DType(1, True, "U8"),
    "uint16": _DType(2, True, "U16"),
    "uint32": _DType(4, True, "U32"),
    "uint64": _DType(8, True, "U64"),
    "float16": _DType(2, True, "F16"),
    "float32": _DType(4, True, "F32"),
    "float64": _DType(8, True, "F64"),
    "complex64": _DType(8, True, "C64"),
    "complex128": _DType(16, True),
    "bfloat16": _DType(2, False, "BF16"),
    "float8_e4m3fn": _DType(1, False, "F8_E4M3"),
    "float8_e5m2": _DType(1, False, "F8_E5M2"),
    "float8_e4m3fnuz": _DType(1, False, "F8_E4M3FNUZ"),
    "float8_e5m2fnuz": _DType(1, False, "F8_E5M2FNUZ"),
    "float8_e8m0fnu": _DType(1, False, "F8_E8M0", loadable=False),
    "float4_e2m1fn_x2": _DType(1, False, "F4", packed=2, loadable=False),
}
#: What the safetensors format calls dtypes, by this package's names.
SAFETENSORS_DTYPES = {name: dtype.safetensors for name, dtype in _DTYPES.items() if dtype.safetensors}
#: The numpy dtype in which codecs take and give values, by this package's names. uint16 stands for bfloat16.
NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
FLOAT_NAMES = tuple(NUMPY_DTYPES)


def is_torch(value: Any) -> bool:
    """Return whether `value` is a torch tensor. torch is not imported to find out."""
    # Its classes tell. The module doesn't: while another thread imports torch, which takes seconds, `sys.modules` has
    # it already, but without `Tensor`.
    return any(cls.__name__ == "Tensor" and cls.__module__ == "torch" for cls in type(value).__mro__)


def is_on_gpu(value: Any) -> bool:
    """Return whether `value` is a torch tensor in the memory of a CUDA device (AMD's too, in torch's ROCm builds)."""
    return is_torch(value) and value.device.type == "cuda"


def is_tensor(value: Any) -> bool:
    """Return whether `value` is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_torch(value)


def dtype_name(value: Any) -> str:
    """Return the dtype's name, such as `float32`, `bfloat16` or `int64`, of a numpy array or torch tensor."""
    return str(value.dtype).removeprefix("torch.") if is_torch(value) else str(value.dtype.name)


def float_bits(name: str) -> int:
    """Return bits per value of the dtype called `name`, one of `FLOAT_NAMES`."""
    return 8 * _DTYPES[name].nbytes


def is_plain(value: Any) -> bool:
    """Return whether a numpy array or torch tensor is dense and nothing but plain numbers in native byte order."""
    if is_torch(value):
        import torch

        # Subclasses may have more than one tensor in them, or none.
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        return bool(plain and value.device.type != "meta" and not value.is_nested and not value.is_quantized)
    return type(value) is np.ndarray and value.dtype.isnative and value.dtype.kind in "biufc" and value.itemsize <= 16


def is_encodable(value: Any) -> bool:
    """Return whether a codec can take `value`: a plain float32, float16 or bfloat16 tensor that is not empty."""
    # Subclasses (masked arrays, records, DTensor) mean more than their values, so they are left alone.
    return is_plain(value) and dtype_name(value) in FLOAT_NAMES and math.prod(value.shape) > 0


def to_array(value: Any) -> Array:
    """Return the values of an encodable tensor in its own shape: float32, float16, or uint16 (bfloat16 bits).

    A view of the tensor's own memory, with its strides, if that is on the CPU; otherwise a copy. Read-only use.
    """
    if not is_torch(value):
        return np.asarray(value)
    import torch

    on_cpu = value.detach().cpu().resolve_neg()
    if on_cpu.dtype is torch.bfloat16:
        array: Array = on_cpu.view(torch.int16).numpy().view(np.uint16)
    else:
        array = on_cpu.numpy()
    return array


def to_flat(value: Any) -> Array:
    """Return what `to_array` does, flat and C-contiguous: a copy if the tensor isn't contiguous."""
    return np.ascontiguousarray(to_array(value)).reshape(-1)


def new_flat(name: str, n: int) -> Array:
    """Return uninitialised memory for `n` values of the dtype called `name` (uint16 for bfloat16)."""
    flat: Array = np.empty(n, NUMPY_DTYPES[name])
    return flat


def from_flat(flat: Array, name: str, shape: tuple[int, ...], torch_tensor: bool) -> Any:
    """Return a tensor of `shape` in the wanted framework that shares the memory of `flat`, which `new_flat` made.

    Raises:
        ValueError: numpy has no bfloat16.
    """
    if not torch_tensor:
        if name == "bfloat16":
            raise ValueError("a numpy array can't have dtype bfloat16")
        return flat.reshape(shape)
    import torch

    if name == "bfloat16":
        return torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16).reshape(shape)
    return torch.from_numpy(flat).reshape(shape)


def identity(value: Any) -> tuple[Any, ...] | None:
    """Return a key that two live tensors share only if they are the same view of the same memory, as tied weights.

    None for what has no memory that tells it apart: no plain tensors (a wrapper of other tensors is at address 0, as
    all of its kind), and empty ones.
    """
    if not is_tensor(value) or not is_plain(value) or 0 in value.shape:
        return None
    if is_torch(value):
        lazy = value.is_neg(), value.is_conj()  # done when it is read, not in memory
        return ("torch", value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, lazy)
    return ("numpy", value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str)


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two encodable tensors of one framework have the same dtype, shape and bits: zeros of different
    signs differ, and a NaN equals itself."""
    alike = is_torch(one) == is_torch(other) and is_encodable(one) and is_encodable(other)
    if not alike or dtype_name(one) != dtype_name(other) or tuple(one.shape) != tuple(other.shape):
        return False
    mine, its = to_flat(one), to_flat(other)
    bits = np.dtype(f"u{mine.itemsize}")
    runs = range(0, mine.size, _COMPARED)  # for what numpy takes to compare
    return all(np.array_equal(mine[i : i + _COMPARED].view(bits), its[i : i + _COMPARED].view(bits)) for i in runs)


def width(dtype: str, torch: bool) -> int:
    """Return the bytes of one element, or 0 if tensors (torch's or numpy's) of that dtype can't be sent."""
    found = _DTYPES.get(dtype)
    return found.nbytes if found is not None and (torch or found.in_numpy) else 0


def packed(dtype: str) -> int:
    """Return how many values are in one element of that dtype."""
    found = _DTYPES.get(dtype)
    return found.packed if found is not None else 1


def is_loadable(dtype: str) -> bool:
    """Return whether FLARE's own path can bring torch tensors of that dtype."""
    found = _DTYPES.get(dtype)
    return found is not None and found.loadable and bool(found.safetensors)
