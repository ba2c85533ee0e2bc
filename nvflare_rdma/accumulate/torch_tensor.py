"""A torch tensor whose values are decoded run by run when they are added, or all at once when they have to be."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from nvflare_rdma.accumulate.encoded import Encoded
from nvflare_rdma.accumulate.holdings import Holdings
from nvflare_rdma.codecs import Array, to_array

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Values from which on several threads are worth what it takes to start them.
_MANY = 1 << 21
_LARGEST = float(np.finfo(np.float32).max)


class State:
    """What all views of one encoded tensor share: its values, encoded until somebody needs them decoded."""

    def __init__(self, encoded: Encoded, shape: tuple[int, ...], holdings: Holdings) -> None:
        self.shape = shape
        self.dtype = _DTYPES[encoded.dtype]
        self.holdings = holdings
        self._encoded: Encoded | None = encoded
        self._decoded: torch.Tensor | None = None
        self.lock = threading.Lock()
        self._release = holdings.hold(self, encoded.nbytes, encoded.nbytes_on_disk)

    @property
    def encoded(self) -> Encoded | None:
        """The values, unless they have been decoded."""
        return self._encoded

    def decoded(self) -> torch.Tensor:
        """The plain tensor, always the same one."""
        with self.lock:
            if self._decoded is None:
                encoded = self._encoded
                assert encoded is not None
                self._decoded = self.copy(encoded)
                self._encoded = None
                self._release()
            return self._decoded

    def copy(self, encoded: Encoded, weight: float | None = None) -> torch.Tensor:
        """A plain tensor of its own with the values, times `weight` if that is given."""
        with torch.no_grad():
            out = torch.empty(self.shape, dtype=self.dtype)
            flat, values = out.reshape(-1), to_array(out).reshape(-1)

            def run(start: int, stop: int) -> None:
                encoded.decode(start, values[start:stop])
                if weight is not None and encoded.dtype == "float32":
                    with np.errstate(all="ignore"):
                        np.multiply(values[start:stop], np.float32(weight), out=values[start:stop])
                elif weight is not None:
                    flat[start:stop].mul_(weight)

            _in_runs(encoded, run)
        nbytes = out.numel() * out.element_size()
        (self.holdings.note_decoded if weight is None else self.holdings.note_added)(nbytes)
        return out

    def add_to(self, total: torch.Tensor, encoded: Encoded, weight: float) -> None:
        """Add `weight` times the values to a contiguous plain tensor of the same shape and dtype. If they can't be
        read, it stays as it was or, if that shows in the middle only, becomes NaN: no model may be made of it."""
        encoded.check()
        with torch.no_grad():
            flat = total.detach().view(-1)
            sums: Array = to_array(flat)

            def run(start: int, stop: int) -> None:
                if encoded.dtype == "float32":
                    encoded.add(start, weight, sums[start:stop])
                    return
                values = torch.empty(stop - start, dtype=self.dtype)
                encoded.decode(start, to_array(values))
                flat[start:stop].add_(values, alpha=weight)

            try:
                _in_runs(encoded, run)
            except BaseException:
                flat.fill_(float("nan"))
                raise
        self.holdings.note_added(flat.numel() * flat.element_size())


def _in_runs(encoded: Encoded, work: Callable[[int, int], None]) -> None:
    """Call `work` with the start and end of each run, in several threads if there are many values."""
    runs = [(start, min(start + encoded.run, encoded.n)) for start in range(0, encoded.n, encoded.run)]
    workers = min(len(os.sched_getaffinity(0)), len(runs)) if encoded.n >= _MANY else 1
    if workers < 2:
        for start, stop in runs:
            work(start, stop)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="rdma-sums") as pool:
        for done in [pool.submit(work, start, stop) for start, stop in runs]:
            done.result()


class EncodedTensor(torch.Tensor):
    """A tensor that came in few bits.

    To multiply it by a number, to add it to another tensor in place, to copy it and to ask what it is like leaves it
    encoded. For everything else it becomes a plain tensor, once, and from then on does what that one does. It says
    that it is a `torch.Tensor`: whoever looks for how to serialize an object by its class finds what is for those.
    """

    state: State

    @staticmethod
    def __new__(cls, state: State) -> EncodedTensor:
        """Make a tensor of the shape and dtype, which has no memory."""
        made: EncodedTensor = torch.Tensor._make_wrapper_subclass(cls, state.shape, dtype=state.dtype)
        return made

    def __init__(self, state: State) -> None:
        self.state = state
        self._own: torch.Tensor | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """FLARE's serializer takes it for a tensor by this."""
        return torch.Tensor

    def decoded(self) -> torch.Tensor:
        """The plain tensor, always the same one. It has the memory of those of `detach`, and gradients of its own."""
        if self._own is None:
            whole = self.state.decoded()
            with self.state.lock:
                self._own = whole.detach() if self._own is None else self._own
        return self._own

    def detached(self) -> EncodedTensor:
        """Another one of the same memory, with gradients of its own."""
        made = EncodedTensor(self.state)
        made._own = self._own.detach() if self._own is not None else None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook for whatever is called with such a tensor."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            handler = _HANDLERS.get(func)
            if handler is not None:
                result = handler(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            elif func in _QUESTIONS and _still_encoded(args[0]) is not None:
                return func(*args, **kwargs)
            return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook for what reaches its operators in another way."""
        return func(*_plain(args), **_plain(kwargs or {}))


def _plain(value: Any) -> Any:
    """The same with plain tensors, in whatever containers they are."""
    if type(value) is EncodedTensor:
        return value.decoded()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return value


def _still_encoded(value: Any) -> Encoded | None:
    return value.state.encoded if type(value) is EncodedTensor else None


def _is_number(value: Any) -> bool:
    """Whether float32 has it, and torch and numpy round it alike. numpy's float64 is a float."""
    if type(value) is int:
        return abs(value) <= 1 << 53
    return isinstance(value, float) and abs(value) <= _LARGEST


def _product(*args: Any, **options: Any) -> Any:
    if options or len(args) != 2:
        return NotImplemented
    tensor, other = args
    if not _is_number(other):
        tensor, other = other, tensor
    encoded = _still_encoded(tensor)
    return tensor.state.copy(encoded, other) if encoded is not None and _is_number(other) else NotImplemented


def _add_in_place(*args: Any, alpha: Any = 1, **options: Any) -> Any:
    if options or len(args) != 2:
        return NotImplemented
    total, other = args
    encoded = _still_encoded(other)
    if encoded is None or not _is_number(alpha):
        return NotImplemented
    into = _plain(total)
    fits = type(into) is torch.Tensor and into.layout is torch.strided and into.device.type == "cpu"
    fits = fits and into.dtype == other.state.dtype and tuple(into.shape) == other.state.shape and into.is_contiguous()
    if not fits or into.requires_grad or into.is_neg():
        return NotImplemented
    other.state.add_to(into, encoded, alpha)
    return total


def _copied(*args: Any, **options: Any) -> Any:
    if not args:
        return NotImplemented
    tensor = args[0]
    encoded = _still_encoded(tensor)
    return tensor.state.copy(encoded) if encoded is not None and not options else NotImplemented


def _itself(*args: Any, **options: Any) -> Any:
    return args[0] if len(args) == 1 and not options and _still_encoded(args[0]) is not None else NotImplemented


def _detached(*args: Any, **options: Any) -> Any:
    return (
        args[0].detached() if len(args) == 1 and not options else NotImplemented
    )  # also when it is decoded: what makes a parameter of a tensor wants its class


def _requires_grad(tensor: Any, requires_grad: bool = True) -> Any:
    tensor.decoded().requires_grad_(requires_grad)
    return tensor


_T: Any = torch.Tensor
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_T.mul, torch.mul, torch.multiply, _T.multiply, _T.__mul__, _T.__rmul__), _product),
    **dict.fromkeys((_T.add_, _T.__iadd__), _add_in_place),
    **dict.fromkeys((_T.clone, torch.clone, _T.__deepcopy__), _copied),
    **dict.fromkeys((_T.cpu, _T.contiguous), _itself),
    **dict.fromkeys((_T.detach, torch.detach), _detached),
    _T.requires_grad_: _requires_grad,
}
#: What can be answered without the values.
_QUESTIONS = {
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.stride, _T.storage_offset, _T.__len__),
    *(_T.is_contiguous, _T.is_floating_point, _T.is_complex, _T.is_signed, _T.get_device, _T.is_neg, _T.is_conj),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.is_neg, torch.is_conj),
    *(
        getattr(_T, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn")
    ),
    *(
        getattr(_T, name).__get__
        for name in ("is_sparse", "is_cuda", "is_quantized", "is_nested", "is_meta", "nbytes", "itemsize")
    ),
}
