"""The tensors of a model that is in a file, by their names, dtypes and shapes alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_rdma.errors import ConfigError

_FORMATS = "a .safetensors file, a torch state dict, or a .json of dtype and shape"
_ENTRIES = 'entries such as {"layer.weight": {"dtype": "float32", "shape": [768, 768]}}'


@dataclass(frozen=True)
class Tensor:
    """One entry of a model: `tied` names an earlier one that has the same memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tied: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values, at the dtype's own width; of odd widths rounded up."""
        return -(-math.prod(self.shape) * _bits(self.dtype) // 8)


def read_model(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file, a torch file with a state dict, or a JSON of name to dtype and shape.

    Raises:
        ConfigError: the file isn't there or isn't what its name says. Only headers are read, and a torch file is
            opened with `weights_only=True`, so that nothing in it runs.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"there is no model file {path}: it {found}. Name {_FORMATS}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_json_model(path) if path.suffix == ".json" else _read_torch(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} can't be read as a model: {error}. Name {_FORMATS}") from None


def _read_json_model(path: Path) -> list[Tensor]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has a {type(content).__name__}, and no model: {_ENTRIES} are expected")
    for name, item in content.items():
        if not (isinstance(item, dict) and {"dtype", "shape"} <= item.keys() and isinstance(item["shape"], list)):
            raise ConfigError(f"{path}: '{name}' is {json.dumps(item)[:60]}, and no tensor: {_ENTRIES} are expected")
    return [_tensor(name, str(item["dtype"]), item["shape"]) for name, item in content.items()]


def _read_safetensors(path: Path) -> list[Tensor]:
    from nvflare_rdma.codecs import read_header

    with path.open("rb") as file:

        def read_into(memory: memoryview, offset: int) -> None:
            file.seek(offset)
            file.readinto(memory)

        stored = read_header(path.stat().st_size, read_into, complete=False)
    # Codes of the format that this package has no names for are told in small letters, as all other dtypes.
    return [Tensor(tensor.name, tensor.dtype.lower(), tensor.shape) for tensor in stored]


def _read_torch(path: Path) -> list[Tensor]:
    import pickle
    import zipfile

    try:
        import torch
    except ImportError as error:
        how = "`pip install nvflare-rdma[torch]`, or name a .safetensors or .json file"
        raise ConfigError(f"{path} can't be read without torch: {error}. {how}") from None
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} is no file that torch.save writes. Name {_FORMATS}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(
            f"{path} can't be read as a torch state dict: {str(error).splitlines()[0]}. Name {_FORMATS}"
        ) from None
    from nvflare_rdma.codecs import dtype_name, identity

    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None  # FLARE's persistor adds a level
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, not a state dict: save `model.state_dict()`")
    first: dict[Any, str] = {}
    model = []
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            key = identity(value)
            other = name if key is None else first.setdefault(key, name)
            model.append(Tensor(name, dtype_name(value), tuple(value.shape), None if other == name else other))
    return model


def _tensor(name: str, dtype: str, shape: Any) -> Tensor:
    if not all(type(d) is int and d >= 0 for d in shape):
        raise ConfigError(f"the shape of '{name}' is {shape!r}, not a list of sizes")
    return Tensor(name, dtype, tuple(shape))


def read_json(path: Path) -> Any:
    """What a JSON file has. Raises ConfigError."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} can't be read as JSON: {error.strerror}. Name another file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}. Correct it, or name another file") from None


def _bits(dtype: str) -> int:
    if dtype == "bool":
        return 8
    digits = re.search(r"\d+", dtype)
    if digits is None:
        raise ConfigError(f"dtype {dtype!r} is unknown; write it as float32, bfloat16, int64, bool ...")
    return int(digits[0])
