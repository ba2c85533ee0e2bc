"""What the workers send each other. All of it follows from a seed, so that whoever pulls it knows what is right."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from pathlib import Path

import numpy as np

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.marks import marked
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.transfer.files import FileIdentity, OpenFile
from nvflare_rdma.transfer.files.source import BLOCK_BYTES
from nvflare_rdma.transfer.pieces import PieceLayout
from tests.support.encoded import as_encoded

Tensors = dict[str, np.ndarray]

CODECS = ("float16", "bfloat16", "int8", "blockwise8", "float8_e4m3", "normfloat4", "normfloat4_dq", "ternary")
DTYPES = ("float32", "float32", "float32", "float16", "float64", "int64", "uint8", "bool", "complex64")
#: Some small enough to be in the manifest, some of one chunk, some of many.
SIZES = (0, 1, 100, 5_000, 5_000, 20_000, 20_000, 100_000, 100_000, 300_001, 800_000)
#: Files of a few parts, so that some are whole when a transfer breaks.
PART_BYTES = 8 * BLOCK_BYTES
FILE_SIZES = (1, 70_000, PART_BYTES + 1, 6 * PART_BYTES - 5)


def make(seed: int) -> tuple[Tensors, dict[str, str]]:
    """Arrays by name, and the codecs of those that are marked."""
    rng = random.Random(seed)
    arrays: Tensors = {}
    codecs: dict[str, str] = {}
    for number in range(rng.choice((1, 2, 5, 20, 60))):
        name, dtype = f"t{number}", rng.choice(DTYPES)
        size = rng.choice(SIZES) if number < 6 else rng.choice((1, 5_000, 20_001))
        array = values(size, dtype, (seed, number))
        if dtype in ("float32", "float16") and size and rng.random() < 0.6:
            codecs[name] = rng.choice(CODECS)
            if rng.random() < 0.1:  # most codecs can't carry it: the tensor then travels exact
                array[rng.randrange(size)] = rng.choice((np.nan, np.inf))
        if size > 6 and size % 2 == 0 and rng.random() < 0.2:
            array = array.reshape(2, -1).T  # not contiguous
        arrays[name] = array
    return arrays, codecs


def values(size: int, dtype: str, seed: tuple[int, ...] = ()) -> np.ndarray:
    """Random values of a dtype."""
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, size).astype(np.bool_)
    if dtype in ("float32", "float16"):
        return generator.standard_normal(size).astype(dtype)
    return generator.integers(0, 256, size * np.dtype(dtype).itemsize, np.uint8).view(dtype)


def to_send(seed: int) -> Tensors:
    """What a sender gives to its service."""
    arrays, codecs = make(seed)
    return arrays | {name: marked(arrays[name], get_codec(codec)) for name, codec in codecs.items()}


def expected(seed: int) -> Tensors:
    """What a receiver has to get."""
    arrays, codecs = make(seed)
    for name, codec in codecs.items():
        array = arrays[name]
        if PieceLayout.choose(get_codec(codec), array.size).nbytes < array.nbytes:  # else it travels exact
            with contextlib.suppress(UnrepresentableError):
                arrays[name] = as_encoded(array, codec).reshape(array.shape)
    return arrays


def difference(got: dict[str, np.ndarray], want: Tensors) -> str:
    """What is wrong with what came; "" if every bit is right."""
    if list(got) != list(want):
        return f"{list(got)} came, {list(want)} were sent"
    for name, right in want.items():
        came = got[name]
        if (came.dtype, came.shape) != (right.dtype, right.shape):
            return f"{name} is {came.dtype} of shape {came.shape}, not {right.dtype} of shape {right.shape}"
        here, there = (np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8) for a in (came, right))
        if (wrong := np.flatnonzero(here != there)).size:
            return f"{name}, {right.dtype} of shape {right.shape}: {wrong.size} bytes differ, the first at {wrong[0]}"
    return ""


def source(seed: int, folder: Path) -> Path:
    """The file of a seed, which the first to want it writes."""
    path = folder / f"source-{seed}.bin"
    if not path.exists():
        size = random.Random(seed).choice(FILE_SIZES)
        own = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        own.write_bytes(np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes())
        os.utime(own, (1_700_000_000, 1_700_000_000))  # so that it is one and the same, whoever sends it
        own.rename(path)
    return path


def open_source(seed: int, folder: Path) -> OpenFile:
    """The file of a seed, with short parts."""
    file = OpenFile(str(source(seed, folder)))
    file.identity = FileIdentity(**{**file.identity.pack(), "part_bytes": PART_BYTES})
    return file
