"""A base model as a safetensors file: where a site has it, what it is told apart by, and one to try the job with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from nvflare.apis.fl_context import FLContext
from safetensors.numpy import save_file

HEADER_LENGTH = 8  # bytes that say how long the header is


def folder_of(fl_ctx: FLContext, folder: str) -> Path:
    """Where this site, or the server, keeps models: `folder` below FLARE's own folder of the site. Several sites of one
    machine may share a whole path, in which each has a folder of its name."""
    workspace = fl_ctx.get_engine().get_workspace()
    return Path(workspace.get_root_dir(), folder, workspace.site_name if os.path.isabs(folder) else "")


def is_file_name(name: object) -> bool:
    """Whether this is the name of a file, without a folder: what another side says may lead anywhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def header_digest(file: Path) -> str:
    """SHA-256 of a safetensors file's header: names, dtypes, shapes and places of all its tensors. "" if the file is
    none."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(HEADER_LENGTH), "little")
        if length > os.stat(file).st_size - HEADER_LENGTH:
            return ""
        return hashlib.sha256(opened.read(length)).hexdigest()


def stamp(file: Path, quantization_type: str) -> str:
    """What a version of a file is told apart by, and how it travelled: its size, time of change and header."""
    status = os.stat(file)
    return f"{status.st_size} {status.st_mtime_ns} {header_digest(file)} {quantization_type}"


def make_model(file: Path, width: int, layers: int, vocab: int, seed: int = 0) -> None:
    """Write a GPT-2 of these sizes with random weights, under the names that transformers has for them."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in _shapes(width, layers, vocab):
        norm = ".ln_" in f".{name}" and name.endswith("weight")
        tensors[name] = (
            np.ones(shape, np.float32)
            if norm
            else np.zeros(shape, np.float32)
            if len(shape) == 1
            else 0.02 * generator.standard_normal(shape, np.float32)
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(tensors, beside)
    os.replace(beside, file)


def _shapes(width: int, layers: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("wte.weight", (vocab, width)), ("wpe.weight", (1024, width)))
    for n in range(layers):
        for part, shape in (
            ("ln_1", (width,)),
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("ln_2", (width,)),
            ("mlp.c_fc", (width, 4 * width)),
            ("mlp.c_proj", (4 * width, width)),
        ):
            yield f"h.{n}.{part}.weight", shape
            yield f"h.{n}.{part}.bias", shape[-1:]
    yield from (("ln_f.weight", (width,)), ("ln_f.bias", (width,)))
