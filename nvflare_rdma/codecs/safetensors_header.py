"""Reads and writes the header of a safetensors file, which tells where its tensors lie.

The format is described at https://huggingface.co/docs/safetensors

8 bytes: length of the header, little-endian. The header: JSON of name to dtype, shape and offsets (first and last,
exclusive) in what follows it, which they fill without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from nvflare_rdma.codecs.tensors import MAX_DIMENSIONS, SAFETENSORS_DTYPES, packed, width

#: Those whose elements the files count as torch does.
_NAMES = {code: name for name, code in SAFETENSORS_DTYPES.items() if packed(name) == 1}
#: Not the name of a tensor.
_METADATA = "__metadata__"
#: The format's own limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: this package's name of it, or the format's if this package has none.
        start: where in the file its first byte is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(size: int, read_into: Callable[[memoryview, int], None], complete: bool = True) -> list[StoredTensor]:
    """Return the tensors of a file of `size` bytes, in their order there.

    Args:
        read_into: fills memory from an offset of the file.
        complete: whether the tensors have to fill the rest of the file.

    Raises:
        ValueError: it is no safetensors file; the message says why.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    prefix = bytearray(8)
    read_into(memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"its header would be {length} bytes long")
    text = bytearray(length)
    read_into(memoryview(text), 8)
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    if type(header) is not dict:
        raise ValueError(f"its header is a {type(header).__name__}")
    header.pop(_METADATA, None)
    tensors = sorted((_tensor(name, entry, 8 + length) for name, entry in header.items()), key=_place)
    if complete:
        _check_places(tensors, 8 + length, size)
    return tensors


def _check_places(tensors: list[StoredTensor], end: int, size: int) -> None:
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(f"{tensor.name!r} begins at {tensor.start}, not at {end}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"its tensors end at {end}, the file at {size}")


def is_storable(name: str, dtype: str, shape: Sequence[int]) -> bool:
    """Whether the format has a place for a tensor of that name, dtype (this package's name of it) and shape."""
    return dtype in SAFETENSORS_DTYPES and name != _METADATA and (packed(dtype) == 1 or len(shape) > 0)


def make_header(name: str, dtype: str, shape: Sequence[int], nbytes: int) -> bytes:
    """The beginning of a file with one tensor, whose bytes are to follow it. It is a multiple of 8 bytes long."""
    sizes = [*shape[:-1], shape[-1] * packed(dtype)] if shape else []
    entry = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": sizes, "data_offsets": [0, nbytes]}
    text = json.dumps({name: entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _place(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.start, tensor.nbytes


def _tensor(name: str, entry: Any, base: int) -> StoredTensor:
    found = entry if type(entry) is dict else {}
    dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    if type(dtype) is not str or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} is {str(entry)[:200]}")
    first, last = offsets
    nbytes, each = last - first, width(_NAMES.get(dtype, ""), True)
    if nbytes < 0 or (each and nbytes != math.prod(shape) * each):
        raise ValueError(f"{name!r} of dtype {dtype} and shape {shape} has offsets {offsets}")
    return StoredTensor(name, _NAMES.get(dtype, dtype), tuple(shape), base + first, nbytes)


def _are_sizes(found: Any) -> TypeGuard[list[int]]:
    few = type(found) is list and len(found) <= MAX_DIMENSIONS
    return few and all(type(n) is int and 0 <= n < 1 << 63 for n in found)
